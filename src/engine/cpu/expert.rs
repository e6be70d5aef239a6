//! The decoder: cache, joint state and noise to a chunk of normalised actions.

use std::sync::Arc;

use super::workers::Parallelism;

use super::flow::{TimeTable, euler};
use super::gemma::{LayerKv, Rows, Scratch};
use super::math::{rms_norm, silu_all};
use super::matrix::{Into, Mat, MatMut, matmul};
use super::prefix::CpuCache;
use super::weights::{DecoderWeights, SuffixWeights, add_bias};
use super::workers::Workers;
use super::{check_finite, check_len};
use crate::engine::{DecodeInput, Decoder, EngineError, KvCache, guidance};
use crate::model::Dims;

/// Flow-matching steps a decode may take; far above any use, so that a wrong number cannot eat the memory.
const MAX_STEPS: usize = 1000;

/// The second stage on the CPU, with its own threads and scratch memory.
pub struct CpuDecoder {
    workers: Workers,
    pub(super) suffix: Suffix,
}

impl CpuDecoder {
    pub(super) fn new(dims: Dims, weights: Arc<DecoderWeights>, threads: usize) -> Result<Self, EngineError> {
        Ok(Self { workers: Workers::new("decoder", threads)?, suffix: Suffix::new(dims, weights) })
    }

    fn run(
        &mut self,
        cache: &CpuCache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
        velocities: Option<&mut Vec<f32>>,
    ) -> Result<(), EngineError> {
        self.suffix.check(cache, input, actions)?;
        let suffix = &mut self.suffix;
        self.workers.run(|threads| suffix.decode(threads, cache, input, actions, velocities));
        Ok(())
    }
}

impl Decoder for CpuDecoder {
    type Cache = CpuCache;

    fn decode(&mut self, cache: &CpuCache, input: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError> {
        self.run(cache, input, actions, None)
    }

    fn decode_with_velocities(
        &mut self,
        cache: &CpuCache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
    ) -> Result<Vec<f32>, EngineError> {
        let mut velocities = Vec::new();
        self.run(cache, input, actions, Some(&mut velocities))?;
        Ok(velocities)
    }
}

/// The suffix: the state row (π0 only) and the action rows, seen by the action expert.
pub(super) struct Suffix {
    dims: Dims,
    weights: Arc<DecoderWeights>,
    /// 1 for π0, 0 for π0.5.
    pub(super) state_rows: usize,
    table: Option<TimeTable>,
    pub(super) scratch: Scratch,
    /// Per layer: the state row, then the action rows.
    kv: Vec<LayerKv>,
    state_hidden: Vec<f32>,
    hidden: Vec<f32>,
    projected: Vec<f32>,
    mixed: Vec<f32>,
    velocity: Vec<f32>,
    guidance_weights: Vec<f32>,
}

impl Suffix {
    fn new(dims: Dims, weights: Arc<DecoderWeights>) -> Self {
        let state_rows = match weights.suffix {
            SuffixWeights::Pi0 { .. } => 1,
            SuffixWeights::Pi05 { .. } => 0,
        };
        let d = dims.expert;
        let rows = dims.horizon * d.width;
        Self {
            dims,
            weights,
            state_rows,
            table: None,
            scratch: Scratch::new(d),
            kv: vec![LayerKv::new(state_rows + dims.horizon, d.head_dim); d.layers],
            state_hidden: vec![0.0; d.width],
            hidden: vec![0.0; rows],
            projected: vec![0.0; rows],
            mixed: vec![0.0; rows],
            velocity: vec![0.0; dims.horizon * dims.action_dim],
            guidance_weights: vec![0.0; dims.horizon],
        }
    }

    fn check(&self, cache: &CpuCache, input: &DecodeInput<'_>, actions: &[f32]) -> Result<(), EngineError> {
        cache.check(&self.dims)?;
        let refuse = |what, expected: String, found: String| Err(EngineError::Shape { what, expected, found });
        if cache.is_empty() {
            return refuse("cache slot", "an encoded prefix".into(), "an empty slot (encode into it first)".into());
        }
        let chunk = self.dims.horizon * self.dims.action_dim;
        check_len("actions", actions, chunk)?;
        check_len("noise", input.noise, chunk)?;
        check_finite("noise", input.noise)?;
        if self.state_rows > 0 {
            check_len("state", input.state, self.dims.state_dim)?;
            check_finite("state", input.state)?;
        }
        if input.steps == 0 || input.steps > MAX_STEPS {
            return refuse("flow-matching steps", format!("1 to {MAX_STEPS}"), input.steps.to_string());
        }
        if let Some(guidance) = &input.guidance {
            let previous = guidance.previous;
            if !previous.len().is_multiple_of(self.dims.action_dim) || previous.len() > chunk {
                return refuse(
                    "previous chunk",
                    format!("at most {} rows of {} values", self.dims.horizon, self.dims.action_dim),
                    format!("{} values", previous.len()),
                );
            }
            check_finite("previous chunk", previous)?;
            if !guidance.max_weight.is_finite() || guidance.max_weight < 0.0 {
                return refuse("maximal guidance weight", "0 or more".into(), guidance.max_weight.to_string());
            }
        }
        Ok(())
    }

    /// All Euler steps. The input has been checked.
    fn decode(
        &mut self,
        threads: Parallelism,
        cache: &CpuCache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
        mut velocities: Option<&mut Vec<f32>>,
    ) {
        let table = match self.table.take() {
            Some(table) if table.steps() == input.steps => table,
            _ => TimeTable::new(&self.dims, &self.weights, input.steps),
        };
        self.scratch.reserve(self.dims.horizon, cache.rows + self.state_rows + self.dims.horizon);
        if let Some(g) = &input.guidance {
            let rows = g.previous.len() / self.dims.action_dim;
            let weights = &mut self.guidance_weights;
            guidance::row_weights(g.schedule, g.inference_delay, g.execution_horizon, rows, weights);
        }
        actions.copy_from_slice(input.noise);
        self.state_keys_values(threads, cache, input.state);
        for step in 0..input.steps {
            self.velocity(threads, cache, &table, step, actions);
            if let Some(all) = velocities.as_deref_mut() {
                all.extend_from_slice(&self.velocity);
            }
            if let Some(g) = &input.guidance {
                guidance::guide(g, &self.guidance_weights, table.times[step], actions, &mut self.velocity);
            }
            euler(actions, &self.velocity, input.steps);
        }
        self.table = Some(table);
    }

    /// The state row sees the prefix and itself, neither actions nor time: its keys and values hold for all steps.
    fn state_keys_values(&mut self, threads: Parallelism, cache: &CpuCache, state: &[f32]) {
        let (SuffixWeights::Pi0 { state: projection, .. }, 1) = (&self.weights.suffix, self.state_rows) else {
            return;
        };
        let d = self.dims.expert;
        projection.apply(threads, 1, state, &mut self.state_hidden);
        let mut row = Rows { hidden: &mut self.state_hidden, position: cache.rows };
        for (n, (layer, kv)) in self.weights.expert.iter().zip(&mut self.kv).enumerate() {
            let norms = [layer.input_norm.modulation(&[]), layer.post_norm.modulation(&[])];
            layer.write_keys_values(threads, &row, norms[0], kv, 0, &mut self.scratch);
            if n + 1 < d.layers {
                let visible = [cache.layers[n].first(cache.rows, d.head_dim), kv.first(1, d.head_dim)];
                layer.attend_and_feed(threads, &mut row, norms, &visible, &mut self.scratch);
            }
        }
    }

    /// The model's velocity at `x`, into `self.velocity`.
    fn velocity(&mut self, threads: Parallelism, cache: &CpuCache, table: &TimeTable, step: usize, x: &[f32]) {
        self.embed_actions(threads, table, step, x);
        let d = self.dims.expert;
        let weights = &self.weights;
        let suffix_rows = self.state_rows + self.dims.horizon;
        let mut rows = Rows { hidden: &mut self.hidden, position: cache.rows + self.state_rows };
        for (n, (layer, kv)) in weights.expert.iter().zip(&mut self.kv).enumerate() {
            let norms = [
                layer.input_norm.modulation(table.modulation(step, 2 * n)),
                layer.post_norm.modulation(table.modulation(step, 2 * n + 1)),
            ];
            layer.write_keys_values(threads, &rows, norms[0], kv, self.state_rows, &mut self.scratch);
            let visible = [cache.layers[n].first(cache.rows, d.head_dim), kv.first(suffix_rows, d.head_dim)];
            layer.attend_and_feed(threads, &mut rows, norms, &visible, &mut self.scratch);
        }
        let norm = weights.final_norm.modulation(table.modulation(step, 2 * d.layers));
        rms_norm(threads, rows.hidden, norm, &mut self.projected);
        weights.action_out.apply(threads, self.dims.horizon, &self.projected, &mut self.velocity);
    }

    /// Action tokens into `hidden`: for π0 the MLP of [action | time], for π0.5 the projection alone.
    fn embed_actions(&mut self, threads: Parallelism, table: &TimeTable, step: usize, x: &[f32]) {
        let (width, rows) = (self.dims.expert.width, self.dims.horizon);
        let weights = &self.weights;
        match &weights.suffix {
            SuffixWeights::Pi05 { .. } => weights.action_in.apply(threads, rows, x, &mut self.hidden),
            SuffixWeights::Pi0 { mlp_in, mlp_out, .. } => {
                weights.action_in.apply(threads, rows, x, &mut self.projected);
                matmul(
                    MatMut::new(&mut self.mixed, rows, width),
                    Into::Set,
                    1.0,
                    Mat::new(&self.projected, rows, width),
                    Mat::strided(&mlp_in.weight, width, width, 2 * width).t(),
                    threads,
                );
                add_bias(&mut self.mixed, table.bias(step));
                silu_all(&mut self.mixed);
                mlp_out.apply(threads, rows, &self.mixed, &mut self.hidden);
            }
        }
    }
}
