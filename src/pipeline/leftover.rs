//! What is left of the running plan, on the grid of the chunk about to be decoded: the input of guided real-time
//! chunking. Pure functions of stamps and chunks.

use std::collections::VecDeque;

use crate::clock::RosTime;
use crate::control::PlanView;

/// A chunk as the decoder remembers it.
#[derive(Debug, Clone)]
pub struct PastChunk {
    /// Its sequence.
    pub sequence: u64,
    /// The prompt it followed.
    pub prompt_generation: u64,
    /// `[horizon, action_dim]`, normalised model space, padded columns included.
    pub model: Vec<f32>,
    /// `[horizon, action_len]`, the policy's own units, absolute.
    pub absolute: Vec<f64>,
}

/// Chunks that the control side may still be executing.
#[derive(Debug, Default)]
pub struct History {
    chunks: VecDeque<PastChunk>,
}

impl History {
    /// More decodes than this between two adoptions are not remembered; guidance pauses then.
    const CAPACITY: usize = 1024;

    /// Remembers a chunk just decoded.
    pub fn push(&mut self, chunk: PastChunk) {
        if self.chunks.len() == Self::CAPACITY {
            self.chunks.pop_front();
        }
        self.chunks.push_back(chunk);
    }

    /// The chunk in execution; everything before it is forgotten.
    pub fn adopted(&mut self, sequence: u64) -> Option<&PastChunk> {
        while self.chunks.front().is_some_and(|c| c.sequence < sequence) {
            self.chunks.pop_front();
        }
        self.chunks.front().filter(|c| c.sequence == sequence)
    }

    /// Forgets everything: after a stop nothing old may pull on a new plan.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }
}

/// Shape of the chunks compared.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Actions a chunk.
    pub horizon: usize,
    /// Columns of the model's actions.
    pub action_dim: usize,
    /// Real columns of an action.
    pub action_len: usize,
    /// Seconds between actions.
    pub dt: f64,
}

/// The unexecuted rest of a chunk, resampled.
#[derive(Debug, Clone, PartialEq)]
pub struct Leftover {
    /// Rows that the old plan still covers.
    pub rows: usize,
    /// `[rows, action_len]`, the policy's own units, absolute: to be re-anchored and normalised.
    pub absolute: Vec<f64>,
    /// `[rows, action_dim]`: padded columns as the model left them; the real ones are to be overwritten.
    pub model: Vec<f32>,
}

/// Resamples `past` to the times `start + i·dt`, linearly between its actions. `None` when nothing of it is left.
pub fn leftover(past: &PastChunk, origin: RosTime, start: RosTime, grid: Grid) -> Option<Leftover> {
    let first = start.seconds_since(origin) / grid.dt;
    let last = grid.horizon.checked_sub(1)? as f64;
    // Half a nanosecond of rounding must not lose the last row.
    let rows = ((last - first + 1e-6).floor() + 1.0).clamp(0.0, grid.horizon as f64) as usize;
    if rows == 0 || !first.is_finite() {
        return None;
    }
    let mut out = Leftover {
        rows,
        absolute: Vec::with_capacity(rows * grid.action_len),
        model: Vec::with_capacity(rows * grid.action_dim),
    };
    for i in 0..rows {
        let u = (first + i as f64).clamp(0.0, last);
        let below = (u.floor() as usize).min(grid.horizon - 1);
        let above = (below + 1).min(grid.horizon - 1);
        let part = u - below as f64;
        let (a, b) = (below * grid.action_len, above * grid.action_len);
        out.absolute
            .extend((0..grid.action_len).map(|c| past.absolute[a + c] * (1.0 - part) + past.absolute[b + c] * part));
        let (a, b) = (below * grid.action_dim, above * grid.action_dim);
        let part = part as f32;
        out.model.extend((0..grid.action_dim).map(|c| past.model[a + c] * (1.0 - part) + past.model[b + c] * part));
    }
    Some(out)
}

/// Steps of the new chunk that will be in the past when it is adopted: from its state stamp to the first adoption
/// time of the running plan at which it can be ready.
pub fn inference_delay(plan: &PlanView, replan_steps: usize, start: RosTime, ready: RosTime, dt: f64) -> usize {
    let period = replan_steps.max(1) as f64 * dt;
    let wait = ready.seconds_since(plan.next_adoption);
    let periods = if wait > 0.0 { (wait / period).ceil() } else { 0.0 };
    let adoption = plan.next_adoption.plus_seconds(periods * period);
    // As above: rounding must not add a step.
    (adoption.seconds_since(start) / dt - 1e-6).ceil().max(0.0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { horizon: 5, action_dim: 3, action_len: 2, dt: 0.1 };

    fn ramp(sequence: u64) -> PastChunk {
        PastChunk {
            sequence,
            prompt_generation: 0,
            model: (0..15).map(|i| (i / 3) as f32).collect(),
            absolute: (0..10).map(|i| 10.0 * (i / 2) as f64).collect(),
        }
    }

    fn at(seconds: f64) -> RosTime {
        RosTime(1_000_000_000).plus_seconds(seconds)
    }

    #[test]
    fn the_leftover_is_resampled_to_the_new_grid_and_ends_with_the_old_chunk() {
        let l = leftover(&ramp(1), at(0.0), at(0.15), GRID).unwrap();
        assert_eq!(l.rows, 3);
        for (i, want) in [15.0, 25.0, 35.0].iter().enumerate() {
            assert!((l.absolute[2 * i] - want).abs() < 1e-6, "{:?}", l.absolute);
            assert!((f64::from(l.model[3 * i + 2]) - want / 10.0).abs() < 1e-5);
        }
        assert_eq!(leftover(&ramp(1), at(0.0), at(0.0), GRID).unwrap().rows, 5);
        assert_eq!(leftover(&ramp(1), at(0.0), at(0.4), GRID).unwrap().rows, 1);
        assert_eq!(leftover(&ramp(1), at(0.0), at(0.41), GRID), None);
    }

    #[test]
    fn before_its_origin_a_plan_holds_its_first_action() {
        let l = leftover(&ramp(1), at(0.0), at(-0.2), GRID).unwrap();
        assert_eq!(l.rows, 5);
        assert_eq!(&l.absolute[..6], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((l.absolute[6] - 10.0).abs() < 1e-6);
    }

    #[test]
    fn delay_runs_to_the_first_adoption_the_chunk_can_make() {
        let plan = PlanView {
            sequence: 1,
            prompt_generation: 0,
            state_stamp: at(0.0),
            origin: at(0.0),
            adopted_at: at(0.2),
            next_adoption: at(0.5),
            dt: 0.1,
            horizon: 5,
            lag: 0.0,
            pace: 1.0,
        };
        assert_eq!(inference_delay(&plan, 3, at(0.2), at(0.4), 0.1), 3);
        assert_eq!(inference_delay(&plan, 3, at(0.2), at(0.51), 0.1), 6, "one re-plan later");
        assert_eq!(inference_delay(&plan, 3, at(0.6), at(0.4), 0.1), 0);
    }

    #[test]
    fn history_forgets_what_came_before_the_plan_in_execution() {
        let mut h = History::default();
        (1..=4).for_each(|s| h.push(ramp(s)));
        assert_eq!(h.adopted(3).map(|c| c.sequence), Some(3));
        assert!(h.adopted(2).is_none(), "an older plan cannot come back");
        h.clear();
        assert!(h.adopted(3).is_none());
    }
}
