//! Which topic of a recording is which input of the node.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::CliError;
use crate::bag::message::{CompressedImage, Image, JointState, Text};
use crate::bag::{BagError, Message, Record, Topic, TopicCount};
use crate::model::Frame;
use crate::node::Inputs;
use crate::node::messages::absolute;
use crate::params::Settings;

/// Either is taken, whichever transport the parameters name: it is the same camera.
const IMAGES: &[&str] = &[Image::TYPE, CompressedImage::TYPE];

/// An input of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Input {
    Camera(usize),
    JointStates,
    Prompt,
}

/// A topic that is looked for in a recording.
#[derive(Debug)]
pub struct Wanted<I> {
    /// What it is to the program,
    pub input: I,
    /// and to people.
    pub what: String,
    /// In full.
    pub name: String,
    /// How the name ends where it is in another namespace.
    pub end: String,
    /// Types that are taken.
    pub kinds: &'static [&'static str],
}

impl<I> Wanted<I> {
    /// A topic of that full name, in whichever namespace.
    pub fn new(input: I, what: impl Into<String>, name: String, kinds: &'static [&'static str]) -> Self {
        Self { input, what: what.into(), end: name.clone(), name, kinds }
    }
}

/// Names given to topics by hand.
#[derive(Debug)]
pub struct Remap(Vec<(String, String)>);

impl Remap {
    /// From rules `FROM:=TO`, for a node of that name.
    pub fn new(rules: &[String], node: &str) -> Result<Self, CliError> {
        let rules = rules.iter().map(|rule| match rule.split_once(":=") {
            Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((absolute(from, node), absolute(to, node))),
            _ => Err(CliError::input(format!("--remap {rule}: write FROM:=TO, two topics"))),
        });
        rules.collect::<Result<_, _>>().map(Self)
    }

    fn of(&self, topic: &Topic) -> Option<&str> {
        self.0.iter().find(|(from, _)| *from == topic.name).map(|(_, to)| &**to)
    }
}

/// How near a topic's name is to the one looked for; the nearest topic is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    End,
    Name,
    ByHand,
}

/// Which topic of a recording is which that is wanted; two that are as near as each other are an error.
pub fn assign<I: Copy>(
    topics: &BTreeSet<Arc<Topic>>,
    wanted: &[Wanted<I>],
    remap: &Remap,
) -> Result<HashMap<Arc<Topic>, I>, CliError> {
    let mut near = Vec::new();
    for topic in topics {
        let by_hand = remap.of(topic);
        let name = by_hand.unwrap_or(&topic.name);
        if let Some(i) = wanted.iter().position(|w| w.name == name) {
            let w = &wanted[i];
            if !w.kinds.contains(&&*topic.kind) {
                let (what, taken) = (&w.what, w.kinds.join(" or "));
                return Err(CliError::input(format!(
                    "{} is a {}, and the {what} must be {taken}: say --remap {}:=/unused to leave it out",
                    topic.name, topic.kind, topic.name
                )));
            }
            near.push((i, if by_hand.is_some() { Match::ByHand } else { Match::Name }, topic));
        } else {
            // The longest end says most: /left/command is the /left/command of another namespace, not its /command.
            let ends = wanted.iter().enumerate();
            let ends = ends.filter(|(_, w)| name.ends_with(&*w.end) && w.kinds.contains(&&*topic.kind));
            near.extend(ends.max_by_key(|(_, w)| w.end.len()).map(|(i, _)| (i, Match::End, topic)));
        }
    }
    let mut found = HashMap::new();
    for (i, w) in wanted.iter().enumerate() {
        let of_this = || near.iter().filter(|(of, ..)| *of == i);
        let nearest = of_this().map(|(_, how, _)| *how).max();
        match *of_this().filter(|(_, how, _)| Some(*how) == nearest).map(|(.., topic)| *topic).collect::<Vec<_>>() {
            [] => {}
            [topic] => _ = found.insert(topic.clone(), w.input),
            [a, b, ..] => {
                let (a, b, what, name) = (&a.name, &b.name, &w.what, &w.name);
                return Err(CliError::input(format!(
                    "both {a} and {b} could be the {what}: say --name or --remap {b}:={name}"
                )));
            }
        }
    }
    Ok(found)
}

/// Where the messages of a recording go.
#[derive(Debug)]
pub struct Routes {
    wanted: Vec<Wanted<Input>>,
    found: HashMap<Arc<Topic>, Input>,
    used: BTreeMap<String, u64>,
}

impl Routes {
    /// Into a node of that name, from a recording of `topics`.
    pub fn new(
        settings: &Settings,
        node: &str,
        remap: &Remap,
        topics: &BTreeSet<Arc<Topic>>,
    ) -> Result<Self, CliError> {
        let full = |topic: &str| absolute(topic, node);
        let cameras = settings.inputs.cameras.iter().enumerate();
        let mut wanted: Vec<_> = cameras
            .map(|(i, c)| Wanted::new(Input::Camera(i), format!("camera '{}'", c.name), full(&c.topic), IMAGES))
            .collect();
        wanted.push(Wanted::new(Input::JointStates, "joint states", full("joint_states"), &[JointState::TYPE]));
        wanted.push(Wanted::new(Input::Prompt, "prompt", full("~/prompt"), &[Text::TYPE]));
        Ok(Self { found: assign(topics, &wanted, remap)?, wanted, used: BTreeMap::new() })
    }

    /// Puts a message where it belongs; an error is one of the message alone.
    pub fn give(&mut self, record: &Record, inputs: &Inputs) -> Result<(), BagError> {
        let Some(input) = self.found.get(&record.topic) else { return Ok(()) };
        *self.used.entry(record.topic.name.clone()).or_default() += 1;
        put(*input, record, inputs)
    }

    /// Topics that were used, with their messages.
    pub fn used(&self) -> Vec<(String, u64)> {
        self.used.iter().map(|(name, n)| (name.clone(), *n)).collect()
    }

    /// Why nothing came of a recording: what is missing and what it holds instead.
    pub fn missing(&self, topics: &BTreeMap<String, TopicCount>, waiting: Option<String>) -> String {
        let missing: Vec<_> = (self.wanted.iter())
            .filter(|w| w.input != Input::Prompt && self.found.values().all(|found| *found != w.input))
            .map(|w| format!("{} on {} ({})", w.what, w.name, w.kinds.join(" or ")))
            .collect();
        let has: Vec<_> = topics.iter().map(|(name, t)| format!("{name} ({}, {})", t.kind, t.messages)).collect();
        if missing.is_empty() {
            let waiting = waiting.unwrap_or_else(|| "it is too short for a first chunk".into());
            return format!("the node never became active: {waiting}");
        }
        let has = if has.is_empty() { "nothing".into() } else { has.join(", ") };
        format!(
            "the recording has no {}; it has {has}. Give the parameters it was made with, or --remap",
            missing.join(", no ")
        )
    }
}

fn put(input: Input, record: &Record, inputs: &Inputs) -> Result<(), BagError> {
    match input {
        Input::Camera(i) if record.topic.kind == CompressedImage::TYPE => {
            let m: CompressedImage = record.decode()?;
            inputs.frame(i, m.stamp, Frame::decode(&m.data));
        }
        Input::Camera(i) => {
            let m: Image = record.decode()?;
            let size = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
            let frame = Frame::new(size(m.width), size(m.height), size(m.step), &m.encoding, m.data);
            inputs.frame(i, m.stamp, frame);
        }
        Input::JointStates => {
            let m: JointState = record.decode()?;
            inputs.joints(m.stamp, &m.names, &m.positions);
        }
        Input::Prompt => {
            let Text(prompt) = record.decode()?;
            if let Err(e) = inputs.prompt(&prompt) {
                tracing::warn!("prompt left out: {e}");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What of `topics` serves `/joint_states` and the groups `/command` and `/left/command`, or the error.
    fn assigned(topics: &[&str], rules: &[&str]) -> Result<Vec<(String, usize)>, String> {
        let kind = |name: &str| if name.ends_with("command") { "numbers" } else { "states" };
        let topics = topics.iter().map(|n| Arc::new(Topic { name: (*n).into(), kind: kind(n).into() })).collect();
        let wanted = |(i, name): (usize, &str)| match i {
            0 => Wanted::new(i, "joint states", name.into(), &["states"]),
            _ => Wanted::new(i, format!("commands on {name}"), name.into(), &["numbers"]),
        };
        let wanted: Vec<_> =
            ["/joint_states", "/command", "/left/command"].into_iter().enumerate().map(wanted).collect();
        let rules: Vec<_> = rules.iter().map(|r| (*r).to_owned()).collect();
        let found = Remap::new(&rules, "/pi0_mps").and_then(|remap| assign(&topics, &wanted, &remap));
        let mut found: Vec<_> =
            found.map_err(|e| e.to_string())?.into_iter().map(|(topic, i)| (topic.name.clone(), i)).collect();
        found.sort();
        Ok(found)
    }

    #[test]
    fn the_full_name_is_taken_before_the_end_of_another_and_what_is_named_by_hand_before_both() {
        let one = |name: &str| Ok(vec![(name.to_owned(), 0)]);
        assert_eq!(assigned(&["/leader/joint_states", "/joint_states"], &[]), one("/joint_states"));
        assert_eq!(assigned(&["/joint_states", "/z/joint_states", "/a/joint_states"], &[]), one("/joint_states"));
        assert_eq!(assigned(&["/leader/joint_states"], &[]), one("/leader/joint_states"));
        let two = ["/a/joint_states", "/b/joint_states"];
        let e = assigned(&two, &[]).unwrap_err();
        assert!(e.contains("both /a/joint_states and /b/joint_states could be the joint states"), "{e}");
        // The remedy that is offered, and the other way to it.
        assert!(e.ends_with("--remap /b/joint_states:=/joint_states"), "{e}");
        assert_eq!(assigned(&two, &["/b/joint_states:=/joint_states"]), one("/b/joint_states"));
        assert_eq!(assigned(&two, &["/b/joint_states:=/unused"]), one("/a/joint_states"));
        assert_eq!(assigned(&["/joint_states", "/other"], &["/other:=/joint_states"]), one("/other"));
    }

    #[test]
    fn a_topic_whose_name_ends_with_two_serves_the_longer() {
        let both = |a: &str, b: &str| Ok(vec![(a.to_owned(), 1), (b.to_owned(), 2)]);
        assert_eq!(assigned(&["/command", "/left/command"], &[]), both("/command", "/left/command"));
        assert_eq!(assigned(&["/r/command", "/r/left/command"], &[]), both("/r/command", "/r/left/command"));
        let e = assigned(&["/r/left/command", "/s/left/command"], &[]).unwrap_err();
        assert!(e.contains("could be the commands on /left/command"), "{e}");
    }
}
