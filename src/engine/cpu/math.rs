//! Norms, activations, softmax and rotary positions, over rows of plain slices.
//!
//! Sums run over [`LANES`] partial sums and `exp` has no branches, so that the compiler makes vector code of them.
//! Softmax, which weighs most, takes the widest vectors that the machine has (`pulp`); the bits stay the same, for
//! nothing is fused or reordered.

use super::workers::Parallelism;
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

const LANES: usize = 16;

/// Inside the square root of every norm of both stacks and the vision tower (Flax and HF default).
const NORM_EPS: f32 = 1e-6;

/// Base of the rotary positions of both Gemma stacks.
const ROPE_BASE: f64 = 10_000.0;

/// Rows one task takes: small enough to share out, large enough to be worth it.
const TASK_ROWS: usize = 32;

/// Calls `f` for groups of whole rows of `data`, on every thread there is; each group comes with its first row.
pub(super) fn for_rows(threads: Parallelism, data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    match threads {
        Parallelism::None => f(0, data),
        Parallelism::Rayon => {
            data.par_chunks_mut(TASK_ROWS * width).enumerate().for_each(|(i, rows)| f(i * TASK_ROWS, rows));
        }
    }
}

#[inline(always)]
fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().map(|v| f(*v)).sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `out = (x − mean) / √(variance + eps) · weight + bias` for each row; the variance is the biased one.
pub(super) fn layer_norm(threads: Parallelism, x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let width = weight.len();
    for_rows(threads, out, width, |first, out| {
        for (out, x) in out.chunks_exact_mut(width).zip(x[first * width..].chunks_exact(width)) {
            let mean = sum_of(x, |v| v) / width as f32;
            let variance = sum_of(x, |v| (v - mean) * (v - mean)) / width as f32;
            let inverse = 1.0 / (variance + NORM_EPS).sqrt();
            for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                *out = (x - mean) * inverse * w + b;
            }
        }
    });
}

/// What a Gemma norm multiplies, adds and gates with; one row of each, `width` long.
#[derive(Clone, Copy)]
pub(super) struct Modulation<'a> {
    /// The norm multiplies with 1 + scale.
    pub(super) scale: &'a [f32],
    /// Added after the norm, and the factor of the sublayer's output. Only π0.5's expert has them.
    pub(super) adaptive: Option<Adaptive<'a>>,
}

/// The part of a [`Modulation`] that a plain norm lacks.
#[derive(Clone, Copy)]
pub(super) struct Adaptive<'a> {
    /// Added after the norm.
    pub(super) shift: &'a [f32],
    /// Multiplies the sublayer's output before it joins the residual stream.
    pub(super) gate: &'a [f32],
}

/// `out = x / √(mean(x²) + eps) · (1 + scale) [+ shift]` for each row.
pub(super) fn rms_norm(threads: Parallelism, x: &[f32], modulation: Modulation<'_>, out: &mut [f32]) {
    let width = modulation.scale.len();
    for_rows(threads, out, width, |first, out| {
        for (out, x) in out.chunks_exact_mut(width).zip(x[first * width..].chunks_exact(width)) {
            let inverse = 1.0 / (sum_of(x, |v| v * v) / width as f32 + NORM_EPS).sqrt();
            for ((out, x), scale) in out.iter_mut().zip(x).zip(modulation.scale) {
                *out = x * inverse * (1.0 + scale);
            }
            if let Some(adaptive) = modulation.adaptive {
                out.iter_mut().zip(adaptive.shift).for_each(|(out, shift)| *out += shift);
            }
        }
    });
}

/// `h += gate ⊙ y` for each row.
pub(super) fn add_gated(threads: Parallelism, h: &mut [f32], gate: &[f32], y: &[f32]) {
    let width = gate.len();
    for_rows(threads, h, width, |first, h| {
        for (h, y) in h.chunks_exact_mut(width).zip(y[first * width..].chunks_exact(width)) {
            for ((h, y), gate) in h.iter_mut().zip(y).zip(gate) {
                *h += gate * y;
            }
        }
    });
}

/// e^x to about 1 ulp for −87 < x < 88, clamped outside; NaN stays NaN. Polynomial of Cephes' `expf`.
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_375 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5.000_000_1e-1;
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    p * power
}

/// x · σ(x).
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), written as x·σ(2·…), which is the same.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;
    x / (1.0 + exp(-TWICE_SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x)))
}

/// SiLU of every value.
pub(super) fn silu_all(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = silu(*x));
}

/// tanh-GELU of every value.
pub(super) fn gelu_all(threads: Parallelism, x: &mut [f32], width: usize) {
    for_rows(threads, x, width, |_, x| x.iter_mut().for_each(|x| *x = gelu_tanh(*x)));
}

/// `gate = gelu(gate) ⊙ up`.
pub(super) fn gelu_times(threads: Parallelism, gate: &mut [f32], up: &[f32], width: usize) {
    for_rows(threads, gate, width, |first, gate| {
        gate.iter_mut().zip(&up[first * width..]).for_each(|(gate, up)| *gate = gelu_tanh(*gate) * up);
    });
}

/// Softmax of each row of `width` values, in place.
pub(super) fn softmax_rows(rows: &mut [f32], width: usize) {
    Arch::new().dispatch(SoftmaxRows { rows, width });
}

/// A closure that is sure to be inlined where the vector instructions are enabled.
struct SoftmaxRows<'a> {
    rows: &'a mut [f32],
    width: usize,
}

impl NullaryFnOnce for SoftmaxRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for row in self.rows.chunks_exact_mut(self.width) {
            softmax(row);
        }
    }
}

#[inline(always)]
fn softmax(row: &mut [f32]) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    let max = lanes.iter().fold(tail, |m, v| m.max(*v));
    row.iter_mut().for_each(|v| *v = exp(*v - max));
    let inverse = 1.0 / sum_of(row, |v| v);
    row.iter_mut().for_each(|v| *v *= inverse);
}

/// Cosines and sines of rotary positions in the half-split layout: θ_i = position / 10000^(2i/head_dim).
pub(super) struct Rope {
    half: usize,
    /// `[positions, half]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// An empty table.
    pub(super) fn new(head_dim: usize) -> Self {
        Self { half: head_dim / 2, cos: Vec::new(), sin: Vec::new() }
    }

    /// Makes sure that positions 0 to `positions` − 1 are there.
    pub(super) fn extend_to(&mut self, positions: usize) {
        for position in self.cos.len() / self.half.max(1)..positions {
            for i in 0..self.half {
                let angle = position as f64 / ROPE_BASE.powf(i as f64 / self.half as f64);
                self.cos.push(angle.cos() as f32);
                self.sin.push(angle.sin() as f32);
            }
        }
    }

    /// Rotates rows of `heads` heads; row r is at position `first + r`.
    pub(super) fn rotate(&self, threads: Parallelism, x: &mut [f32], heads: usize, first: usize) {
        let (half, width) = (self.half, self.half * 2 * heads);
        for_rows(threads, x, width, |first_row, x| {
            for (r, row) in x.chunks_exact_mut(width).enumerate() {
                let at = (first + first_row + r) * half;
                let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
                for head in row.chunks_exact_mut(half * 2) {
                    let (low, high) = head.split_at_mut(half);
                    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
                    }
                }
            }
        });
    }

    #[cfg(test)]
    pub(super) fn shift_by_one(&mut self) {
        self.cos.drain(..self.half);
        self.sin.drain(..self.half);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0f64;
        let mut x = -87.0f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
            x += 0.003_7;
        }
        assert!(worst < 2.4e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 1e-37 && exp(1000.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn activations_match_their_definitions() {
        for i in -400..400 {
            let x = i as f64 * 0.025;
            let tanh = 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            assert!((f64::from(gelu_tanh(x as f32)) - tanh).abs() < 1e-6 * (1.0 + x.abs()), "gelu({x})");
            assert!((f64::from(silu(x as f32)) - x / (1.0 + (-x).exp())).abs() < 1e-6 * (1.0 + x.abs()), "silu({x})");
        }
    }

    #[test]
    fn softmax_sums_to_one_and_keeps_ratios() {
        let mut row: Vec<f32> = (0..37).map(|i| 50.0 + (i as f32 * 0.9).sin()).collect();
        let ratio = (row[3] - row[36]).exp();
        softmax(&mut row);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((row[3] / row[36] - ratio).abs() < 1e-5);
    }

    #[test]
    fn a_nan_is_not_hidden_by_a_norm_or_a_softmax() {
        let mut row = vec![0.5; 40];
        row[7] = f32::NAN;
        let mut out = vec![0.0; 40];
        rms_norm(Parallelism::None, &row, Modulation { scale: &[0.0; 40], adaptive: None }, &mut out);
        assert!(out.iter().all(|v| v.is_nan()));
        softmax(&mut row);
        assert!(row.iter().all(|v| v.is_nan()));
    }

    #[test]
    fn rotation_keeps_the_product_of_equal_distances() {
        let mut rope = Rope::new(8);
        rope.extend_to(20);
        let (q, k): (Vec<f32>, Vec<f32>) = (0..8).map(|i| ((i as f32).sin(), (i as f32 * 1.7).cos())).unzip();
        let product = |at_q: usize, at_k: usize| {
            let (mut q, mut k) = (q.clone(), k.clone());
            rope.rotate(Parallelism::None, &mut q, 1, at_q);
            rope.rotate(Parallelism::None, &mut k, 1, at_k);
            q.iter().zip(&k).map(|(q, k)| q * k).sum::<f32>()
        };
        assert!((product(3, 5) - product(12, 14)).abs() < 1e-5);
        assert!((product(3, 5) - product(3, 6)).abs() > 1e-3);
    }
}
