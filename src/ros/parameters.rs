//! Parameters on ROS: overrides at start, the six parameter services and `/parameter_events`, all from the table.

use r2r::rcl_interfaces::msg::{
    FloatingPointRange, IntegerRange, ListParametersResult, Parameter, ParameterDescriptor, ParameterEvent,
    ParameterValue, SetParametersResult,
};

use super::convert::{stamp, text};
use crate::clock::RosTime;
use crate::node::Node;
use crate::params::urdf::Description;
use crate::params::{Allowed, Change, Entry, Kind, Params, SHARES, Value, When};

/// What the user gave on the command line and in params files.
pub fn overrides(node: &r2r::Node) -> Vec<(String, Value)> {
    let Ok(params) = node.params.lock() else { return Vec::new() };
    params.iter().map(|(name, p)| (name.clone(), from_override(&p.value))).collect()
}

fn from_override(v: &r2r::ParameterValue) -> Value {
    use r2r::ParameterValue as P;
    match v {
        P::NotSet => Value::Unset,
        P::Bool(b) => Value::Bool(*b),
        P::Integer(i) => Value::Int(*i),
        P::Double(x) => Value::Double(*x),
        P::String(s) => Value::String(s.clone()),
        P::IntegerArray(v) => Value::Ints(v.clone()),
        P::DoubleArray(v) => Value::Doubles(v.clone()),
        P::StringArray(v) => Value::Strings(v.clone()),
        P::BoolArray(v) => foreign_list(v, "bool list"),
        P::ByteArray(v) => foreign_list(v, "byte list"),
    }
}

/// A list of a type that no parameter has. Without items it may be a list of any type, and Ints stands for that.
fn foreign_list<T>(items: &[T], name: &'static str) -> Value {
    if items.is_empty() { Value::Ints(Vec::new()) } else { Value::Other(name) }
}

/// Numbers of `rcl_interfaces/msg/ParameterType`.
mod type_number {
    pub const NOT_SET: u8 = 0;
    pub const BOOL: u8 = 1;
    pub const INTEGER: u8 = 2;
    pub const DOUBLE: u8 = 3;
    pub const STRING: u8 = 4;
    pub const BYTE_ARRAY: u8 = 5;
    pub const BOOL_ARRAY: u8 = 6;
    pub const INTEGER_ARRAY: u8 = 7;
    pub const DOUBLE_ARRAY: u8 = 8;
    pub const STRING_ARRAY: u8 = 9;
}

fn type_of(kind: Kind) -> u8 {
    match kind {
        Kind::Bool => type_number::BOOL,
        Kind::Int => type_number::INTEGER,
        Kind::Double => type_number::DOUBLE,
        Kind::String => type_number::STRING,
        Kind::IntList => type_number::INTEGER_ARRAY,
        Kind::DoubleList => type_number::DOUBLE_ARRAY,
        Kind::StringList => type_number::STRING_ARRAY,
    }
}

fn from_message(m: &ParameterValue) -> Value {
    match m.type_ {
        type_number::BOOL => Value::Bool(m.bool_value),
        type_number::INTEGER => Value::Int(m.integer_value),
        type_number::DOUBLE => Value::Double(m.double_value),
        type_number::STRING => Value::String(m.string_value.clone()),
        type_number::BYTE_ARRAY => foreign_list(&m.byte_array_value, "byte list"),
        type_number::BOOL_ARRAY => foreign_list(&m.bool_array_value, "bool list"),
        type_number::INTEGER_ARRAY => Value::Ints(m.integer_array_value.clone()),
        type_number::DOUBLE_ARRAY => Value::Doubles(m.double_array_value.clone()),
        type_number::STRING_ARRAY => Value::Strings(m.string_array_value.clone()),
        type_number::NOT_SET => Value::Unset,
        _ => Value::Other("unknown type"),
    }
}

fn message(v: &Value) -> ParameterValue {
    let mut m = ParameterValue::default();
    m.type_ = match v {
        Value::Unset | Value::Other(_) => type_number::NOT_SET,
        Value::Bool(b) => {
            m.bool_value = *b;
            type_number::BOOL
        }
        Value::Int(i) => {
            m.integer_value = *i;
            type_number::INTEGER
        }
        Value::Double(x) => {
            m.double_value = *x;
            type_number::DOUBLE
        }
        Value::String(s) => {
            m.string_value = text(s);
            type_number::STRING
        }
        Value::Ints(v) => {
            m.integer_array_value = v.clone();
            type_number::INTEGER_ARRAY
        }
        Value::Doubles(v) => {
            m.double_array_value = v.clone();
            type_number::DOUBLE_ARRAY
        }
        Value::Strings(v) => {
            m.string_array_value = v.iter().map(|s| text(s)).collect();
            type_number::STRING_ARRAY
        }
    };
    m
}

fn parameter(name: &str, value: &Value) -> Parameter {
    Parameter { name: text(name), value: message(value) }
}

fn descriptor(name: &str, e: &Entry) -> ParameterDescriptor {
    let s = e.spec;
    let mut constraints = Vec::new();
    match s.allowed {
        Allowed::OneOf(names) => constraints.push(format!("One of: {}.", names.join(", "))),
        // A range message has no place for lists.
        Allowed::Ints(..) if s.kind == Kind::IntList => constraints.push(format!("Each {}.", s.range_text())),
        _ => {}
    }
    if !s.unit.is_empty() {
        constraints.push(format!("Unit: {}.", s.unit));
    }
    constraints.push(
        match s.when {
            When::Start => "Fixed at start.",
            When::Unarmed => "Changes only while unarmed.",
            When::Any => "Changes at any time.",
        }
        .into(),
    );
    let (mut floating_point_range, mut integer_range) = (Vec::new(), Vec::new());
    match (s.allowed, s.kind) {
        (Allowed::Doubles(from_value, to_value), Kind::Double) => {
            floating_point_range.push(FloatingPointRange { from_value, to_value, step: 0.0 });
        }
        (Allowed::Ints(from_value, to_value), Kind::Int) => {
            integer_range.push(IntegerRange { from_value, to_value, step: 0 });
        }
        _ => {}
    }
    ParameterDescriptor {
        name: text(name),
        type_: type_of(s.kind),
        description: if s.unit.is_empty() { s.about.into() } else { format!("{} [{}]", s.about, s.unit) },
        additional_constraints: constraints.join(" "),
        read_only: s.read_only(),
        dynamic_typing: false,
        floating_point_range,
        integer_range,
    }
}

/// The parameters of the running node, as the services see them.
pub struct Parameters {
    params: Params,
    node_name: String,
}

impl Parameters {
    /// The parameters of the node of that full name.
    pub fn new(params: Params, node_name: String) -> Self {
        Self { params, node_name }
    }

    /// Values by name; as elsewhere in ROS, one unknown name leaves the answer empty.
    pub fn get(&self, names: &[String]) -> Vec<ParameterValue> {
        self.each(names, |_, e| message(&e.value))
    }

    /// Types by name, likewise.
    pub fn types(&self, names: &[String]) -> Vec<u8> {
        self.each(names, |_, e| type_of(e.spec.kind))
    }

    /// Descriptors by name, likewise.
    pub fn describe(&self, names: &[String]) -> Vec<ParameterDescriptor> {
        self.each(names, descriptor)
    }

    fn each<T>(&self, names: &[String], f: impl Fn(&str, &Entry) -> T) -> Vec<T> {
        names.iter().map(|n| self.params.get(n).map(|e| f(n, e))).collect::<Option<_>>().unwrap_or_default()
    }

    /// Names under any of the prefixes, at most `depth` levels below them (0: all).
    pub fn list(&self, prefixes: &[String], depth: u64) -> ListParametersResult {
        let near = |rest: &str| depth == 0 || (rest.matches('.').count() as u64) < depth;
        let wanted = |name: &&str| {
            (prefixes.is_empty() && near(name))
                || prefixes.iter().any(|p| {
                    *name == p || name.strip_prefix(p.as_str()).and_then(|r| r.strip_prefix('.')).is_some_and(near)
                })
        };
        let names: Vec<String> = self.params.iter().map(|(n, _)| n).filter(wanted).map(text).collect();
        let mut found: Vec<String> =
            names.iter().filter_map(|n| n.rsplit_once('.')).map(|(prefix, _)| prefix.to_owned()).collect();
        found.sort();
        found.dedup();
        ListParametersResult { names, prefixes: found }
    }

    /// Sets each on its own, except that the two shares of the GPU, if both are there, are one change.
    pub fn set(&mut self, core: &Node, asked: &[Parameter]) -> (Vec<SetParametersResult>, Vec<Change>) {
        let shares: Vec<Parameter> = asked.iter().filter(|p| SHARES.contains(&p.name.as_str())).cloned().collect();
        let together = (shares.len() > 1).then(|| self.set_atomically(core, &shares));
        let mut changes = together.iter().flat_map(|(_, c)| c.clone()).collect::<Vec<_>>();
        let results = asked
            .iter()
            .map(|p| match &together {
                Some((result, _)) if SHARES.contains(&p.name.as_str()) => result.clone(),
                _ => {
                    let (result, more) = self.set_atomically(core, std::slice::from_ref(p));
                    changes.extend(more);
                    result
                }
            })
            .collect();
        (results, changes)
    }

    /// Sets all or, with the reason, none: neither the values nor the running core change unless both take them.
    pub fn set_atomically(&mut self, core: &Node, asked: &[Parameter]) -> (SetParametersResult, Vec<Change>) {
        let asked: Vec<(String, Value)> = asked.iter().map(|p| (p.name.clone(), from_message(&p.value))).collect();
        let mut next = self.params.clone();
        let outcome = next.set(&asked, core.status().mode.publishes()).map_err(|e| e.to_string()).and_then(|changes| {
            if !changes.is_empty() {
                core.apply(&next.settings()).map_err(|e| e.to_string())?;
            }
            Ok(changes)
        });
        match outcome {
            Ok(changes) => {
                self.params = next;
                for c in &changes {
                    let note = c.note.as_ref().map_or_else(String::new, |n| format!(" ({n})"));
                    tracing::info!("parameter {}: {} -> {}{note}", c.name, c.old, c.new);
                }
                (SetParametersResult { successful: true, reason: notes(&changes) }, changes)
            }
            Err(reason) => {
                tracing::warn!("{reason}");
                (SetParametersResult { successful: false, reason: text(&reason) }, Vec::new())
            }
        }
    }

    /// Takes limits from a robot description, or says why not. Only for an unarmed node.
    pub fn describe_robot(&mut self, core: &Node, urdf: &str) {
        let mut next = self.params.clone();
        let description = Description::read(urdf);
        let moving = description.joints.len();
        let outcome = next
            .describe(description)
            .map_err(|e| e.to_string())
            .and_then(|()| core.apply(&next.settings()).map_err(|e| e.to_string()));
        match outcome {
            Ok(()) => {
                let settings = next.settings();
                tracing::info!("robot_description: {moving} moving joints; parameters win over its limits");
                for joint in settings.joints.iter().filter(|j| !j.limits_from.is_empty()) {
                    tracing::info!("limits of joint '{}': {}", joint.name, joint.limits_from);
                }
                settings.safety.description_problems.iter().for_each(|problem| tracing::warn!("{problem}"));
                self.params = next;
            }
            Err(why) => tracing::error!("robot_description not used: {why}"),
        }
    }

    /// Takes over a value that the core took by another way.
    pub fn follow(&mut self, name: &str, value: Value) -> Vec<Change> {
        self.params.set(&[(name.into(), value)], false).unwrap_or_else(|e| {
            tracing::warn!("{e}");
            Vec::new()
        })
    }

    /// The event at start: every parameter is new.
    pub fn declared(&self, now: RosTime) -> ParameterEvent {
        let new_parameters = self.params.iter().map(|(n, e)| parameter(n, &e.value)).collect();
        ParameterEvent { stamp: stamp(now), node: text(&self.node_name), new_parameters, ..Default::default() }
    }

    /// The event of a change.
    pub fn changed(&self, now: RosTime, changes: &[Change]) -> ParameterEvent {
        let changed_parameters = changes.iter().map(|c| parameter(&c.name, &c.new)).collect();
        ParameterEvent { stamp: stamp(now), node: text(&self.node_name), changed_parameters, ..Default::default() }
    }
}

/// What moved by itself, for the one who asked.
fn notes(changes: &[Change]) -> String {
    let moved = changes.iter().filter_map(|c| Some(format!("{} {} {}", c.name, c.new, c.note.as_ref()?)));
    text(&moved.collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        let text = |s: &str| Value::String(s.into());
        let texts = |s: &str| Value::Strings(vec![s.into()]);
        let given = [
            ("checkpoint", text("/models/pi0")),
            ("policy_rate_hz", Value::Int(20)),
            ("camera_names", texts("wrist")),
            ("joint_names", texts("elbow")),
        ];
        let params = Params::from_overrides(given.map(|(n, v)| (n.to_owned(), v))).unwrap();
        Parameters::new(params, "/robot/pi0_mps".into())
    }

    #[test]
    fn lists_follow_prefix_and_depth() {
        let p = parameters();
        let all = p.list(&[], 0);
        assert!(all.names.contains(&"limits.elbow.max_velocity".to_owned()) && all.names.contains(&"seam".to_owned()));
        assert!(all.prefixes.contains(&"limits.elbow".to_owned()));
        assert!(p.list(&[], 1).names.iter().all(|n| !n.contains('.')));
        assert_eq!(p.list(&["limits.elbow".into()], 1).names.len(), 5);
        assert_eq!(p.list(&["limits".into()], 1).names.len(), 0, "they are two levels below");
        assert_eq!(p.list(&["limit".into()], 0).names.len(), 0, "a prefix is a whole word");
        assert_eq!(p.list(&["seam".into()], 1).names, ["seam"]);
    }

    #[test]
    fn descriptors_say_type_range_unit_and_when() {
        let p = parameters();
        let found = p.describe(&["control_rate_hz".into(), "seam".into(), "cpu_affinity".into()]);
        let [rate, seam, cores] = found.try_into().unwrap();
        assert!(rate.read_only && rate.type_ == type_number::DOUBLE && rate.description.ends_with("[Hz]"));
        let range = &rate.floating_point_range[0];
        assert_eq!((range.from_value, range.to_value, range.step), (1.0, 1000.0, 0.0));
        assert_eq!(seam.additional_constraints, "One of: rtc, crossfade, none. Changes only while unarmed.");
        assert!(!seam.read_only && seam.integer_range.is_empty());
        assert!(cores.integer_range.is_empty() && cores.additional_constraints.starts_with("Each 0 to 1023."));
    }

    #[test]
    fn every_value_survives_the_message_and_every_type_is_the_descriptors() {
        let p = parameters();
        for (name, e) in p.params.iter() {
            let m = message(&e.value);
            assert!(from_message(&m).same(&e.value), "{name}");
            assert_eq!(m.type_, descriptor(name, e).type_, "{name}");
        }
        let of_bools = |bool_array_value| {
            let m = ParameterValue { type_: type_number::BOOL_ARRAY, bool_array_value, ..Default::default() };
            Kind::StringList.coerce(from_message(&m))
        };
        assert_eq!(of_bools(vec![]), Ok(Value::Strings(vec![])), "ros2 param load sends lists without items as bools");
        assert!(of_bools(vec![true]).unwrap_err().contains("got bool list"));
        assert!(p.get(&["seam".into(), "no such".into()]).is_empty());
        assert_eq!(p.types(&["seam".into(), "seed".into()]), [type_number::STRING, type_number::INTEGER]);
        let event = p.declared(RosTime(7));
        assert_eq!((event.node.as_str(), event.stamp.nanosec), ("/robot/pi0_mps", 7));
        assert_eq!(event.new_parameters.len(), p.params.iter().count());
    }
}
