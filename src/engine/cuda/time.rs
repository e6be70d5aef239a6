//! What depends on flow time alone: tables for one number of steps, worked out once.

use std::sync::Arc;

use super::device::{Buffer, Device};
use super::kernels::{ProductArgs, Shape};
use super::lane::Lane;
use super::plan::{STEP_K, pad};
use super::stream::Stream;
use super::weights::{DecoderWeights, ExpertNorm, ExpertSizes, Suffix};
use crate::engine::EngineError;
use crate::model::Dims;

/// Scales, shifts and gates of every norm at every step (π0.5), and what they make of the products after them.
struct Modulation {
    /// `[norms, steps, padded width]`: 1 + scale, and the residual gates.
    scale: Buffer<f32>,
    gate: Buffer<f32>,
    /// weights·shift, `[layers, steps, packed rows]`.
    qkv_bias: Buffer<f32>,
    gate_up_bias: Buffer<f32>,
}

/// Tables of one number of steps.
pub(super) struct Tables {
    /// Flow time of each step.
    pub times: Vec<f64>,
    /// Bias of the in-projection, `[steps, padded width]`.
    in_bias: Buffer<f32>,
    /// Bias of the out-projection, `[steps, action_dim]`.
    out_bias: Buffer<f32>,
    modulation: Option<Modulation>,
    sizes: ExpertSizes,
    action_dim: usize,
}

/// 1 − k/steps, rounded to f32 as the reference holds it: at the shortest period that rounding is visible.
fn time_of_step(step: usize, steps: usize) -> f64 {
    f64::from((1.0 - step as f64 / steps as f64) as f32)
}

/// `[sin(2πt/period) | cos(2πt/period)]` with `width/2` periods spaced evenly in the logarithm (spec section 5).
fn time_embedding(t: f64, dims: &Dims) -> Vec<f64> {
    let half = dims.expert.width / 2;
    let angle = |j: usize| {
        let fraction = j as f64 / (half - 1) as f64;
        std::f64::consts::TAU * t / (dims.min_period * (dims.max_period / dims.min_period).powf(fraction))
    };
    // The reference rounds the embedding to float32.
    (0..half)
        .map(|j| f64::from(angle(j).sin() as f32))
        .chain((0..half).map(|j| f64::from(angle(j).cos() as f32)))
        .collect()
}

/// weight·x + bias in float64.
fn linear(weight: &[f32], bias: &[f32], x: &[f64]) -> Vec<f64> {
    weight
        .chunks_exact(x.len())
        .zip(bias)
        .map(|(row, b)| f64::from(*b) + row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>())
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

impl Tables {
    pub fn new(device: &Arc<Device>, dims: &Dims, weights: &DecoderWeights, steps: usize) -> Result<Self, EngineError> {
        let sizes = ExpertSizes::new(&dims.expert);
        let times: Vec<f64> = (0..steps).map(|k| time_of_step(k, steps)).collect();
        let mut in_bias = vec![0.0f32; steps * sizes.width];
        let rows = in_bias.chunks_exact_mut(sizes.width).zip(&times);
        match &weights.suffix {
            Suffix::Pi0 { constant, time, .. } => {
                for (row, t) in rows {
                    let b = linear(time, constant, &time_embedding(*t, dims));
                    row.iter_mut().zip(b).for_each(|(r, b)| *r = b as f32);
                }
            }
            Suffix::Pi05 { action_bias, .. } => {
                let mut bias = vec![0.0; action_bias.len()];
                action_bias.read(0, &mut bias)?;
                rows.for_each(|(row, _)| row.copy_from_slice(&bias));
            }
        }
        let in_bias = Buffer::from_slice(device, &in_bias)?;
        let out_bias = Buffer::from_slice(device, &weights.out_bias.repeat(steps))?;
        let mut tables = Self { times, in_bias, out_bias, modulation: None, sizes, action_dim: dims.action_dim };
        if let Suffix::Pi05 { mlp, .. } = &weights.suffix {
            let width = dims.expert.width;
            let mut condition = vec![0.0f32; steps * sizes.width];
            for (row, t) in condition.chunks_exact_mut(sizes.width).zip(&tables.times) {
                let hidden: Vec<f64> =
                    linear(&mlp[0].0, &mlp[0].1, &time_embedding(*t, dims)).into_iter().map(silu).collect();
                let c = linear(&mlp[1].0, &mlp[1].1, &hidden);
                row[..width].iter_mut().zip(c).for_each(|(r, c)| *r = silu(c) as f32);
            }
            tables.modulate(device, dims, weights, &Buffer::from_slice(device, &condition)?)?;
        }
        Ok(tables)
    }

    fn modulate(
        &mut self,
        device: &Arc<Device>,
        dims: &Dims,
        weights: &DecoderWeights,
        condition: &Buffer<f32>,
    ) -> Result<(), EngineError> {
        let (n, steps, width) = (self.sizes, self.times.len(), dims.expert.width);
        let layers = weights.layers.len();
        let row = n.width;
        let norms: Vec<&ExpertNorm> =
            weights.layers.iter().flat_map(|l| [&l.norm1, &l.norm2]).chain([&weights.final_norm]).collect();
        let table = || Buffer::<f32>::zeroed(device, norms.len() * steps * row);
        let (scale, shift, gate) = (table()?, table()?, table()?);
        let m = Modulation {
            scale,
            gate,
            qkv_bias: Buffer::zeroed(device, layers * steps * n.qkv_rows)?,
            gate_up_bias: Buffer::zeroed(device, layers * steps * n.gate_up_rows)?,
        };
        let stream = Stream::new(&Lane::whole(device))?;
        let kernel = &device.kernels().product;
        let run = |args: ProductArgs| {
            let threads = args.rows as usize * steps * 32;
            kernel.launch(
                &stream,
                Shape { dependent: false, ..Shape::items(threads, 256) },
                &ProductArgs { count: steps as i32, ..args },
            )
        };
        for (i, norm) in norms.iter().enumerate() {
            let ExpertNorm::Adaptive { weight, dtype, bias } = norm else { continue };
            let element = if *dtype == 1 { 4 } else { 2 };
            for (part, (to, add)) in [(&m.scale, 1.0), (&shift, 0.0), (&m.gate, 0.0)].into_iter().enumerate() {
                run(ProductArgs {
                    w: weight.at(part * width * width * element),
                    x: condition.pointer(),
                    bias: bias.at(part * width),
                    y: to.at(i * steps * row),
                    rows: width as i64,
                    k: width as i64,
                    x_stride: row as i64,
                    y_stride: row as i64,
                    dtype: *dtype,
                    add,
                    ..ProductArgs::default()
                })?;
            }
        }
        for (l, layer) in weights.layers.iter().enumerate() {
            for (w, to, rows, norm) in [
                (&layer.qkv, &m.qkv_bias, n.qkv_rows, 2 * l),
                (&layer.gate_up, &m.gate_up_bias, n.gate_up_rows, 2 * l + 1),
            ] {
                run(ProductArgs {
                    w: w.pointer(),
                    x: shift.at(norm * steps * row),
                    y: to.at(l * steps * rows),
                    rows: rows as i64,
                    k: row as i64,
                    padded_k: pad(width, STEP_K) as i64,
                    layout: weights.packing.layout(),
                    x_stride: row as i64,
                    y_stride: rows as i64,
                    ..ProductArgs::default()
                })?;
            }
        }
        let out_bias = Buffer::from_slice(device, &weights.out_bias)?;
        run(ProductArgs {
            w: weights.out.pointer(),
            x: shift.at((norms.len() - 1) * steps * row),
            bias: out_bias.pointer(),
            y: self.out_bias.pointer(),
            rows: self.action_dim as i64,
            k: row as i64,
            x_stride: row as i64,
            y_stride: self.action_dim as i64,
            dtype: 1,
            ..ProductArgs::default()
        })?;
        stream.synchronize()?;
        self.modulation = Some(m);
        Ok(())
    }

    fn norm_row(&self, step: usize, norm: usize) -> usize {
        (norm * self.times.len() + step) * self.sizes.width
    }

    /// Address of the in-projection's bias at a step.
    pub fn in_bias(&self, step: usize) -> u64 {
        self.in_bias.at(step * self.sizes.width)
    }

    /// Address of the out-projection's bias at a step.
    pub fn out_bias(&self, step: usize) -> u64 {
        self.out_bias.at(step * self.action_dim)
    }

    /// Address of what norm number `index` (two a layer, then the final one) multiplies with at a step.
    pub fn scale(&self, norm: &ExpertNorm, step: usize, index: usize) -> u64 {
        match (norm, &self.modulation) {
            (ExpertNorm::Plain(weight), _) => weight.pointer(),
            (ExpertNorm::Adaptive { .. }, Some(m)) => m.scale.at(self.norm_row(step, index)),
            (ExpertNorm::Adaptive { .. }, None) => 0,
        }
    }

    /// Address of the residual gate that belongs to norm `index`, 0 for none.
    pub fn gate(&self, step: usize, index: usize) -> u64 {
        self.modulation.as_ref().map_or(0, |m| m.gate.at(self.norm_row(step, index)))
    }

    /// Addresses of the biases of a layer's attention projections and of its gate and up projections, 0 for none.
    pub fn biases(&self, step: usize, layer: usize) -> (u64, u64) {
        self.modulation.as_ref().map_or((0, 0), |m| {
            let at = layer * self.times.len() + step;
            (m.qkv_bias.at(at * self.sizes.qkv_rows), m.gate_up_bias.at(at * self.sizes.gate_up_rows))
        })
    }
}
