//! What is left of the running plan, on the grid of the chunk about to be decoded: the input of guided real-time
//! chunking. Pure functions of stamps and chunks.

use std::collections::VecDeque;

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

/// The actions `first`, `first + 1`, … of `past` (`first` with its fraction: the new chunk begins between two of the old
/// one's), linearly interpolated. `None` when nothing of it is left.
pub fn leftover(past: &PastChunk, first: f64, grid: Grid) -> Option<Leftover> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { horizon: 5, action_dim: 3, action_len: 2 };

    fn ramp(sequence: u64) -> PastChunk {
        PastChunk {
            sequence,
            prompt_generation: 0,
            model: (0..15).map(|i| (i / 3) as f32).collect(),
            absolute: (0..10).map(|i| 10.0 * (i / 2) as f64).collect(),
        }
    }

    #[test]
    fn the_leftover_is_resampled_to_the_new_grid_and_ends_with_the_old_chunk() {
        let l = leftover(&ramp(1), 1.5, GRID).unwrap();
        assert_eq!(l.rows, 3);
        for (i, want) in [15.0, 25.0, 35.0].iter().enumerate() {
            assert!((l.absolute[2 * i] - want).abs() < 1e-6, "{:?}", l.absolute);
            assert!((f64::from(l.model[3 * i + 2]) - want / 10.0).abs() < 1e-5);
        }
        assert_eq!(leftover(&ramp(1), 0.0, GRID).unwrap().rows, 5);
        assert_eq!(leftover(&ramp(1), 4.0, GRID).unwrap().rows, 1);
        assert_eq!(leftover(&ramp(1), 4.1, GRID), None);
    }

    #[test]
    fn before_its_first_action_a_plan_holds_it() {
        let l = leftover(&ramp(1), -2.0, GRID).unwrap();
        assert_eq!(l.rows, 5);
        assert_eq!(&l.absolute[..6], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((l.absolute[6] - 10.0).abs() < 1e-6);
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
