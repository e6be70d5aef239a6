//! Flow matching: the time grid, what depends only on time, and the Euler step.
//!
//! Time runs from 1 (noise) to 0 (data); the velocity estimates noise − data, so x ← x + dt·v with dt = −1/steps.

use super::workers::Parallelism;

use super::math::silu_all;
use super::matrix::{Into, Mat, MatMut, matmul};
use super::weights::{DecoderWeights, GemmaNorm, SuffixWeights, add_bias};
use crate::model::Dims;

/// Everything that depends on time alone, for one number of steps.
pub(super) struct TimeTable {
    /// Flow time of each step.
    pub(super) times: Vec<f64>,
    /// π0: what time adds inside the action-time MLP before its SiLU, `[steps, width]`.
    bias: Vec<f32>,
    /// π0.5: `[scale | shift | gate]` of every norm, `[steps, 2·layers + 1, 3·width]`.
    modulations: Vec<f32>,
    width: usize,
    norms: usize,
}

impl TimeTable {
    pub(super) fn new(dims: &Dims, weights: &DecoderWeights, steps: usize) -> Self {
        let width = dims.expert.width;
        let times: Vec<f64> = (0..steps).map(|k| time_of_step(k, steps)).collect();
        let mut embedding: Vec<f32> =
            times.iter().flat_map(|t| time_embedding(*t, width, dims.min_period, dims.max_period)).collect();
        let norms: Vec<&GemmaNorm> = weights
            .expert
            .iter()
            .flat_map(|layer| [&layer.input_norm, &layer.post_norm])
            .chain([&weights.final_norm])
            .collect();
        let mut table = Self { times, bias: Vec::new(), modulations: Vec::new(), width, norms: norms.len() };
        match &weights.suffix {
            SuffixWeights::Pi0 { mlp_in, .. } => {
                // The MLP's input is [action | time]: this is the time half of its product.
                table.bias = vec![0.0; steps * width];
                matmul(
                    MatMut::new(&mut table.bias, steps, width),
                    Into::Set,
                    1.0,
                    Mat::new(&embedding, steps, width),
                    Mat::strided(&mlp_in.weight[width..], width, width, 2 * width).t(),
                    Parallelism::None,
                );
                if let Some(bias) = &mlp_in.bias {
                    add_bias(&mut table.bias, bias);
                }
            }
            SuffixWeights::Pi05 { mlp_in, mlp_out } => {
                let mut condition = vec![0.0; steps * width];
                mlp_in.apply(Parallelism::None, steps, &embedding, &mut condition);
                silu_all(&mut condition);
                mlp_out.apply(Parallelism::None, steps, &condition, &mut embedding);
                silu_all(&mut embedding);
                table.modulations = vec![0.0; steps * norms.len() * 3 * width];
                for (condition, rows) in
                    embedding.chunks_exact(width).zip(table.modulations.chunks_exact_mut(norms.len() * 3 * width))
                {
                    for (norm, row) in norms.iter().zip(rows.chunks_exact_mut(3 * width)) {
                        if let GemmaNorm::Adaptive(dense) = norm {
                            dense.apply(Parallelism::None, 1, condition, row);
                        }
                    }
                }
            }
        }
        table
    }

    /// Flow-matching steps.
    pub(super) fn steps(&self) -> usize {
        self.times.len()
    }

    /// π0's time bias of one step.
    pub(super) fn bias(&self, step: usize) -> &[f32] {
        &self.bias[step * self.width..(step + 1) * self.width]
    }

    /// `[scale | shift | gate]` of norm `norm` (input and post-attention norm of each layer in turn, then the final
    /// one) at one step; empty where the norms are plain.
    pub(super) fn modulation(&self, step: usize, norm: usize) -> &[f32] {
        let row = 3 * self.width;
        let at = (step * self.norms + norm) * row;
        self.modulations.get(at..at + row).unwrap_or(&[])
    }
}

/// 1 − k/steps, rounded to f32 as the reference holds it: at the shortest period that rounding is visible.
fn time_of_step(step: usize, steps: usize) -> f64 {
    f64::from((1.0 - step as f64 / steps as f64) as f32)
}

/// `[sin(2πt/period) | cos(2πt/period)]` with `width/2` periods spaced evenly in the logarithm.
fn time_embedding(t: f64, width: usize, min_period: f64, max_period: f64) -> Vec<f32> {
    let half = width / 2;
    let angle = |j: usize| {
        let fraction = j as f64 / (half - 1) as f64;
        std::f64::consts::TAU * t / (min_period * (max_period / min_period).powf(fraction))
    };
    (0..half).map(|j| angle(j).sin() as f32).chain((0..half).map(|j| angle(j).cos() as f32)).collect()
}

/// One Euler step: x ← x − v/steps.
pub(super) fn euler(x: &mut [f32], velocity: &[f32], steps: usize) {
    let dt = (-1.0 / steps as f64) as f32;
    x.iter_mut().zip(velocity).for_each(|(x, v)| *x += dt * v);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_embedding_spans_the_periods() {
        let e = time_embedding(0.5, 8, 0.004, 4.0);
        // j = 3 has the longest period: 2π·0.5/4.
        assert!((f64::from(e[3]) - (std::f64::consts::PI / 4.0).sin()).abs() < 1e-6);
        assert!((f64::from(e[7]) - (std::f64::consts::PI / 4.0).cos()).abs() < 1e-6);
        // j = 0 has the shortest: 125 whole turns.
        assert!(e[0].abs() < 1e-5 && (e[4] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn ten_steps_run_from_one_to_a_tenth() {
        let times: Vec<f64> = (0..10).map(|k| time_of_step(k, 10)).collect();
        assert_eq!(times[0], 1.0);
        assert!((times[9] - 0.1).abs() < 1e-7);
    }
}
