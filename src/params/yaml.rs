//! A ROS params file without ROS: for tools that check or write one.

use yaml_rust2::{Yaml, YamlLoader};

use super::Value;

/// The parameters that a params file gives to a node of that name, in the file's order: those of its own section and
/// of the sections for all nodes (`/**`).
pub fn overrides(text: &str, node: &str) -> Result<Vec<(String, Value)>, String> {
    let documents = YamlLoader::load_from_str(text).map_err(|e| format!("not YAML: {e}"))?;
    let Some(Yaml::Hash(sections)) = documents.first() else {
        return Err("holds no sections; a params file starts with '/**:' and 'ros__parameters:'".into());
    };
    let mut found = Vec::new();
    let mut heard = false;
    for (name, section) in sections {
        let name = name.as_str().unwrap_or_default();
        let last = name.rsplit('/').next().unwrap_or_default();
        if !["**", "*", node].contains(&last) {
            continue;
        }
        let Yaml::Hash(parameters) = &section["ros__parameters"] else {
            return Err(format!("section '{name}' has no 'ros__parameters:'"));
        };
        heard = true;
        flatten("", parameters, &mut found)?;
    }
    if heard { Ok(found) } else { Err(format!("no section for this node; name it '/**' or '{node}'")) }
}

fn flatten(prefix: &str, map: &yaml_rust2::yaml::Hash, found: &mut Vec<(String, Value)>) -> Result<(), String> {
    for (key, value) in map {
        let key = match key {
            Yaml::String(s) | Yaml::Real(s) => s.clone(),
            Yaml::Integer(i) => i.to_string(),
            Yaml::Boolean(b) => b.to_string(),
            _ => return Err(format!("a parameter under '{prefix}' has no plain name")),
        };
        let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            Yaml::Hash(inner) => flatten(&name, inner, found)?,
            value => found.push((name, from_yaml(value))),
        }
    }
    Ok(())
}

fn from_yaml(value: &Yaml) -> Value {
    match value {
        Yaml::Boolean(b) => Value::Bool(*b),
        Yaml::Integer(i) => Value::Int(*i),
        Yaml::Real(_) => value.as_f64().map_or(Value::Other("number"), Value::Double),
        Yaml::String(s) => Value::String(s.clone()),
        Yaml::Null | Yaml::BadValue => Value::Unset,
        Yaml::Array(items) if items.is_empty() => Value::Unset,
        Yaml::Array(items) => list(items),
        Yaml::Hash(_) | Yaml::Alias(_) => Value::Other("map"),
    }
}

fn list(items: &[Yaml]) -> Value {
    let number = |y: &Yaml| y.as_f64().or(y.as_i64().map(|i| i as f64));
    if let Some(v) = items.iter().map(Yaml::as_i64).collect() {
        Value::Ints(v)
    } else if let Some(v) = items.iter().map(number).collect() {
        Value::Doubles(v)
    } else if let Some(v) = items.iter().map(|y| y.as_str().map(str::to_owned)).collect() {
        Value::Strings(v)
    } else {
        Value::Other("mixed list")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_for_this_node_are_flattened_and_others_left_out() {
        let text = "/**:\n  ros__parameters:\n    seed: 3\n    limits: {elbow: {max_velocity: 2}}\n    camera_names: [a, b]\n\
                    other:\n  ros__parameters: {seed: 9}\n/arm/pi0_mps:\n  ros__parameters:\n    lock_memory: false\n";
        let got = overrides(text, "pi0_mps").unwrap();
        let want = [
            ("seed", Value::Int(3)),
            ("limits.elbow.max_velocity", Value::Int(2)),
            ("camera_names", Value::Strings(vec!["a".into(), "b".into()])),
            ("lock_memory", Value::Bool(false)),
        ];
        assert_eq!(got, want.map(|(n, v)| (n.to_owned(), v)));
    }

    #[test]
    fn a_file_that_is_no_params_file_says_what_is_missing() {
        for (text, says) in [
            ("a: [", "not YAML"),
            ("", "holds no sections"),
            ("seed: 3", "no section for this node"),
            ("/**:\n  seed: 3\n", "no 'ros__parameters:'"),
        ] {
            let e = overrides(text, "pi0_mps").unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
