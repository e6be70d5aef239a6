//! The action chunk: what a policy answers, with everything needed to refuse it.

use crate::clock::{Monotonic, RosTime};

/// One answer of the policy in robot units, dated and numbered.
#[derive(Debug, Clone, PartialEq)]
pub struct ActionChunk {
    /// Counts up by one per decode.
    pub sequence: u64,
    /// The reset epoch it was computed in; a chunk of an older epoch is never executed.
    pub epoch: u64,
    /// Counts prompts; guidance stops at a change.
    pub prompt_generation: u64,
    /// ROS time of the joint state it was decoded from: action `i` is due at `state_stamp + i·dt`.
    pub state_stamp: RosTime,
    /// ROS time of the oldest image it saw.
    pub oldest_image_stamp: RosTime,
    /// Seconds between actions, 1 / `policy_rate_hz`.
    pub dt: f64,
    /// Actions in the chunk.
    pub horizon: usize,
    /// Joints of one action.
    pub joints: usize,
    /// `[horizon, joints]`, row-major, robot units (rad, m), absolute.
    pub positions: Vec<f64>,
    /// Where its time went.
    pub timing: ChunkTiming,
}

impl ActionChunk {
    /// Action `i`; `i` must be below `horizon`.
    pub fn action(&self, i: usize) -> &[f64] {
        &self.positions[i * self.joints..(i + 1) * self.joints]
    }
}

/// Where the time of a chunk went, on the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkTiming {
    /// Newest image of the observation arrived.
    pub observed: Monotonic,
    /// Encode began.
    pub encode_start: Monotonic,
    /// Encode ended.
    pub encode_end: Monotonic,
    /// Decode began.
    pub decode_start: Monotonic,
    /// Decode ended; the chunk was handed to the control thread.
    pub decode_end: Monotonic,
}
