//! Publishers of commands and chunks; the core calls them on its publisher thread.

use std::time::Duration;

use r2r::std_msgs::msg::{Float64MultiArray, Header};
use r2r::trajectory_msgs::msg::{JointTrajectory, JointTrajectoryPoint};
use r2r::{Publisher, QosProfile};

use super::convert::{duration, stamp, text};
use super::failure::{Refusal, middleware};
use super::wiring::GroupPublisher;
use crate::clock::RosTime;
use crate::control::Window;
use crate::control::chunk::ActionChunk;
use crate::node::Outputs;
use crate::params::Settings;
use crate::params::choice::OutputKind;

/// All command topics and `~/action_chunk`.
pub struct RosOutputs {
    groups: Vec<Group>,
    joint_names: Vec<String>,
    chunks: Publisher<JointTrajectory>,
    failures: u64,
}

/// One command topic.
struct Group {
    names: Vec<String>,
    joints: Vec<usize>,
    to: GroupPublisher,
}

impl RosOutputs {
    /// Advertises them.
    pub fn advertise(node: &mut r2r::Node, settings: &Settings) -> Result<Self, Refusal> {
        let newest = QosProfile::default().keep_last(1).reliable();
        let joint_names: Vec<String> = settings.joints.iter().map(|j| text(&j.name)).collect();
        let mut groups = Vec::new();
        for g in &settings.outputs {
            let doing = || middleware(format!("advertising output '{}' on '{}'", g.name, g.topic));
            let to = match g.kind {
                OutputKind::Trajectory => {
                    GroupPublisher::Trajectory(node.create_publisher(&g.topic, newest.clone()).map_err(doing())?)
                }
                OutputKind::Command => {
                    GroupPublisher::Command(node.create_publisher(&g.topic, newest.clone()).map_err(doing())?)
                }
            };
            let names = g.joints.iter().filter_map(|j| joint_names.get(*j).cloned()).collect();
            groups.push(Group { names, joints: g.joints.clone(), to });
        }
        let chunks = node
            .create_publisher("~/action_chunk", QosProfile::default().keep_last(10).reliable())
            .map_err(middleware("advertising '~/action_chunk'"))?;
        Ok(Self { groups, joint_names, chunks, failures: 0 })
    }

    /// The publisher of each group, in the parameters' order.
    pub fn publishers(&self) -> Vec<GroupPublisher> {
        self.groups.iter().map(|g| g.to.clone()).collect()
    }

    /// Says that a message did not leave; less and less often.
    fn count(&mut self, topic: &str, result: r2r::Result<()>) {
        if let Err(e) = result {
            self.failures += 1;
            if self.failures.is_power_of_two() {
                tracing::error!("publishing {topic} failed {} times: {e}", self.failures);
            }
        }
    }
}

impl Outputs for RosOutputs {
    fn trajectory(&mut self, w: &Window) {
        // The last gate before the robot: controllers do not look for NaN.
        let values = (0..w.points()).flat_map(|i| w.positions(i).iter().chain(w.velocities(i)));
        if let Some(bad) = values.into_iter().find(|x| !x.is_finite()) {
            self.failures += 1;
            if self.failures.is_power_of_two() {
                tracing::error!("a command held {bad} and was not published ({} so far)", self.failures);
            }
            return;
        }
        for i in 0..self.groups.len() {
            let result = self.groups[i].publish(w);
            self.count("a command", result);
        }
    }

    fn chunk(&mut self, c: &ActionChunk) {
        let points = c.positions.chunks_exact(c.joints.max(1)).enumerate();
        let due = |i: usize| Duration::try_from_secs_f64(i as f64 * c.dt).unwrap_or_default();
        let points = points.map(|(i, p)| point(p.to_vec(), Vec::new(), due(i))).collect();
        let result = self.chunks.publish(&trajectory(c.state_stamp, self.joint_names.clone(), points));
        self.count("~/action_chunk", result);
    }
}

impl Group {
    fn publish(&self, w: &Window) -> r2r::Result<()> {
        if w.points() == 0 {
            return Ok(()); // controllers refuse a trajectory without points
        }
        match &self.to {
            GroupPublisher::Trajectory(to) => {
                let points = (0..w.points())
                    .map(|i| point(self.pick(w.positions(i)), self.pick(w.velocities(i)), w.time_from_start(i)));
                to.publish(&trajectory(w.start(), self.names.clone(), points.collect()))
            }
            GroupPublisher::Command(to) => {
                to.publish(&Float64MultiArray { data: self.pick(w.command()), ..Default::default() })
            }
        }
    }

    /// The values of this group's joints, in its order.
    fn pick(&self, row: &[f64]) -> Vec<f64> {
        self.joints.iter().filter_map(|j| row.get(*j).copied()).collect()
    }
}

fn trajectory(at: RosTime, joint_names: Vec<String>, points: Vec<JointTrajectoryPoint>) -> JointTrajectory {
    JointTrajectory { header: Header { stamp: stamp(at), frame_id: String::new() }, joint_names, points }
}

fn point(positions: Vec<f64>, velocities: Vec<f64>, at: Duration) -> JointTrajectoryPoint {
    JointTrajectoryPoint {
        positions,
        velocities,
        accelerations: Vec::new(),
        effort: Vec::new(),
        time_from_start: duration(at),
    }
}
