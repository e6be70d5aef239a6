//! Which topic of a recording is which input of the node.

use std::collections::{BTreeMap, HashMap};
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

/// A topic that the node listens to.
#[derive(Debug)]
struct Listener {
    input: Input,
    /// For people.
    what: String,
    /// In full.
    name: String,
    kinds: &'static [&'static str],
    /// The topic of another namespace that serves it.
    borrowed: Option<String>,
}

/// Where the messages of a recording go.
#[derive(Debug)]
pub struct Routes {
    listeners: Vec<Listener>,
    remap: Vec<(String, String)>,
    known: HashMap<Arc<Topic>, Option<Input>>,
    used: BTreeMap<String, u64>,
}

impl Routes {
    /// For a node of that name; `remap` holds `FROM:=TO`.
    pub fn new(settings: &Settings, node: &str, remap: &[String]) -> Result<Self, CliError> {
        let full = |topic: &str| absolute(topic, node);
        let remap = remap.iter().map(|rule| match rule.split_once(":=") {
            Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((full(from), full(to))),
            _ => Err(CliError::input(format!("--remap {rule}: write FROM:=TO, two topics"))),
        });
        let listener = |input, what: String, topic: &str, kinds: &'static [&'static str]| Listener {
            input,
            what,
            name: full(topic),
            kinds,
            borrowed: None,
        };
        let cameras = settings.inputs.cameras.iter().enumerate();
        let mut listeners: Vec<_> = cameras
            .map(|(i, c)| listener(Input::Camera(i), format!("camera '{}'", c.name), &c.topic, IMAGES))
            .collect();
        listeners.push(listener(Input::JointStates, "joint states".into(), "joint_states", &[JointState::TYPE]));
        listeners.push(listener(Input::Prompt, "prompt".into(), "~/prompt", &[Text::TYPE]));
        Ok(Self { listeners, remap: remap.collect::<Result<_, _>>()?, known: HashMap::new(), used: BTreeMap::new() })
    }

    /// Puts a message where it belongs; the inner error is one of the message alone.
    pub fn give(&mut self, record: &Record, inputs: &Inputs) -> Result<Result<(), BagError>, CliError> {
        let input = match self.known.get(&record.topic) {
            Some(input) => *input,
            None => {
                let input = self.find(&record.topic)?;
                self.known.insert(record.topic.clone(), input);
                input
            }
        };
        let Some(input) = input else { return Ok(Ok(())) };
        *self.used.entry(record.topic.name.clone()).or_default() += 1;
        Ok(put(input, record, inputs))
    }

    /// The input a topic serves: the one of that name, else one whose name it has in another namespace.
    fn find(&mut self, topic: &Topic) -> Result<Option<Input>, CliError> {
        let name = self.remap.iter().find(|(from, _)| *from == topic.name).map_or(&topic.name, |(_, to)| to);
        if let Some(l) = self.listeners.iter().find(|l| l.name == *name) {
            if !l.kinds.contains(&&*topic.kind) {
                return Err(CliError::input(format!(
                    "{} on {} is a {}, and the node takes {}",
                    l.what,
                    topic.name,
                    topic.kind,
                    l.kinds.join(" or ")
                )));
            }
            return Ok(Some(l.input));
        }
        let Some(l) =
            self.listeners.iter_mut().find(|l| l.kinds.contains(&&*topic.kind) && topic.name.ends_with(&*l.name))
        else {
            return Ok(None);
        };
        match &l.borrowed {
            Some(other) if *other != topic.name => Err(CliError::input(format!(
                "both {other} and {} could be the {}: say --name or --remap {}:={}",
                topic.name, l.what, topic.name, l.name
            ))),
            _ => {
                l.borrowed = Some(topic.name.clone());
                Ok(Some(l.input))
            }
        }
    }

    /// Topics that were used, with their messages.
    pub fn used(&self) -> Vec<(String, u64)> {
        self.used.iter().map(|(name, n)| (name.clone(), *n)).collect()
    }

    /// Why nothing came of a recording: what is missing and what it holds instead.
    pub fn missing(&self, topics: &BTreeMap<String, TopicCount>, waiting: Option<String>) -> String {
        let found: Vec<Input> = self.known.values().copied().flatten().collect();
        let missing: Vec<_> = (self.listeners.iter())
            .filter(|l| l.input != Input::Prompt && !found.contains(&l.input))
            .map(|l| format!("{} on {} ({})", l.what, l.name, l.kinds.join(" or ")))
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
