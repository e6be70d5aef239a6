//! Who else is on the command topics: a controller must listen, and nobody else may command.

use std::time::{Duration, Instant};

use r2r::std_msgs::msg::Float64MultiArray;
use r2r::trajectory_msgs::msg::JointTrajectory;
use r2r::{Node, Publisher};

use crate::control::InputFault;
use crate::node::Inputs;

/// How often the graph is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What the middleware calls a node whose name it has not heard yet.
const UNKNOWN: &str = "_NODE_NAME_UNKNOWN_";

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

/// One output group.
pub struct Output {
    /// Its topic by the name that it has on the graph.
    pub topic: String,
    pub to: GroupPublisher,
}

/// Looks at the graph now and then, on the thread that spins the node.
pub struct Wiring {
    outputs: Vec<Output>,
    inputs: Inputs,
    due: Instant,
    told: Option<Found>,
}

/// What is wrong, and the topic and the other nodes that the texts will name.
#[derive(PartialEq)]
struct Found {
    fault: InputFault,
    output: usize,
    topic: String,
    others: Vec<String>,
}

impl Wiring {
    /// For the output groups in the parameters' order.
    pub fn new(outputs: Vec<Output>, inputs: Inputs) -> Self {
        Self { outputs, inputs, due: Instant::now(), told: None }
    }

    /// Tells the core what is wrong, when it is time to look again.
    pub fn look(&mut self, node: &Node) {
        // A listener that is found ends the refusal at once; everything else can wait.
        let alone = self.told.as_ref().is_some_and(|f| matches!(f.fault, InputFault::OutputUnconnected { .. }));
        if !alone && Instant::now() < self.due {
            return;
        }
        self.due = Instant::now() + LOOK;
        let found = self.unconnected().or_else(|| self.contested(node));
        if found == self.told {
            return;
        }
        if let Some(f) = &found {
            self.inputs.output_topic(f.output, &f.topic, f.others.clone());
        }
        self.inputs.outputs(found.as_ref().map(|f| f.fault));
        self.told = found;
    }

    /// A command topic that nobody listens to.
    fn unconnected(&self) -> Option<Found> {
        let output = self.outputs.iter().position(|o| o.to.listeners() == Some(0))?;
        let topic = self.outputs[output].topic.clone();
        Some(Found { fault: InputFault::OutputUnconnected { output }, output, topic, others: Vec::new() })
    }

    /// A command topic that somebody else publishes on too. Each is asked for by its name: r2r 0.9.7 reads past the
    /// end of the list of all topics where one has two types, which any node on the network can bring about.
    fn contested(&self, node: &Node) -> Option<Found> {
        let me = node.fully_qualified_name().ok()?;
        for (output, Output { topic, .. }) in self.outputs.iter().enumerate() {
            let publishers = node.get_publishers_info_by_topic(topic, false).ok()?;
            let names =
                publishers.iter().map(|p| format!("{}/{}", p.node_namespace.trim_end_matches('/'), p.node_name));
            let mut rivals: Vec<String> = names.collect();
            // A node of the same name is another one all the same: one publisher is this node's, not all of that name.
            if let Some(mine) = rivals.iter().position(|name| *name == me) {
                rivals.remove(mine);
            }
            if rivals.is_empty() {
                continue;
            }
            rivals.retain(|name| !name.ends_with(UNKNOWN));
            let mut others: Vec<String> =
                rivals.into_iter().map(|name| if name == me { format!("the other {name}") } else { name }).collect();
            others.sort();
            others.dedup();
            let fault = InputFault::OutputContested { output };
            return Some(Found { fault, output, topic: topic.clone(), others });
        }
        None
    }
}
