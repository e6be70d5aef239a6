//! What can be asked about the controller: one snapshot, copied out after a tick.

use super::joints::{JointVector, MAX_JOINTS};
use super::mode::{Level, Mode};
use super::reason::{ChunkRefusal, Reason};
use crate::clock::RosTime;

/// Rules by which the safety filter changes what the policy asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Rule {
    /// The whole plan was slowed down because of this joint.
    Scaled = 0,
    /// This joint alone was held to its velocity.
    Velocity = 1,
    /// This joint alone was held to its acceleration.
    Acceleration = 2,
    /// This joint alone was held inside its positions.
    Position = 3,
}

impl Rule {
    /// Every rule with its name in diagnostics.
    pub const ALL: [(Rule, &'static str); 4] = [
        (Rule::Scaled, "scaled"),
        (Rule::Velocity, "velocity"),
        (Rule::Acceleration, "acceleration"),
        (Rule::Position, "position"),
    ];
}

/// Ticks on which the safety filter stepped in, per joint and rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interventions([[u64; 4]; MAX_JOINTS]);

impl Default for Interventions {
    fn default() -> Self {
        Self([[0; 4]; MAX_JOINTS])
    }
}

impl Interventions {
    pub(crate) fn count(&mut self, joint: usize, rule: Rule) {
        if let Some(row) = self.0.get_mut(joint) {
            row[rule as usize] += 1;
        }
    }

    /// Of one joint by one rule.
    pub fn of(&self, joint: usize, rule: Rule) -> u64 {
        self.0.get(joint).map_or(0, |row| row[rule as usize])
    }

    /// Of all joints by one rule.
    pub fn by_rule(&self, rule: Rule) -> u64 {
        self.0.iter().map(|row| row[rule as usize]).sum()
    }

    /// All.
    pub fn total(&self) -> u64 {
        self.0.iter().flatten().sum()
    }
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Periods that passed: `published + skipped + unarmed`, always.
    pub ticks: u64,
    /// Ticks with a window.
    pub published: u64,
    /// Periods without a tick because an earlier one took too long.
    pub skipped: u64,
    /// Ticks with nothing to publish.
    pub unarmed: u64,
    /// Chunks that came: `adopted + superseded + refused + discarded`, and one that may be waiting.
    pub chunks: u64,
    /// Chunks that were executed.
    pub adopted: u64,
    /// Chunks replaced by a newer one before their turn.
    pub superseded: u64,
    /// Chunks refused, by [`ChunkRefusal::kind`].
    pub refused: [u64; ChunkRefusal::KINDS],
    /// Chunks dropped by a stop or a disarming while they waited.
    pub discarded: u64,
    /// Times the plan ran out.
    pub starved: u64,
    /// Times ROS time jumped back.
    pub clock_jumps: u64,
    /// Ticks at which ROS time stood still.
    pub paused: u64,
}

impl Counters {
    /// All refused chunks.
    pub fn refused_total(&self) -> u64 {
        self.refused.iter().sum()
    }
}

/// The running plan, as guided real-time chunking needs it: action `i` of chunk `sequence` is due at `origin + i·dt`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanView {
    /// Which chunk.
    pub sequence: u64,
    /// Its prompt.
    pub prompt_generation: u64,
    /// When its state was observed.
    pub state_stamp: RosTime,
    /// When its action 0 is (was) due.
    pub origin: RosTime,
    /// When it was adopted.
    pub adopted_at: RosTime,
    /// When the next chunk may be adopted.
    pub next_adoption: RosTime,
    /// Seconds between actions.
    pub dt: f64,
    /// Actions.
    pub horizon: usize,
    /// Seconds by which execution is behind the dates since the adoption, because the plan was slowed down.
    pub lag: f64,
    /// Pace at which it is followed now, 0 to 1.
    pub pace: f64,
}

impl PlanView {
    /// Index, with its fraction, of the action that is executed at `t`, if the pace is kept: where the leftover of this
    /// plan begins on the grid of a chunk observed at `t`. Negative before the first action.
    pub fn index_at(&self, t: RosTime) -> f64 {
        (t.seconds_since(self.origin) - self.lag) / self.dt
    }

    /// When a chunk that is ready at `ready` will be adopted: the next point of the grid from then on.
    pub fn adoption_of(&self, ready: RosTime) -> RosTime {
        let late = ready.seconds_since(self.next_adoption);
        let steps = if late > 0.0 { (late / self.dt - 1e-9).ceil().max(0.0) } else { 0.0 };
        self.next_adoption.plus_seconds(steps * self.dt)
    }

    /// Actions of a chunk observed at `stamp` that will be over when it is adopted, if it is ready at `ready`: the
    /// steps that guidance must commit to.
    pub fn delay_steps(&self, stamp: RosTime, ready: RosTime) -> usize {
        (self.adoption_of(ready).seconds_since(stamp) / self.dt - 1e-9).ceil().max(0.0) as usize
    }
}

/// Everything that can be asked about a controller, as of its last tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlStatus {
    /// What it is doing.
    pub mode: Mode,
    /// Why it is not following the policy; the last one until the next arming or reset.
    pub reason: Option<Reason>,
    /// Diagnostic level of the two.
    pub level: Level,
    /// Chunks of other epochs are refused.
    pub epoch: u64,
    /// Counters since the start.
    pub counters: Counters,
    /// Interventions of the safety filter.
    pub interventions: Interventions,
    /// Largest jump at a seam so far, before blending and filter: the largest joint difference between the new and
    /// the running plan at the moment of adoption, rad or m.
    pub seam_jump_max: f64,
    /// The last one.
    pub seam_jump: f64,
    /// Largest distance of the measured from the commanded position since the last arming, rad or m.
    pub tracking_error_max: f64,
    /// The one of the last tick.
    pub tracking_error: f64,
    /// Seconds from the observation of the running plan to now.
    pub chunk_age: Option<f64>,
    /// Seconds from the oldest image of the running plan to now.
    pub image_age: Option<f64>,
    /// The running plan.
    pub plan: Option<PlanView>,
    /// Positions the robot was told to have now; empty before the first arming.
    pub command: JointVector,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_when_a_chunk_will_be_adopted_and_what_it_must_commit_to() {
        let at = |ms: i64| RosTime(1_000_000_000_000 + ms * 1_000_000);
        let plan = PlanView {
            sequence: 1,
            prompt_generation: 0,
            state_stamp: at(0),
            origin: at(0),
            adopted_at: at(100),
            next_adoption: at(400),
            dt: 0.05,
            horizon: 20,
            lag: 0.0,
            pace: 1.0,
        };
        assert_eq!(plan.index_at(at(125)), 2.5);
        assert!((PlanView { lag: 0.05, ..plan }.index_at(at(125)) - 1.5).abs() < 1e-9);
        for (ready, adopted, delay) in [(150, 400, 6), (400, 400, 6), (401, 450, 7), (450, 450, 7), (500, 500, 8)] {
            assert_eq!(plan.adoption_of(at(ready)), at(adopted), "ready at {ready}");
            assert_eq!(plan.delay_steps(at(125), at(ready)), delay, "ready at {ready}");
        }
    }
}
