//! What people read, printed from the table: README table, default YAML, `--help`.

use std::fmt::Write;

use super::Params;
use super::table::{DefaultValue, ParamSpec, TABLE, When};
use super::value::{Kind, Value};

/// The default as YAML writes it, or what it is in words.
fn default_text(spec: &ParamSpec) -> String {
    match spec.default {
        DefaultValue::Required => "required".into(),
        DefaultValue::Bool(b) => Value::Bool(b).to_string(),
        DefaultValue::Int(i) => Value::Int(i).to_string(),
        DefaultValue::Double(x) if x.is_nan() => "not set".into(),
        DefaultValue::Double(x) => Value::Double(x).to_string(),
        DefaultValue::String(s) => Value::String(s.into()).to_string(),
        DefaultValue::Strings(v) => Value::Strings(v.iter().map(|s| (*s).into()).collect()).to_string(),
        DefaultValue::Empty => "[]".into(),
        DefaultValue::JointPosition => "place in joint_names".into(),
        DefaultValue::AllJoints => "all joints".into(),
    }
}

/// The table for the README, in Markdown.
pub fn markdown_table() -> String {
    let mut out = String::from(
        "| parameter | type | default | allowed | may change | |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    let mut group = "";
    for s in TABLE {
        if s.group != group {
            group = s.group;
            let _ = writeln!(out, "| **{group}** | | | | | |");
        }
        let default = default_text(s);
        let default = if default.contains(' ') && !default.starts_with('"') { default } else { format!("`{default}`") };
        let allowed = match (s.range_text(), s.unit) {
            (range, unit) if range.is_empty() => unit.to_owned(),
            (range, _) => range,
        };
        let row = [
            format!("`{}`", s.name),
            s.kind.name().into(),
            default,
            allowed,
            s.when.name().into(),
            s.about.replace('<', "&lt;"),
        ];
        let _ = writeln!(out, "| {} |", row.join(" | "));
    }
    out
}

/// A params file with every default. Required parameters and those of single cameras, joints and groups are comments.
pub fn default_yaml() -> String {
    let mut out = String::from(
        "# Every parameter with its default, printed from the table in src/params/table.rs; do not edit.\n\
         # Start a file of your own with what your robot needs; what it leaves out has these values.\n\
         /**:\n  ros__parameters:\n",
    );
    let mut group = "";
    for s in TABLE {
        if s.group != group {
            group = s.group;
            let _ = writeln!(out, "\n    # ---- {group} ----");
        }
        let mut facts = vec![s.kind.name().to_owned()];
        facts.extend(Some(s.range_text()).filter(|r| !r.is_empty()));
        if s.range_text().is_empty() && !s.unit.is_empty() {
            facts.push(s.unit.into());
        }
        facts.push(match s.when {
            When::Start => "fixed at start".into(),
            When::Unarmed => "may change while unarmed".into(),
            When::Any => "may change at any time".into(),
        });
        let _ = writeln!(out, "    # {} ({})", s.about, facts.join("; "));
        // An empty list has no type in a params file.
        let comment = s.placeholder().is_some() || matches!(s.default, DefaultValue::Required | DefaultValue::Empty);
        let _ = writeln!(out, "    {}{}: {}", if comment { "# " } else { "" }, s.name, default_text(s));
    }
    out
}

/// The values of a node as a params file that gives the same node again. Numbers that are not set and empty lists are
/// left out: they are what they are without.
pub fn params_file(params: &Params) -> String {
    let mut out = String::from("/**:\n  ros__parameters:\n");
    for (name, entry) in params.iter() {
        let unset = matches!(entry.value, Value::Double(x) if x.is_nan());
        if !unset && !entry.value.is_empty_list() {
            let _ = writeln!(out, "    {name}: {}", entry.value);
        }
    }
    out
}

/// The table for a terminal.
pub fn help_table() -> String {
    let width = TABLE.iter().map(|s| s.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    let mut group = "";
    for s in TABLE {
        if s.group != group {
            group = s.group;
            let _ = writeln!(out, "{group}:");
        }
        let facts: Vec<String> = [
            s.kind.name().to_owned(),
            if s.kind == Kind::Bool { String::new() } else { s.range_text() },
            format!("default {}", default_text(s)),
        ]
        .into_iter()
        .filter(|f| !f.is_empty() && f != "default required")
        .chain((s.default == DefaultValue::Required).then(|| "required".to_owned()))
        .collect();
        let _ = writeln!(out, "  {:width$}  {}\n  {:width$}    {}", s.name, s.about, "", facts.join("; "));
    }
    out
}
