//! Parameters: one table ([`TABLE`]), values checked against it ([`Params`]), and the typed form that the rest of the
//! program uses ([`Settings`]). No ROS here.

pub mod choice;
mod names;
mod rules;
mod settings;
mod table;
mod text;
pub mod urdf;
mod value;
pub mod yaml;

use std::collections::{BTreeMap, BTreeSet};

pub use settings::{
    Camera, Chunks, Gpu, Inputs, Joint, Model, OutputGroup, Process, Qos, Recorder, Safety, Settings, Timing,
};
pub use table::{Allowed, DefaultValue, ParamSpec, Placeholder, TABLE, When, spec};
pub use text::{default_yaml, help_table, markdown_table, params_file};
use urdf::Description;
pub use value::{Kind, ParamError, Value};

/// Validated values of every parameter of this robot.
#[derive(Debug, Clone)]
pub struct Params {
    entries: BTreeMap<String, Entry>,
    /// Limits for joints whose parameters give none.
    description: Description,
}

/// The shares of encoder and decoder of the GPU, which are kept together.
pub const SHARES: [&str; 2] = ["mps_encoder_percentage", "mps_decoder_percentage"];

/// One parameter of this robot: a row of the table, with the name filled in.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its row.
    pub spec: &'static ParamSpec,
    /// Its value, of the row's kind.
    pub value: Value,
}

/// One value that changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The parameter.
    pub name: String,
    /// Before.
    pub old: Value,
    /// Now.
    pub new: Value,
    /// Why it moved if nobody asked for it.
    pub note: Option<String>,
}

impl Params {
    /// The parameters of a robot from what the user gave; everything else has its default. Later overrides of the same
    /// name win. On failure, every problem that could be found.
    pub fn from_overrides(overrides: impl IntoIterator<Item = (String, Value)>) -> Result<Self, Vec<ParamError>> {
        let overrides: BTreeMap<String, Value> = overrides.into_iter().collect();
        let lists = Placeholder::ALL.map(|p| (p, given_names(p, &overrides)));
        let mut errors = Vec::new();
        let mut params = declare(&lists);
        let mut missing: BTreeSet<String> = params
            .entries
            .iter()
            .filter(|(name, e)| e.spec.default == DefaultValue::Required && !overrides.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for (name, value) in &overrides {
            match params.checked(name, value.clone()) {
                Ok(value) => {
                    if let Some(e) = params.entries.get_mut(name) {
                        e.value = value;
                    }
                }
                Err(e) => {
                    missing.remove(name);
                    errors.push(e);
                }
            }
        }
        errors.extend(missing.iter().map(|name| {
            let about = params.entries.get(name).map_or("", |e| e.spec.about);
            ParamError::new(name, format!("is required and not given. {about}"))
        }));
        let given: Vec<&str> = overrides.keys().map(String::as_str).collect();
        if let Err(e) = params.balance_shares(&given) {
            errors.push(e);
        }
        // A rule has nothing to say about a value that is already refused.
        let refused: BTreeSet<String> = errors.iter().map(|e: &ParamError| e.name.clone()).collect();
        errors.extend(rules::broken(&params).into_iter().filter(|e| !refused.contains(&e.name)));
        if errors.is_empty() { Ok(params) } else { Err(errors) }
    }

    /// Changes a running node's parameters: all of them or, on error, none. `armed` says whether the robot is under
    /// control now. Returns what changed, also what moved by itself; setting the value that is already there is fine
    /// for every parameter.
    pub fn set(&mut self, changes: &[(String, Value)], armed: bool) -> Result<Vec<Change>, ParamError> {
        let mut next = self.clone();
        let mut names: Vec<&str> = Vec::new();
        for (name, value) in changes {
            if names.contains(&name.as_str()) {
                return Err(ParamError::new(name, "is given twice in one request"));
            }
            names.push(name);
            if *value == Value::Unset {
                return Err(ParamError::new(name, "cannot be removed"));
            }
            let value = self.checked(name, value.clone())?;
            let Some(entry) = next.entries.get_mut(name) else { continue };
            if entry.value.same(&value) {
                continue;
            }
            match entry.spec.when {
                When::Start => {
                    let reason =
                        format!("is read-only; it is {} since start. Restart the node to change it", entry.value);
                    return Err(ParamError::new(name, reason));
                }
                When::Unarmed if armed => {
                    return Err(ParamError::new(name, "cannot change while armed; disarm first (~/enable false)"));
                }
                _ => entry.value = value,
            }
        }
        // Both shares given again as they are is no change, whatever their sum.
        let moved = if next.shares() == self.shares() { None } else { next.balance_shares(&names)? };
        if let Some(e) = rules::broken(&next).into_iter().next() {
            return Err(e);
        }
        let changes = self
            .entries
            .iter()
            .zip(next.entries.values())
            .filter(|((_, old), new)| !old.value.same(&new.value))
            .map(|((name, old), new)| Change {
                name: name.clone(),
                old: old.value.clone(),
                new: new.value.clone(),
                note: moved.as_ref().filter(|(n, _)| n == name).map(|(_, why)| why.clone()),
            })
            .collect();
        *self = next;
        Ok(changes)
    }

    /// Takes limits of positions and velocities from a robot description where no parameter gives them, in place of
    /// those of the one before. On error nothing changes.
    pub fn describe(&mut self, description: Description) -> Result<(), ParamError> {
        let next = Self { description, ..self.clone() };
        if let Some(e) = rules::broken(&next).into_iter().next() {
            return Err(e);
        }
        *self = next;
        Ok(())
    }

    /// A limit of a joint: the parameter if it is given, else what the robot description says; NaN if neither. Also
    /// whether it is the description's.
    fn limit(&self, joint: &str, limit: &str) -> (f64, bool) {
        let given = self.get(&format!("limits.{joint}.{limit}")).and_then(|e| e.value.as_double()).unwrap_or(f64::NAN);
        if !given.is_nan() {
            return (given, false);
        }
        let of = self.description.joints.get(joint).copied().unwrap_or_default();
        let described = match limit {
            "min_position" => of.positions.map(|p| p[0]),
            "max_position" => of.positions.map(|p| p[1]),
            "max_velocity" => of.max_velocity,
            _ => None,
        };
        (described.unwrap_or(f64::NAN), described.is_some())
    }

    /// What the robot description does not give, for joints that need it, and what is wrong with it.
    fn description_problems(&self) -> Vec<String> {
        let described = &self.description;
        let mut problems = described.problems.clone();
        if described.joints.is_empty() {
            return problems;
        }
        for joint in self.names(Placeholder::Joint) {
            let missing: Vec<_> = ["min_position", "max_position", "max_velocity"]
                .into_iter()
                .filter(|limit| self.limit(joint, limit).0.is_nan())
                .collect();
            if !described.joints.contains_key(joint) && !missing.is_empty() {
                problems.push(format!("robot_description has no joint '{joint}', and no parameters give its limits"));
            } else if !missing.is_empty() {
                let missing = missing.join(", ");
                problems
                    .push(format!("robot_description gives no {missing} for joint '{joint}': set limits.{joint}.*"));
            }
        }
        problems
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Every parameter, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(n, e)| (n.as_str(), e))
    }

    /// The typed form.
    pub fn settings(&self) -> Settings {
        Settings::read(self)
    }

    /// The error for a name that no parameter has, with the nearest one that exists.
    pub fn unknown(&self, name: &str) -> ParamError {
        let near = names::nearest(name, self.entries.keys().map(String::as_str));
        let hint = near.map_or_else(String::new, |n| format!("; did you mean '{n}'?"));
        let reason = match TABLE.iter().find_map(|s| Some((s.placeholder()?, captured(s, name)?))) {
            Some((p, got)) => {
                format!("there is no '{got}' in {} {}{hint}", p.list(), Value::Strings(self.names(p).to_vec()))
            }
            None => format!("is not a parameter of this node{hint}"),
        };
        ParamError::new(name, reason)
    }

    /// `value` as the parameter of that name takes it.
    fn checked(&self, name: &str, value: Value) -> Result<Value, ParamError> {
        let entry = self.entries.get(name).ok_or_else(|| self.unknown(name))?;
        let value = entry.spec.kind.coerce(value).map_err(|reason| ParamError::new(name, reason))?;
        entry.spec.check(&value).map_err(|reason| ParamError::new(name, reason))?;
        Ok(value)
    }

    fn names(&self, p: Placeholder) -> &[String] {
        self.entries.get(p.list()).and_then(|e| e.value.as_strings()).unwrap_or_default()
    }

    fn shares(&self) -> [i64; 2] {
        SHARES.map(|name| self.entries.get(name).and_then(|e| e.value.as_int()).unwrap_or_default())
    }

    /// Keeps the two shares of the GPU together: one set alone past a sum of 100 moves the other to the complement; both
    /// set are taken as they are. Returns the one that moved, and why.
    fn balance_shares(&mut self, set: &[&str]) -> Result<Option<(String, String)>, ParamError> {
        let (one, other) = match SHARES.map(|s| set.contains(&s)) {
            [true, false] => (SHARES[0], SHARES[1]),
            [false, true] => (SHARES[1], SHARES[0]),
            _ => return Ok(None),
        };
        let percent = self.shares();
        let (given, rest) = if one == SHARES[0] { (percent[0], percent[1]) } else { (percent[1], percent[0]) };
        if given + rest <= 100 {
            return Ok(None);
        }
        if given >= 100 {
            let reason = format!("{given} % leaves nothing for {other}; use at most 99, or set both in one request");
            return Err(ParamError::new(one, reason));
        }
        if let Some(e) = self.entries.get_mut(other) {
            e.value = Value::Int(100 - given);
        }
        Ok(Some((other.into(), format!("moved to the complement of {one} = {given} %"))))
    }
}

/// The names a placeholder stands for, as far as they can be read; what is wrong with them is found later.
fn given_names(p: Placeholder, overrides: &BTreeMap<String, Value>) -> Vec<String> {
    match (overrides.get(p.list()), spec(p.list()).map(|s| s.default)) {
        (Some(Value::Strings(v)), _) => v.clone(),
        (None, Some(DefaultValue::Strings(v))) => v.iter().map(|s| (*s).into()).collect(),
        _ => Vec::new(),
    }
}

/// Every parameter of a robot with these names, at its default; a required one is empty until it is given.
fn declare(lists: &[(Placeholder, Vec<String>); 3]) -> Params {
    let of = |p: Placeholder| lists.iter().find(|(q, _)| *q == p).map_or(&[][..], |(_, v)| v);
    let joints = of(Placeholder::Joint);
    let mut entries = BTreeMap::new();
    for spec in TABLE {
        let (token, names) = match spec.placeholder() {
            Some(p) => (p.token(), of(p)),
            None => ("", &[String::new()][..]),
        };
        for (position, name) in names.iter().enumerate() {
            let filled =
                |template: &str| if token.is_empty() { template.into() } else { template.replace(token, name) };
            let value = match spec.default {
                DefaultValue::Required => empty(spec.kind),
                DefaultValue::Bool(b) => Value::Bool(b),
                DefaultValue::Int(i) => Value::Int(i),
                DefaultValue::Double(x) => Value::Double(x),
                DefaultValue::String(t) => Value::String(filled(t)),
                DefaultValue::Strings(v) => Value::Strings(v.iter().map(|s| (*s).into()).collect()),
                DefaultValue::Empty => empty(spec.kind),
                DefaultValue::JointPosition => Value::Int(i64::try_from(position).unwrap_or(i64::MAX)),
                DefaultValue::AllJoints => Value::Strings(joints.to_vec()),
            };
            entries.insert(filled(spec.name), Entry { spec, value });
        }
    }
    Params { entries, description: Description::default() }
}

fn empty(kind: Kind) -> Value {
    match kind {
        Kind::Bool => Value::Bool(false),
        Kind::Int => Value::Int(0),
        Kind::Double => Value::Double(f64::NAN),
        Kind::String => Value::String(String::new()),
        Kind::StringList => Value::Strings(Vec::new()),
        Kind::DoubleList => Value::Doubles(Vec::new()),
        Kind::IntList => Value::Ints(Vec::new()),
    }
}

/// What stands at the placeholder of `spec` in `name`, if the rest fits.
fn captured<'a>(spec: &ParamSpec, name: &'a str) -> Option<&'a str> {
    let (before, after) = spec.name.split_once(spec.placeholder()?.token())?;
    name.strip_prefix(before)?.strip_suffix(after).filter(|s| !s.is_empty())
}
