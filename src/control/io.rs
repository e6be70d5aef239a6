//! What goes into a tick and what comes out of it.

use super::chunk::ActionChunk;
use super::joints::{JointVector, MAX_JOINTS};
use super::mode::Mode;
use super::reason::{ChunkRefusal, InputHealth, Reason, Refusal};
use crate::clock::{Monotonic, RosTime};

/// What the rest of the node can do for the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lifecycle {
    /// No policy.
    #[default]
    Unconfigured,
    /// A policy that is warming up, or a node that is inactive.
    Warmup,
    /// Inference runs.
    Ready,
    /// Inference, or another part that is needed, has failed.
    Failed,
}

/// What the operator asked for since the last tick. Stop wins over reset, disable over enable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Requests {
    /// Arm.
    pub enable: bool,
    /// Disarm.
    pub disable: bool,
    /// Stop, latched.
    pub stop: bool,
    /// Release a stop or a fault.
    pub reset: bool,
}

/// The newest joint state, merged from all its publishers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Positions in the controller's joint order, rad or m; NaN where none came.
    pub positions: JointVector,
    /// Age of each, in seconds: the larger of stamp age and arrival age; infinite where none came.
    pub ages: JointVector,
    /// When each came: tells one measurement from the next.
    pub arrived: [Monotonic; MAX_JOINTS],
}

impl Measured {
    /// No joint state yet.
    pub fn missing(joints: usize) -> Self {
        Self {
            positions: JointVector::filled(joints, f64::NAN),
            ages: JointVector::filled(joints, f64::INFINITY),
            arrived: [Monotonic::default(); MAX_JOINTS],
        }
    }
}

/// Everything a tick depends on, beside the controller's own state.
#[derive(Debug, Clone, Copy)]
pub struct TickInput<'a> {
    /// ROS time of this tick: dates the plan and limits the rates.
    pub ros_now: RosTime,
    /// When the thread woke: only for the starvation timeout.
    pub mono_now: Monotonic,
    /// Whole periods that passed without a tick since the last one.
    pub skipped: u64,
    /// The newest joint state.
    pub measured: Measured,
    /// Cameras, prompt, outputs, inference.
    pub inputs: InputHealth,
    /// What the rest of the node can do.
    pub lifecycle: Lifecycle,
    /// A chunk that was not given before, if there is one. It is copied: nothing is freed on this thread.
    pub chunk: Option<&'a ActionChunk>,
    /// The operator's wishes.
    pub requests: Requests,
}

/// What became of the chunk given to a tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ChunkVerdict {
    /// It waits for its adoption.
    Accepted,
    /// It will not be executed.
    Refused(ChunkRefusal),
}

/// A plan that became the running one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adoption {
    /// Which chunk.
    pub sequence: u64,
    /// Its first actions that were already due.
    pub actions_skipped: usize,
    /// Largest joint difference between the new and the running plan now, before blending; rad or m.
    pub jump: f64,
    /// The joint that has it.
    pub joint: usize,
    /// Whether it started a motion from rest instead of replacing a running plan.
    pub from_rest: bool,
}

/// What one tick did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TickReport {
    /// Whether the window is to be published.
    pub published: bool,
    /// Mode before.
    pub previous: Mode,
    /// Mode after.
    pub mode: Mode,
    /// Why arming was refused, if it was asked for and refused.
    pub refusal: Option<Refusal>,
    /// What became of the chunk given.
    pub chunk: Option<ChunkVerdict>,
    /// A waiting chunk that had to be dropped at its turn: its sequence, and why.
    pub dropped: Option<(u64, ChunkRefusal)>,
    /// A plan that was adopted.
    pub adoption: Option<Adoption>,
    /// A stop, disarming or starvation that began.
    pub stop: Option<Reason>,
    /// Whether the window starts at the measured pose at rest (arming, tracking error) instead of continuing what
    /// the robot was told.
    pub restarted: bool,
}
