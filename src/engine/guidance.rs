//! Guided real-time chunking: row weights and gain, pure functions shared by every engine.
//!
//! The Jacobian of the guidance term is taken as the identity, so one Euler step costs one fused multiply-add per
//! element and no backward pass.

use super::{Guidance, GuidanceSchedule};

/// Fills `weights` (one per row of the chunk) with how strongly each row is held to the previous chunk, in [0, 1].
///
/// One before the committed steps end, then falling by the schedule up to `execution_horizon` (clipped to
/// `previous_rows`), zero after it. Linear weights are the inner points of a line from 1 to 0, so the first free row
/// already weighs less than one and the last guided row more than zero.
pub fn row_weights(
    schedule: GuidanceSchedule,
    inference_delay: usize,
    execution_horizon: usize,
    previous_rows: usize,
    weights: &mut [f32],
) {
    let end = execution_horizon.min(previous_rows);
    let start = inference_delay.min(end);
    let intervals = (end - start + 1) as f64;
    for (row, weight) in weights.iter_mut().enumerate() {
        *weight = if row >= end {
            0.0
        } else if row < start {
            1.0
        } else {
            let c = 1.0 - (row - start + 1) as f64 / intervals;
            match schedule {
                GuidanceSchedule::Linear => c as f32,
                GuidanceSchedule::Exp => (c * c.exp_m1() / 1f64.exp_m1()) as f32,
                GuidanceSchedule::Ones => 1.0,
                GuidanceSchedule::Zeros => 0.0,
            }
        };
    }
}

/// The guidance gain at flow time `t` (1 is noise, 0 is data), at most `max_weight`.
///
/// With τ = 1 − t: ((1−τ)/τ) · ((1−τ)² + τ²)/(1−τ)², which is unbounded at τ = 0.
pub fn gain(t: f64, max_weight: f32) -> f32 {
    let tau = 1.0 - t;
    if tau <= 0.0 || t <= 0.0 {
        return max_weight;
    }
    max_weight.min(((t * t + tau * tau) / (tau * t)) as f32)
}

/// Moves the velocity of one Euler step towards the previous chunk.
///
/// `x` and `velocity` are `[rows, action_dim]`, `weights` one per row. With x̂ = x − t·v the clean chunk the model
/// expects, v ← v − gain · w ⊙ (previous − x̂).
pub fn guide(guidance: &Guidance<'_>, weights: &[f32], t: f64, x: &[f32], velocity: &mut [f32]) {
    let gain = gain(t, guidance.max_weight);
    let dim = x.len() / weights.len().max(1);
    let t = t as f32;
    // Rows past the end of the previous chunk end the zip; their weight is zero anyway.
    for (i, ((v, x), previous)) in velocity.iter_mut().zip(x).zip(guidance.previous).enumerate() {
        *v -= gain * weights[i / dim] * (previous - (x - t * *v));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(schedule: GuidanceSchedule, d: usize, end: usize, rows: usize) -> Vec<f32> {
        let mut w = vec![f32::NAN; 8];
        row_weights(schedule, d, end, rows, &mut w);
        w
    }

    #[test]
    fn weights_follow_the_schedule() {
        use GuidanceSchedule::*;
        assert_eq!(weights(Linear, 2, 5, 6), [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]);
        assert_eq!(weights(Ones, 2, 5, 6), [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(weights(Zeros, 2, 5, 6), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let e = weights(Exp, 2, 5, 6);
        assert!(e[1] == 1.0 && e[2] < 0.75 && e[2] > e[3] && e[3] > e[4] && e[4] > 0.0 && e[5] == 0.0, "{e:?}");
    }

    #[test]
    fn rows_that_are_not_left_have_no_weight() {
        assert_eq!(weights(GuidanceSchedule::Ones, 2, 8, 3), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(weights(GuidanceSchedule::Linear, 9, 8, 2), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(weights(GuidanceSchedule::Linear, 2, 8, 0), [0.0; 8]);
    }

    #[test]
    fn the_gain_of_ten_steps_is_the_published_one() {
        let expected = [10.0, 9.11, 4.25, 2.76, 2.17, 2.0, 2.17, 2.76, 4.25, 9.11];
        for (k, e) in expected.iter().enumerate() {
            let g = gain(1.0 - k as f64 / 10.0, 10.0);
            assert!((g - e).abs() < 0.005, "step {k}: {g}, not {e}");
        }
        assert_eq!(gain(0.9, 3.0), 3.0);
    }
}
