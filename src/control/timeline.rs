//! Which action is due now: chunks accepted or refused, and what of a plan the robot has consumed.

use super::chunk::ActionChunk;
use super::config::ControlConfig;
use super::reason::ChunkRefusal;
use crate::clock::RosTime;

/// What chunks must agree with.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    joints: usize,
    horizon: usize,
    dt: f64,
    max_age: f64,
    max_image_age: f64,
    future: f64,
    /// Last sequence accepted in this epoch.
    sequence: Option<u64>,
    prompt_generation: u64,
}

impl Gate {
    pub(crate) fn new(config: &ControlConfig) -> Self {
        Self {
            joints: config.joints.len(),
            horizon: config.horizon,
            dt: config.dt,
            max_age: config.max_chunk_age,
            max_image_age: config.max_image_age,
            future: config.future_tolerance,
            sequence: None,
            prompt_generation: 0,
        }
    }

    /// Takes over which prompt is the newest that was seen.
    pub(crate) fn succeed(&mut self, old: &Gate) {
        self.prompt_generation = old.prompt_generation;
    }

    pub(crate) fn set_ages(&mut self, chunk: f64, image: f64) {
        (self.max_age, self.max_image_age) = (chunk, image);
    }

    /// A new epoch may number its chunks from anywhere.
    pub(crate) fn new_epoch(&mut self) {
        self.sequence = None;
    }

    /// Whether a chunk with these stamps of its state and its oldest image is too old to be adopted now.
    pub(crate) fn age(&self, stamp: RosTime, image: RosTime, now: RosTime) -> Result<(), ChunkRefusal> {
        let age = now.seconds_since(stamp);
        if age > self.max_age {
            return Err(ChunkRefusal::TooOld { age, max: self.max_age });
        }
        if age < -self.future {
            return Err(ChunkRefusal::FromFuture { ahead: -age, max: self.future });
        }
        let age = now.seconds_since(image);
        if age > self.max_image_age {
            return Err(ChunkRefusal::ImagesTooOld { age, max: self.max_image_age });
        }
        Ok(())
    }

    /// Accepts or refuses a chunk; cheap checks first, values last.
    pub(crate) fn admit(&mut self, chunk: &ActionChunk, epoch: u64, now: RosTime) -> Result<(), ChunkRefusal> {
        if chunk.epoch != epoch {
            return Err(ChunkRefusal::Epoch { chunk: chunk.epoch, current: epoch });
        }
        if let Some(last) = self.sequence.filter(|&last| chunk.sequence <= last) {
            return Err(ChunkRefusal::Sequence { chunk: chunk.sequence, last });
        }
        if chunk.prompt_generation < self.prompt_generation {
            return Err(ChunkRefusal::OldPrompt { chunk: chunk.prompt_generation, current: self.prompt_generation });
        }
        if chunk.joints != self.joints {
            return Err(ChunkRefusal::Joints { found: chunk.joints, expected: self.joints });
        }
        if chunk.horizon != self.horizon || chunk.positions.len() != self.horizon * self.joints {
            let found = if chunk.horizon != self.horizon { chunk.horizon } else { chunk.positions.len() / self.joints };
            return Err(ChunkRefusal::Horizon { found, expected: self.horizon });
        }
        if chunk.dt.is_nan() || (chunk.dt - self.dt).abs() > 1e-6 * self.dt {
            return Err(ChunkRefusal::TimeStep { found: chunk.dt, expected: self.dt });
        }
        if chunk.state_stamp.0 <= 0 || now.0 <= 0 {
            return Err(ChunkRefusal::NoStamp);
        }
        self.age(chunk.state_stamp, chunk.oldest_image_stamp, now)?;
        if let Some(i) = chunk.positions.iter().position(|x| !x.is_finite()) {
            return Err(ChunkRefusal::NonFinite { joint: i % self.joints, step: i / self.joints });
        }
        self.sequence = Some(chunk.sequence);
        self.prompt_generation = chunk.prompt_generation;
        Ok(())
    }
}

/// An accepted chunk that waits for its adoption; memory is reserved once.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    pub(crate) present: bool,
    pub(crate) sequence: u64,
    pub(crate) prompt_generation: u64,
    pub(crate) state_stamp: RosTime,
    pub(crate) oldest_image_stamp: RosTime,
    pub(crate) positions: Vec<f64>,
}

impl Pending {
    pub(crate) fn with_room(values: usize) -> Self {
        Self {
            present: false,
            sequence: 0,
            prompt_generation: 0,
            state_stamp: RosTime::default(),
            oldest_image_stamp: RosTime::default(),
            positions: vec![0.0; values],
        }
    }

    /// Whether it is too old to be adopted now.
    pub(crate) fn age(&self, gate: &Gate, now: RosTime) -> Result<(), ChunkRefusal> {
        gate.age(self.state_stamp, self.oldest_image_stamp, now)
    }

    /// Takes over an admitted chunk; true if another one was waiting, which is thereby superseded.
    pub(crate) fn replace(&mut self, chunk: &ActionChunk) -> bool {
        let superseded = self.present;
        self.present = true;
        self.sequence = chunk.sequence;
        self.prompt_generation = chunk.prompt_generation;
        self.state_stamp = chunk.state_stamp;
        self.oldest_image_stamp = chunk.oldest_image_stamp;
        self.positions.copy_from_slice(&chunk.positions);
        superseded
    }
}

/// How much ROS time passed without plan being consumed: at rest all of it, at full pace none.
///
/// A chunk computed at `t_obs` may only lose the actions that were really consumed since. With `lost(t)` the time not
/// used for motion, action 0 is due at `t_obs + lost(now) − lost(t_obs)`: at the observation while the plan runs as
/// dated, at the adoption from rest, in between when the plan was slowed down.
#[derive(Debug, Clone)]
pub(crate) struct Consumption {
    /// Corners of `lost(t)`, ns, oldest first from `head`.
    corners: Vec<(i64, i64)>,
    head: usize,
    len: usize,
}

impl Consumption {
    const CORNERS: usize = 1024;

    pub(crate) fn new() -> Self {
        Self { corners: vec![(0, 0); Self::CORNERS], head: 0, len: 0 }
    }

    /// Forgets the past, as after a jump of the clock.
    pub(crate) fn restart(&mut self, now: RosTime) {
        self.head = 0;
        self.len = 1;
        self.corners[0] = (now.0, 0);
    }

    fn corner(&self, i: usize) -> (i64, i64) {
        self.corners[(self.head + i) % Self::CORNERS]
    }

    /// Time lost until the last entry, ns.
    pub(crate) fn lost(&self) -> i64 {
        if self.len == 0 { 0 } else { self.corner(self.len - 1).1 }
    }

    /// From the last entry to `now`, `lost` ns were not used.
    pub(crate) fn advance(&mut self, now: RosTime, lost: i64) {
        if self.len == 0 {
            return self.restart(now);
        }
        let (t, l) = self.corner(self.len - 1);
        let next = (now.0, l.saturating_add(lost));
        if next.0 <= t {
            return;
        }
        if self.len >= 2 {
            let (t0, l0) = self.corner(self.len - 2);
            let (before, after) = (l.saturating_sub(l0), next.1.saturating_sub(l));
            // Rest stays rest, full pace stays full pace: only corners are kept.
            if (before == 0 && after == 0) || (before == t.saturating_sub(t0) && after == next.0.saturating_sub(t)) {
                let last = (self.head + self.len - 1) % Self::CORNERS;
                self.corners[last] = next;
                return;
            }
        }
        if self.len < Self::CORNERS {
            let slot = (self.head + self.len) % Self::CORNERS;
            self.corners[slot] = next;
            self.len += 1;
        } else {
            self.corners[self.head] = next;
            self.head = (self.head + 1) % Self::CORNERS;
        }
    }

    /// Time lost between `stamp` and the last entry, ns; `None` if `stamp` is before what is remembered. Before the
    /// first entry ever nothing was consumed.
    pub(crate) fn lost_since(&self, stamp: RosTime) -> Option<i64> {
        let then = match (0..self.len).rev().find(|&i| self.corner(i).0 <= stamp.0) {
            Some(i) if i + 1 == self.len => self.lost(),
            Some(i) => {
                // Corners are apart in time: what is divided by is not zero.
                let ((ta, la), (tb, lb)) = (self.corner(i), self.corner(i + 1));
                let share = stamp.0.saturating_sub(ta) as f64 / tb.saturating_sub(ta) as f64;
                la.saturating_add((lb.saturating_sub(la) as f64 * share).round() as i64)
            }
            None if self.len == 0 || self.len == Self::CORNERS => return None,
            None => {
                let (t0, l0) = self.corner(0);
                l0.saturating_sub(t0.saturating_sub(stamp.0))
            }
        };
        Some(self.lost().saturating_sub(then))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_at_rest_is_not_consumed_and_time_in_motion_is() {
        let mut c = Consumption::new();
        c.advance(RosTime(1000), 0);
        for t in 1..=10 {
            c.advance(RosTime(1000 + t * 10), 10); // at rest
        }
        for t in 11..=20 {
            c.advance(RosTime(1000 + t * 10), 0); // full pace
        }
        for t in 21..=30 {
            c.advance(RosTime(1000 + t * 10), 5); // half pace
        }
        assert_eq!(c.lost_since(RosTime(1300)), Some(0));
        assert_eq!(c.lost_since(RosTime(1280)), Some(10), "half of 20");
        assert_eq!(c.lost_since(RosTime(1200)), Some(50));
        assert_eq!(c.lost_since(RosTime(1150)), Some(50), "nothing lost at full pace");
        assert_eq!(c.lost_since(RosTime(1100)), Some(50));
        assert_eq!(c.lost_since(RosTime(1060)), Some(90));
        assert_eq!(c.lost_since(RosTime(900)), Some(250), "before the first tick nothing moved");
        assert_eq!(c.lost_since(RosTime(1400)), Some(0), "ahead of the last tick");
        assert!(c.len < 20, "only corners are kept: {}", c.len);
    }

    #[test]
    fn what_is_no_longer_remembered_is_not_guessed() {
        let mut c = Consumption::new();
        assert_eq!(c.lost_since(RosTime(10)), None, "nothing is known yet");
        let mut history = Vec::new();
        for t in 1..=5000 {
            c.advance(RosTime(t * 10), t % 7);
            history.push((t * 10, c.lost()));
        }
        assert_eq!(c.lost_since(RosTime(10)), None);
        assert_eq!(c.lost_since(RosTime(39_000)), None);
        for (t, lost) in &history[4000..] {
            assert_eq!(c.lost_since(RosTime(*t)), Some(c.lost() - lost), "since {t}");
        }
    }
}
