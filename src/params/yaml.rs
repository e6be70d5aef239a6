//! A ROS params file without ROS: for tools that check or write one.

use std::path::Path;

use yaml_rust2::yaml::Hash;
use yaml_rust2::{Yaml, YamlLoader};

use super::Value;

/// The parameters that a params file gives to a node, in the file's order: those of its own section and of the sections
/// for all nodes (`/**`). The node is `/namespace/name`, or `name` in any namespace.
pub fn overrides(text: &str, node: &str) -> Result<Vec<(String, Value)>, String> {
    let mut found = Vec::new();
    for parameters in sections(text, node)? {
        flatten("", &parameters, &mut found)?;
    }
    Ok(found)
}

/// What the file says to a node, as [`overrides`]; the error names it.
pub fn read(file: &Path, node: &str) -> Result<Vec<(String, Value)>, String> {
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string());
    text.and_then(|text| overrides(&text, node)).map_err(|e| format!("params file '{}': {e}", file.display()))
}

/// Whether a params file has a section that the node reads, and none for it that it does not. What this parser refuses,
/// such as a key that stands twice, is rcl's to judge.
pub fn check_sections(text: &str, node: &str) -> Result<(), String> {
    match YamlLoader::load_from_str(text) {
        Ok(documents) => addressed(documents, node).map(|_| ()),
        Err(_) => Ok(()),
    }
}

fn sections(text: &str, node: &str) -> Result<Vec<Hash>, String> {
    addressed(YamlLoader::load_from_str(text).map_err(|e| format!("not YAML: {e}"))?, node)
}

/// The sections for a node, of all documents of a file.
fn addressed(documents: Vec<Yaml>, node: &str) -> Result<Vec<Hash>, String> {
    let trees: Vec<Hash> = documents.into_iter().filter_map(Yaml::into_hash).collect();
    if trees.is_empty() {
        return Err("holds no sections; a params file starts with '/**:' and 'ros__parameters:'".into());
    }
    let mut all = Vec::new();
    trees.into_iter().for_each(|tree| walk("", tree, &mut all));
    let names: Vec<_> = all.iter().map(|(name, _)| format!("'{name}'")).collect();
    let mut read = Vec::new();
    for (name, parameters) in all {
        match Addressee::of(&name, node) {
            Addressee::Node => {
                read.push(parameters.ok_or_else(|| format!("section '{name}' has no 'ros__parameters:'"))?);
            }
            Addressee::NodeUnread => {
                return Err(format!(
                    "section '{name}' would be this node's, but names of this form are not read; name it '/**' or '{node}'"
                ));
            }
            Addressee::Others => {}
        }
    }
    match read.is_empty() {
        true => Err(format!("no section for this node, only {}; name one '/**' or '{node}'", names.join(", "))),
        false => Ok(read),
    }
}

/// Every section by its name, with its parameters if it has any; a namespace may be a level of its own.
fn walk(above: &str, tree: Hash, found: &mut Vec<(String, Option<Hash>)>) {
    for (key, below) in tree {
        let key = key.into_string().unwrap_or_default();
        let name = if above.is_empty() { key } else { format!("{above}/{key}") };
        let Yaml::Hash(mut below) = below else {
            found.push((name, None));
            continue;
        };
        match below.remove(&Yaml::String(PARAMETERS.into())) {
            Some(Yaml::Hash(parameters)) => found.push((name.clone(), Some(parameters))),
            Some(_) => found.push((name.clone(), None)),
            None if !below.values().any(|y| matches!(y, Yaml::Hash(_))) => found.push((name.clone(), None)),
            None => {}
        }
        below.retain(|_, y| matches!(y, Yaml::Hash(_)));
        walk(&name, below, found);
    }
}

const PARAMETERS: &str = "ros__parameters";

/// Whose a section is. rclcpp knows more forms of names than r2r reads: what r2r would leave out is told apart from what
/// is for others.
enum Addressee {
    Node,
    NodeUnread,
    Others,
}

impl Addressee {
    fn of(section: &str, node: &str) -> Self {
        let tokens = |name: &str| name.trim_start_matches('/').split('/').map(str::to_owned).collect::<Vec<_>>();
        let (pattern, node_tokens) = (tokens(section), tokens(node));
        let bare = node_tokens.last().map_or("", String::as_str);
        let last = pattern.last().map_or("", String::as_str);
        let any_namespace = !node.starts_with('/');
        let of_some_namespace = any_namespace && section.starts_with('/') && !section.contains('*') && last == bare;
        if ["/**", "**", node, bare].contains(&section) || of_some_namespace {
            Self::Node
        } else if any_namespace && ["**", "*", bare].contains(&last) || covers(&pattern, &node_tokens) {
            Self::NodeUnread
        } else {
            Self::Others
        }
    }
}

/// Whether a name with the wildcards `*` (one part) and `**` (any number of them) is also the name of that node.
fn covers(pattern: &[String], name: &[String]) -> bool {
    let Some((first, rest)) = pattern.split_first() else { return name.is_empty() };
    if first == "**" {
        return (0..=name.len()).any(|n| covers(rest, &name[n..]));
    }
    name.split_first().is_some_and(|(part, more)| (first == "*" || first == part) && covers(rest, more))
}

fn flatten(prefix: &str, map: &Hash, found: &mut Vec<(String, Value)>) -> Result<(), String> {
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
            ("/**:\n  seed: 3\n", "section '/**' has no 'ros__parameters:'"),
            ("/**:\n  ros__parameters:\n", "section '/**' has no 'ros__parameters:'"),
        ] {
            let e = overrides(text, "pi0_mps").unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }

    #[test]
    fn every_document_is_looked_at_and_what_only_rcl_can_read_is_left_to_it() {
        let of = |section: &str| format!("{section}:\n  ros__parameters: {{seed: 3}}\n");
        let two = format!("{}---\n{}", of("/**"), of("/*/pi0_mps"));
        assert!(check_sections(&two, "/left/pi0_mps").unwrap_err().contains("'/*/pi0_mps' would be this node's"));
        assert_eq!(check_sections(&format!("{}---\n{}", of("other"), of("pi0_mps")), "/pi0_mps"), Ok(()));
        assert_eq!(check_sections(&format!("{}{}", of("/**"), of("/**")), "/pi0_mps"), Ok(()), "the same key twice");
    }

    #[test]
    fn a_section_is_read_by_the_node_that_it_names_or_refused() {
        let file = |section: &str| format!("{section}:\n  ros__parameters: {{seed: 3}}\n");
        for (section, node) in [
            ("/**", "/left/pi0_mps"),
            ("\"**\"", "/left/pi0_mps"),
            ("pi0_mps", "/left/pi0_mps"),
            ("/left/pi0_mps", "/left/pi0_mps"),
            ("/left/pi0_mps", "pi0_mps"),
            ("/left:\n pi0_mps", "/left/pi0_mps"),
        ] {
            assert_eq!(overrides(&file(section), node).map(|p| p.len()), Ok(1), "{section}");
        }
        for (section, node) in [
            ("/**/pi0_mps", "/left/pi0_mps"),
            ("/**/pi0_mps", "/pi0_mps"),
            ("/*/pi0_mps", "/left/pi0_mps"),
            ("/left/*", "/left/pi0_mps"),
            ("left/pi0_mps", "/left/pi0_mps"),
            ("left:\n pi0_mps", "/left/pi0_mps"),
            ("/*/*/**/*", "/robot/left/pi0_mps"),
            ("/*/pi0_mps", "pi0_mps"),
            ("left/pi0_mps", "pi0_mps"),
        ] {
            let text = format!("/**:\n  ros__parameters: {{seed: 2}}\n{}", file(section));
            let e = overrides(&text, node).unwrap_err();
            assert!(e.contains("would be this node's") && e.ends_with(&format!("name it '/**' or '{node}'")), "{e}");
        }
        for (section, node) in [
            ("/*/pi0_mps", "/pi0_mps"),
            ("/*", "/left/pi0_mps"),
            ("/left/pi0_mps", "/right/pi0_mps"),
            ("/left/pi0_mps", "/pi0_mps"),
            ("camera", "pi0_mps"),
        ] {
            let e = check_sections(&file(section), node).unwrap_err();
            assert_eq!(e, format!("no section for this node, only '{section}'; name one '/**' or '{node}'"));
        }
    }
}
