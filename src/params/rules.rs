//! Rules between parameters: what no single row of the table can say.

use std::collections::BTreeMap;

use super::{ParamError, Params, Placeholder, Value};
use crate::engine::Device;
use crate::engine::partition::Backend;

/// Every rule that these values break.
pub fn broken(p: &Params) -> Vec<ParamError> {
    let mut errors = Vec::new();
    for placeholder in Placeholder::ALL {
        names_are_unique(p, placeholder, &mut errors);
    }
    if !errors.is_empty() {
        return errors; // what hangs on the names would only repeat it
    }
    something_is_given(p, &mut errors);
    topics_are_valid(p, &mut errors);
    indices_are_unique(p, &mut errors);
    scales_are_not_zero(p, &mut errors);
    groups_cover_the_joints(p, &mut errors);
    known_joints(p, "action_absolute_joints", &mut errors);
    limits_are_ordered(p, &mut errors);
    the_window_spans_a_period(p, &mut errors);
    device_is_one(p, &mut errors);
    shares_fit_the_partition(p, &mut errors);
    errors
}

fn strings<'a>(p: &'a Params, name: &str) -> &'a [String] {
    p.get(name).and_then(|e| e.value.as_strings()).unwrap_or_default()
}

fn string<'a>(p: &'a Params, name: &str) -> &'a str {
    p.get(name).and_then(|e| e.value.as_str()).unwrap_or_default()
}

fn double(p: &Params, name: &str) -> f64 {
    p.get(name).and_then(|e| e.value.as_double()).unwrap_or(f64::NAN)
}

fn names_are_unique(p: &Params, placeholder: Placeholder, errors: &mut Vec<ParamError>) {
    let list = placeholder.list();
    let names = strings(p, list);
    if names.is_empty() {
        errors.push(ParamError::new(list, "is empty; name at least one"));
    }
    for (i, name) in names.iter().enumerate() {
        if name.trim().is_empty() {
            errors.push(ParamError::new(list, format!("name {i} is empty")));
        } else if names[..i].contains(name) {
            errors.push(ParamError::new(list, format!("'{name}' stands twice")));
        }
    }
}

fn something_is_given(p: &Params, errors: &mut Vec<ParamError>) {
    if string(p, "checkpoint").is_empty() {
        errors.push(ParamError::new("checkpoint", "is empty; give the folder of the policy"));
    }
}

fn topics_are_valid(p: &Params, errors: &mut Vec<ParamError>) {
    let mut used: BTreeMap<&str, String> = BTreeMap::new();
    for (placeholder, family) in [(Placeholder::Camera, "cameras"), (Placeholder::Group, "outputs")] {
        for name in strings(p, placeholder.list()) {
            let param = format!("{family}.{name}.topic");
            let Some(topic) = p.get(&param).and_then(|e| e.value.as_str()) else { continue };
            if let Err(why) = valid_topic(topic) {
                errors.push(ParamError::new(&param, format!("\"{topic}\" is not a topic name: {why}")));
            }
            if let Some(first) = used.insert(topic, param.clone()) {
                errors.push(ParamError::new(&param, format!("\"{topic}\" is the topic of {first} too")));
            }
        }
    }
}

/// The rules of ROS 2 for topic names, as far as a user can break them.
fn valid_topic(topic: &str) -> Result<(), String> {
    let path = topic.strip_prefix("~/").or(topic.strip_prefix('/')).unwrap_or(topic);
    for token in path.split('/') {
        if token.is_empty() {
            return Err("a part between slashes is empty".into());
        }
        if token.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(format!("'{token}' starts with a digit"));
        }
        if let Some(c) = token.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '_')) {
            return Err(format!("'{c}' is not a letter, digit or underscore"));
        }
    }
    Ok(())
}

fn indices_are_unique(p: &Params, errors: &mut Vec<ParamError>) {
    let mut used: BTreeMap<i64, String> = BTreeMap::new();
    for joint in strings(p, "joint_names") {
        let param = format!("joints.{joint}.index");
        let Some(index) = p.get(&param).and_then(|e| e.value.as_int()) else { continue };
        if let Some(first) = used.insert(index, param.clone()) {
            errors.push(ParamError::new(&param, format!("{index} is the index of {first} too")));
        }
    }
}

fn scales_are_not_zero(p: &Params, errors: &mut Vec<ParamError>) {
    for joint in strings(p, "joint_names") {
        let param = format!("joints.{joint}.scale");
        if double(p, &param) == 0.0 {
            errors.push(ParamError::new(&param, "0.0 cannot be undone; use a scale other than zero"));
        }
    }
}

fn groups_cover_the_joints(p: &Params, errors: &mut Vec<ParamError>) {
    let mut group_of: BTreeMap<&str, String> = BTreeMap::new();
    for group in strings(p, "outputs.names") {
        let param = format!("outputs.{group}.joints");
        known_joints(p, &param, errors);
        let joints = strings(p, &param);
        if joints.is_empty() {
            errors.push(ParamError::new(&param, "is empty; a group needs a joint"));
        }
        for joint in joints {
            if let Some(first) = group_of.insert(joint, param.clone()) {
                let place = if first == param { "twice here".into() } else { format!("in {first} too") };
                errors.push(ParamError::new(&param, format!("joint '{joint}' stands {place}; one group a joint")));
            }
        }
    }
    let free: Vec<&str> =
        strings(p, "joint_names").iter().map(String::as_str).filter(|j| !group_of.contains_key(j)).collect();
    if !free.is_empty() {
        let reason = format!("no outputs.<group>.joints holds {}; every joint needs one group", free.join(", "));
        errors.push(ParamError::new("outputs.names", reason));
    }
}

fn known_joints(p: &Params, param: &str, errors: &mut Vec<ParamError>) {
    let known = strings(p, "joint_names");
    for joint in strings(p, param).iter().filter(|j| !known.contains(j)) {
        let near = super::names::nearest(joint, known.iter().map(String::as_str));
        let hint = near.map_or_else(String::new, |n| format!("; did you mean '{n}'?"));
        errors.push(ParamError::new(param, format!("joint '{joint}' is not in joint_names{hint}")));
    }
}

fn limits_are_ordered(p: &Params, errors: &mut Vec<ParamError>) {
    for joint in strings(p, "joint_names") {
        let param = format!("limits.{joint}.min_position");
        let ((min, described_min), (max, described_max)) =
            (p.limit(joint, "min_position"), p.limit(joint, "max_position"));
        if min >= max {
            let source = |described| if described { " of the robot description" } else { "" };
            let (from, to) = (source(described_min), source(described_max));
            let (min, max) = (Value::Double(min), Value::Double(max));
            let reason = format!("{min}{from} is not below limits.{joint}.max_position = {max}{to}");
            errors.push(ParamError::new(&param, reason));
        }
    }
}

fn the_window_spans_a_period(p: &Params, errors: &mut Vec<ParamError>) {
    let (window, period) = (double(p, "output_window_ms"), 1000.0 / double(p, "control_rate_hz"));
    if window < period {
        let reason = format!("{window} ms is shorter than one control period of {period} ms");
        errors.push(ParamError::new("output_window_ms", reason));
    }
}

fn device_is_one(p: &Params, errors: &mut Vec<ParamError>) {
    let device = string(p, "device");
    if Device::from_name(device).is_none() {
        errors.push(ParamError::new("device", format!("\"{device}\" is not one of auto, cpu, cuda:N")));
    }
}

fn shares_fit_the_partition(p: &Params, errors: &mut Vec<ParamError>) {
    let percent = |name| p.get(name).and_then(|e| e.value.as_int()).unwrap_or_default();
    let (encoder, decoder) = (percent("mps_encoder_percentage"), percent("mps_decoder_percentage"));
    if string(p, "partition") == Backend::Green.name() && encoder + decoder > 100 {
        let reason = format!(
            "{encoder} % and mps_decoder_percentage {decoder} % are more than the GPU has, and shares of partition \
             green cannot overlap; use at most 100 % in sum"
        );
        errors.push(ParamError::new("mps_encoder_percentage", reason));
    }
}
