//! Who else is on the command topics: a controller must listen, and nobody else may command.

use std::time::{Duration, Instant};

use r2r::std_msgs::msg::Float64MultiArray;
use r2r::trajectory_msgs::msg::JointTrajectory;
use r2r::{Node, Publisher};

use crate::control::InputFault;
use crate::node::Inputs;

/// How often the graph is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What commands are made of.
const TYPES: [&str; 2] = ["trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"];

/// One command topic's publisher.
#[derive(Clone)]
pub enum GroupPublisher {
    Trajectory(Publisher<JointTrajectory>),
    Command(Publisher<Float64MultiArray>),
}

impl GroupPublisher {
    fn listeners(&self) -> Option<usize> {
        match self {
            Self::Trajectory(to) => to.get_inter_process_subscription_count(),
            Self::Command(to) => to.get_inter_process_subscription_count(),
        }
        .ok()
    }
}

/// Looks at the graph now and then, on the thread that spins the node.
pub struct Wiring {
    outputs: Vec<(String, GroupPublisher)>,
    inputs: Inputs,
    due: Instant,
    told: Option<InputFault>,
}

impl Wiring {
    /// For output groups with their topics as the parameters give them, in the parameters' order.
    pub fn new(outputs: Vec<(String, GroupPublisher)>, inputs: Inputs) -> Self {
        Self { outputs, inputs, due: Instant::now(), told: None }
    }

    /// Tells the core what is wrong, when it is time to look again.
    pub fn look(&mut self, node: &Node) {
        // A listener that is found ends the refusal at once; everything else can wait.
        let alone = matches!(self.told, Some(InputFault::OutputUnconnected { .. }));
        if !alone && Instant::now() < self.due {
            return;
        }
        self.due = Instant::now() + LOOK;
        let unconnected = self.outputs.iter().position(|(_, to)| to.listeners() == Some(0));
        let fault = match unconnected {
            Some(output) => Some(InputFault::OutputUnconnected { output }),
            None => self.contested(node),
        };
        if fault != self.told {
            self.told = fault;
            self.inputs.outputs(fault);
        }
    }

    /// A command topic that somebody else publishes on too. r2r does not say what a topic was remapped to: those of
    /// this node are found by their publisher.
    fn contested(&self, node: &Node) -> Option<InputFault> {
        let (me, space) = (node.name().ok()?, node.namespace().ok()?);
        let private = |topic: &str| topic.replacen('~', &format!("{}/{me}", space.trim_end_matches('/')), 1);
        let topics = node.get_topic_names_and_types().ok()?;
        for (topic, _) in topics.iter().filter(|(_, of)| of.iter().any(|t| TYPES.contains(&t.as_str()))) {
            let publishers = node.get_publishers_info_by_topic(topic, false).ok()?;
            let mine = publishers.iter().filter(|p| p.node_name == me && p.node_namespace == space).count();
            if mine == 0 || publishers.len() == 1 || *topic == private("~/action_chunk") {
                continue;
            }
            let output = self.outputs.iter().position(|(given, _)| *topic == private(given)).unwrap_or(0);
            let fault = InputFault::OutputContested { output };
            if self.told != Some(fault) {
                let others: Vec<_> = (publishers.iter())
                    .map(|p| format!("{}/{}", p.node_namespace.trim_end_matches('/'), p.node_name))
                    .collect();
                tracing::error!("{} nodes publish on {topic}: {}", others.len(), others.join(", "));
            }
            return Some(fault);
        }
        None
    }
}
