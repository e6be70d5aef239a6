//! Who publishes what this node listens to: r2r has no events of quality of service, so the graph is compared with
//! what each subscription asks for.

use std::time::{Duration, Instant};

use r2r::Node;
use r2r::qos::{DurabilityPolicy, ReliabilityPolicy};

use crate::node::{Inputs, Source};
use crate::params::choice::{Reliability, Transport};
use crate::params::{Qos, Settings};

/// How often the graph is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// One subscription.
struct Listener {
    of: Source,
    /// As the graph knows it.
    topic: String,
    of_type: &'static str,
    reliability: Reliability,
    /// The parameter that says so.
    parameter: &'static str,
    told: Option<String>,
}

/// Looks at the publishers of every input now and then, on the thread that spins the node.
pub struct InputWiring {
    listeners: Vec<Listener>,
    inputs: Inputs,
    due: Instant,
}

const IMAGE: &str = "sensor_msgs/msg/Image";
const COMPRESSED: &str = "sensor_msgs/msg/CompressedImage";

impl InputWiring {
    /// For the cameras and the joint states; `resolve` gives the name of a topic as the graph knows it.
    pub fn new(settings: &Settings, inputs: Inputs, resolve: impl Fn(&str) -> String) -> Self {
        let listener = |of, topic: &str, of_type, qos: Qos, parameter| Listener {
            of,
            topic: resolve(topic),
            of_type,
            reliability: qos.reliability,
            parameter,
            told: None,
        };
        let cameras = settings.inputs.cameras.iter().enumerate().map(|(i, c)| {
            let of_type = if c.transport == Transport::Raw { IMAGE } else { COMPRESSED };
            listener(Source::Camera(i), &c.topic, of_type, settings.inputs.images_qos, "qos.images.reliability")
        });
        let joint_states = listener(
            Source::JointStates,
            "joint_states",
            "sensor_msgs/msg/JointState",
            settings.inputs.joint_states_qos,
            "qos.joint_states.reliability",
        );
        let listeners = cameras.chain([joint_states]).collect();
        Self { listeners, inputs, due: Instant::now() + LOOK }
    }

    /// Tells the core what is wrong, when it is time to look again.
    pub fn look(&mut self, node: &Node) {
        if Instant::now() < self.due {
            return;
        }
        self.due = Instant::now() + LOOK;
        for listener in &mut self.listeners {
            let Some(found) = listener.problem(node) else { continue };
            if found != listener.told {
                self.inputs.wiring(listener.of, found.clone());
                listener.told = found;
            }
        }
    }
}

impl Listener {
    /// What is wrong with its publishers, if anything; `None` if the graph cannot be read.
    fn problem(&self, node: &Node) -> Option<Option<String>> {
        let publishers = node.get_publishers_info_by_topic(&self.topic, false).ok()?;
        let topic = &self.topic;
        if publishers.is_empty() {
            return Some(Some(format!("nobody publishes on {topic}")));
        }
        let mut problems = Vec::new();
        let mut heard = 0;
        for p in &publishers {
            let who = format!("{}/{}", p.node_namespace.trim_end_matches('/'), p.node_name);
            let best_effort = p.qos_profile.reliability == ReliabilityPolicy::BestEffort;
            if p.topic_type != self.of_type {
                let remedy = match (self.of_type, p.topic_type.as_str()) {
                    (IMAGE, COMPRESSED) => ": set the camera's transport to compressed",
                    (COMPRESSED, IMAGE) => ": set the camera's transport to raw, or its topic to the compressed one",
                    _ => "",
                };
                problems.push(format!("{who} publishes {} on {topic}, not {}{remedy}", p.topic_type, self.of_type));
            } else if best_effort && self.reliability == Reliability::Reliable {
                problems.push(format!(
                    "{who} publishes best_effort on {topic}, and {} is reliable: nothing of it arrives; set it to best_effort",
                    self.parameter
                ));
            } else {
                heard += 1;
            }
        }
        if problems.is_empty() || heard > 0 {
            return Some(None);
        }
        Some(Some(problems.join("; ")))
    }
}

/// Says once that a robot description cannot be heard, because it is not latched.
pub struct Latch {
    topic: String,
    due: Option<Instant>,
}

impl Latch {
    /// For the topic of that full name.
    pub fn new(topic: String) -> Self {
        Self { topic, due: Some(Instant::now() + LOOK) }
    }

    /// Looks, when it is time to.
    pub fn look(&mut self, node: &Node) {
        if self.due.is_none_or(|due| Instant::now() < due) {
            return;
        }
        self.due = Some(Instant::now() + LOOK);
        let publishers = node.get_publishers_info_by_topic(&self.topic, false).unwrap_or_default();
        let volatile = publishers.iter().find(|p| p.qos_profile.durability == DurabilityPolicy::Volatile);
        if let Some(p) = volatile {
            let who = format!("{}/{}", p.node_namespace.trim_end_matches('/'), p.node_name);
            let topic = &self.topic;
            tracing::warn!(
                "{who} publishes {topic} without durability transient_local: it is not heard; publish it latched"
            );
            self.due = None;
        }
    }
}
