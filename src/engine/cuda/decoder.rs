//! The action expert: ten flow-matching steps as one graph.
//!
//! One cooperative kernel for all of it where plan.rs allows it (persistent.rs), otherwise five kernels a layer (launches.rs)
//! and one between steps, each started early enough to fetch its weights while the one in front still runs
//! (docs/performance.md). The state row of π0 rides along in the first step only: its keys and values depend on neither
//! actions nor time.

mod launches;

use std::collections::HashMap;
use std::sync::Arc;

use super::device::{Buffer, Pinned};
use super::encoder::CudaCache;
use super::kernels::{FlowArgs, PersistentArgs, Shape};
use super::lane::Lane;
use super::persistent::Persistent;
use super::plan::{self, PARTS, PORTABLE_ROWS, Packing, Path, SkinnyPlan, TILE, TOKEN_TILES};
use super::stream::{Event, Graph, Stream};
use super::time::Tables;
use super::weights::{DecoderWeights, ExpertSizes, Suffix};
use super::{Model, Tuning, check_finite, check_len};
use crate::engine::{DecodeInput, Decoder, EngineError, guidance};
use crate::model::{Dims, Family};

/// Most steps one decode may have.
const MAX_STEPS: usize = 64;
/// Floats that `DecodeParams` takes at the head of the input block.
const HEAD: usize = 8;
/// Graphs kept before all are dropped.
const KEPT_GRAPHS: usize = 16;

/// Where things lie in the input block, in floats after the head.
#[derive(Debug, Clone, Copy)]
struct Block {
    gains: usize,
    weights: usize,
    previous: usize,
    noise: usize,
    state: usize,
    len: usize,
}

impl Block {
    fn new(dims: &Dims) -> Self {
        let chunk = dims.horizon * dims.action_dim;
        let gains = HEAD;
        let weights = gains + MAX_STEPS;
        let previous = weights + dims.horizon;
        let noise = previous + chunk;
        let state = noise + chunk;
        Self { gains, weights, previous, noise, state, len: state + dims.state_dim }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    steps: usize,
    /// Keys a pass of the attention, or the variant of the persistent decoder, which reads their number.
    attention: usize,
}

struct Plans {
    qkv: SkinnyPlan,
    out: SkinnyPlan,
    gate_up: SkinnyPlan,
    down: SkinnyPlan,
    time: SkinnyPlan,
}

/// Parts in which the products that add to the residual leave the sums of its squares.
fn square_tiles(sizes: &ExpertSizes, path: Path) -> usize {
    sizes.width_rows / if path == Path::Portable { PORTABLE_ROWS } else { TILE }
}

/// The second stage on the GPU.
pub struct CudaDecoder {
    model: Arc<Model>,
    weights: Arc<DecoderWeights>,
    lane: Arc<Lane>,
    path: Path,
    stream: Stream,
    graphs: HashMap<Key, Graph>,
    tables: HashMap<usize, Tables>,
    tuning: Tuning,
    sizes: ExpertSizes,
    plans: Plans,
    tokens: usize,
    block: Block,
    input: Pinned<f32>,
    output: Pinned<f32>,
    inputs: Buffer<f32>,
    x: Buffer<f32>,
    velocities: Buffer<f32>,
    h: Buffer<f32>,
    /// The residual as a product reads it, and parts of its squares' sums; the persistent decoder has two of each, by turns.
    hb: [Buffer<u16>; 2],
    u: Buffer<u16>,
    attended: Buffer<u16>,
    gated: Buffer<u16>,
    q: Buffer<u16>,
    suffix_keys: Buffer<u16>,
    suffix_values: Buffer<u16>,
    squares: [Buffer<f32>; 2],
    /// What the parts of the portable attention leave.
    parts: Buffer<f32>,
    tops: Buffer<f32>,
    events: [Event; 2],
    persistent: Option<Persistent>,
}

impl CudaDecoder {
    pub(super) fn new(
        model: Arc<Model>,
        weights: Arc<DecoderWeights>,
        lane: Arc<Lane>,
        tuning: Tuning,
        path: Path,
    ) -> Result<Self, EngineError> {
        if path == Path::Portable {
            let _current = lane.enter()?;
            lane.kernels().portable()?;
        }
        let device = Arc::clone(&model.device);
        let dims = model.dims;
        let e = dims.expert;
        let sizes = ExpertSizes::new(&e);
        let suffix = plan::suffix_rows(&dims);
        let tokens = plan::token_tiles(suffix).unwrap_or(TOKEN_TILES.len() - 1);
        let tiles = TOKEN_TILES[tokens];
        let stride = 8 * tiles + 2;
        let s = tuning.slices;
        let plans = Plans {
            qkv: plan::skinny((e.heads + 2) * e.head_dim, e.width, tiles, s.qkv),
            out: plan::skinny(e.width, e.heads * e.head_dim, tiles, s.out),
            gate_up: plan::skinny(sizes.gate_up_rows, e.width, tiles, s.gate_up),
            down: plan::skinny(e.width, e.mlp, tiles, s.down),
            time: plan::skinny(e.width, e.width, tiles, s.out),
        };
        if path == Path::Hopper && weights.packing == Packing::General {
            for p in [&plans.qkv, &plans.out, &plans.gate_up, &plans.down, &plans.time] {
                p.check()?;
            }
        }
        let chunk = dims.horizon * dims.action_dim;
        let block = Block::new(&dims);
        let panel = |k: usize| Buffer::<u16>::zeroed(&device, k / 8 * stride.max(plan::PANEL_ROWS) * 8);
        let squares = || Buffer::zeroed(&device, plan::SQUARES.max(square_tiles(&sizes, path)) * 64);
        let parts = if path == Path::Portable { PARTS * suffix * e.heads } else { 0 };
        let stream = Stream::of(&lane, path)?;
        let persistent = match (weights.packing, path) {
            (Packing::General, _) => None,
            (Packing::Published, Path::Hopper) => {
                Some(Persistent::new(&lane, &stream, plan::clusters(&dims, tuning.clusters), tuning.delay)?)
            }
            (Packing::Published, Path::Portable) => {
                return Err(plan::packed_for_hopper());
            }
        };
        Ok(Self {
            stream,
            path,
            persistent,
            graphs: HashMap::new(),
            tables: HashMap::new(),
            tokens,
            block,
            input: Pinned::zeroed(&device, block.len)?,
            output: Pinned::zeroed(&device, chunk)?,
            inputs: Buffer::zeroed(&device, block.len)?,
            x: Buffer::zeroed(&device, chunk)?,
            velocities: Buffer::zeroed(&device, MAX_STEPS * chunk)?,
            h: Buffer::zeroed(&device, 64 * sizes.width)?,
            hb: [panel(sizes.width)?, panel(sizes.width)?],
            u: panel(sizes.width)?,
            attended: panel(sizes.attention)?,
            gated: panel(sizes.mlp)?,
            q: Buffer::zeroed(&device, 64 * e.heads * model.cache_row)?,
            suffix_keys: Buffer::zeroed(&device, e.layers * suffix * model.cache_row)?,
            suffix_values: Buffer::zeroed(&device, e.layers * suffix * model.cache_row)?,
            squares: [squares()?, squares()?],
            parts: Buffer::zeroed(&device, parts * e.head_dim)?,
            tops: Buffer::zeroed(&device, parts * 2)?,
            events: [Event::new(&lane)?, Event::new(&lane)?],
            sizes,
            plans,
            tuning,
            model,
            weights,
            lane,
        })
    }

    /// Milliseconds the last decode took on the GPU, upload and download included.
    pub fn last_ms(&self) -> Result<f32, EngineError> {
        let _current = self.lane.enter()?;
        self.events[1].ms_since(&self.events[0])
    }

    /// Blocks of the persistent decoder; none where it runs by launches.
    pub fn blocks(&self) -> Option<usize> {
        self.persistent.as_ref().map(Persistent::blocks)
    }

    /// Overwrites every working buffer with NaN patterns, so that a test sees a value nobody wrote.
    pub fn poison(&self) -> Result<(), EngineError> {
        self.x.fill(0xff)?;
        self.velocities.fill(0xff)?;
        self.q.fill(0xff)?;
        self.suffix_keys.fill(0xff)?;
        self.suffix_values.fill(0xff)?;
        self.parts.fill(0xff)?;
        self.tops.fill(0xff)?;
        self.squares.iter().try_for_each(|s| s.fill(0xff))
    }

    /// Keys and values that the last step left in a layer, `[suffix, head_dim]` each, the state row first: for
    /// comparison with an oracle.
    pub fn suffix_layer(&self, layer: usize) -> Result<[Vec<f32>; 2], EngineError> {
        let (row, used) = (self.model.cache_row, self.model.dims.expert.head_dim);
        let len = plan::suffix_rows(&self.model.dims) * row;
        let rows = |buffer: &Buffer<u16>| {
            let padded = buffer.read_bf16(layer * len, len)?;
            Ok::<_, EngineError>(padded.chunks_exact(row).flat_map(|r| &r[..used]).copied().collect())
        };
        Ok([rows(&self.suffix_keys)?, rows(&self.suffix_values)?])
    }

    fn has_state(&self) -> usize {
        usize::from(self.model.dims.family == Family::Pi0)
    }

    /// Queues everything between input block and actions.
    fn queue(&self, tables: &Tables, key: Key) -> Result<(), EngineError> {
        let dims = &self.model.dims;
        let steps = tables.times.len();
        if let Some(p) = &self.persistent {
            return p.decode(&self.lane, &self.stream, dims, steps, key.attention, self.persistent_args());
        }
        self.flow(tables, None)?;
        for step in 0..steps {
            let rows = dims.horizon + if step == 0 { self.has_state() } else { 0 };
            self.launches(tables, key, step, rows)?;
            self.flow(tables, Some(step))?;
        }
        Ok(())
    }

    fn persistent_args(&self) -> PersistentArgs {
        let at = |offset: usize| self.inputs.at(offset);
        let mut args = PersistentArgs {
            params: at(0),
            x: self.x.pointer(),
            velocities: self.velocities.pointer(),
            noise: at(self.block.noise),
            previous: at(self.block.previous),
            guidance: at(self.block.weights),
            gains: at(self.block.gains),
            state: at(self.block.state),
            out_w: self.weights.out.pointer(),
            rope: self.model.rope.pointer(),
            u: self.u.pointer(),
            hb: self.hb.each_ref().map(Buffer::pointer),
            q: self.q.pointer(),
            suffix_keys: self.suffix_keys.pointer(),
            suffix_values: self.suffix_values.pointer(),
            attended: self.attended.pointer(),
            gated: self.gated.pointer(),
            h: self.h.pointer(),
            squares: self.squares.each_ref().map(Buffer::pointer),
            ..PersistentArgs::default()
        };
        match &self.weights.suffix {
            Suffix::Pi0 { fold, out, out_bias, state, state_bias, .. } => {
                args.in_w = fold.pointer();
                args.state_w = state.pointer();
                args.state_b = state_bias.pointer();
                args.time_w = out.pointer();
                args.time_bias = out_bias.pointer();
            }
            Suffix::Pi05 { action, .. } => args.in_w = action.pointer(),
        }
        args
    }

    fn stride(&self) -> i32 {
        8 * TOKEN_TILES[self.tokens] as i32 + 2
    }

    fn square_tiles(&self) -> i32 {
        square_tiles(&self.sizes, self.path) as i32
    }

    /// Queues what lies between two steps by launches: before the first (`done` is none), after step `done`.
    fn flow(&self, tables: &Tables, done: Option<usize>) -> Result<(), EngineError> {
        let dims = &self.model.dims;
        let steps = tables.times.len();
        let next = done.map_or(0, |s| s + 1);
        let step = done.unwrap_or(0);
        let at = |offset: usize| self.inputs.at(offset);
        let final_index = 2 * self.weights.layers.len();
        let mut args = FlowArgs {
            x: self.x.pointer(),
            velocities: self.velocities.at(step * dims.horizon * dims.action_dim),
            noise: at(self.block.noise),
            previous: at(self.block.previous),
            weights: at(self.block.weights),
            gains: at(self.block.gains),
            state: at(self.block.state),
            params: at(0),
            h: self.h.pointer(),
            hb: self.hb[0].pointer(),
            u: self.u.pointer(),
            squares: self.squares[0].pointer(),
            out_w: self.weights.out.pointer(),
            out_b: tables.out_bias(step),
            out_scale: tables.scale(&self.weights.final_norm, step, final_index),
            inv_width: 1.0 / dims.expert.width as f32,
            time: tables.times[step] as f32,
            dt: (-1.0 / steps as f64) as f32,
            width: self.sizes.width as i32,
            horizon: dims.horizon as i32,
            action_dim: dims.action_dim as i32,
            state_dim: dims.state_dim as i32,
            stride: self.stride(),
            square_tiles: self.square_tiles(),
            step: done.map_or(-1, |s| s as i32),
            last: i32::from(next == steps),
            ..FlowArgs::default()
        };
        if next < steps {
            args.in_b = tables.in_bias(next);
            args.scale = tables.scale(&self.weights.layers[0].norm1, next, 0);
            match &self.weights.suffix {
                Suffix::Pi0 { fold, state, state_bias, .. } => {
                    args.in_w = fold.pointer();
                    args.state_w = state.pointer();
                    args.state_b = state_bias.pointer();
                }
                Suffix::Pi05 { action, .. } => {
                    args.in_w = action.pointer();
                    args.direct = 1;
                }
            }
        }
        let rows = dims.horizon + if done.is_none() { self.has_state() } else { 0 };
        let shape = Shape {
            shared: (self.sizes.width * 4) as u32,
            dependent: self.tuning.dependent && done.is_some(),
            ..Shape::blocks(rows, 256)
        };
        self.lane.kernels().flow.launch(&self.stream, shape, &args)
    }

    /// Fills the pinned input block.
    fn write_inputs(&mut self, cache: &CudaCache, input: &DecodeInput<'_>) -> Result<(), EngineError> {
        let dims = self.model.dims;
        let chunk = dims.horizon * dims.action_dim;
        check_len("noise", input.noise, chunk)?;
        check_finite("noise", input.noise)?;
        if dims.family == Family::Pi0 {
            check_len("joint state", input.state, dims.state_dim)?;
            check_finite("joint state", input.state)?;
        }
        let b = self.block;
        let block = self.input.as_mut_slice();
        let head: &mut [u32] = bytemuck::cast_slice_mut(&mut block[..HEAD]);
        let mut word = |at: usize, v: u32| head[at] = v;
        for (i, v) in [cache.keys(), cache.values(), cache.layer_stride() as u64].into_iter().enumerate() {
            word(2 * i, v as u32);
            word(2 * i + 1, (v >> 32) as u32);
        }
        word(6, cache.rows as u32);
        word(7, u32::from(input.guidance.is_some()));
        block[b.gains..b.noise].fill(0.0);
        block[b.noise..b.state].copy_from_slice(input.noise);
        if dims.family == Family::Pi0 {
            block[b.state..].copy_from_slice(input.state);
        }
        let Some(g) = &input.guidance else { return Ok(()) };
        if g.previous.len() % dims.action_dim != 0 {
            return Err(EngineError::Shape {
                what: "previous chunk",
                expected: format!("rows of {} values", dims.action_dim),
                found: format!("{} values", g.previous.len()),
            });
        }
        check_finite("previous chunk", g.previous)?;
        let kept = g.previous.len().min(chunk);
        block[b.previous..b.previous + kept].copy_from_slice(&g.previous[..kept]);
        let weights = &mut block[b.weights..b.previous];
        guidance::row_weights(g.schedule, g.inference_delay, g.execution_horizon, kept / dims.action_dim, weights);
        for k in 0..input.steps {
            let t = 1.0 - k as f64 / input.steps as f64;
            block[b.gains + k] = guidance::gain(t, g.max_weight);
        }
        Ok(())
    }

    fn run(&mut self, cache: &CudaCache, input: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError> {
        let _current = self.lane.enter()?;
        let dims = self.model.dims;
        check_len("actions", actions, dims.horizon * dims.action_dim)?;
        if input.steps == 0 || input.steps > MAX_STEPS {
            return Err(EngineError::Shape {
                what: "flow-matching steps",
                expected: format!("1 to {MAX_STEPS}"),
                found: input.steps.to_string(),
            });
        }
        if cache.rows == 0 {
            return Err(EngineError::Shape {
                what: "cache slot",
                expected: "an encoded prefix".into(),
                found: "nothing".into(),
            });
        }
        let keys = cache.rows + plan::suffix_rows(&dims);
        if keys > self.model.positions {
            return Err(EngineError::Shape {
                what: "cache slot",
                expected: format!("at most {} positions with the suffix", self.model.positions),
                found: keys.to_string(),
            });
        }
        self.write_inputs(cache, input)?;
        let attention = match &self.persistent {
            Some(p) => plan::persistent(cache.rows, p.blocks() / plan::RANKS),
            None => plan::decode_attention(keys, self.model.decode_head.1).0,
        };
        let key = Key { steps: input.steps, attention };
        if !self.tables.contains_key(&input.steps) {
            let tables = Tables::new(&self.model.device, &dims, &self.weights, input.steps)?;
            self.tables.insert(input.steps, tables);
        }
        if !self.graphs.contains_key(&key) {
            if self.graphs.len() >= KEPT_GRAPHS {
                self.graphs.clear();
            }
            if let Some(tables) = self.tables.get(&input.steps) {
                if let Some(p) = &mut self.persistent {
                    p.prepare(&self.model.device, &self.weights, tables)?;
                }
                let graph = self.stream.capture(|| {
                    self.stream.upload(&self.input, self.block.len, &self.inputs, 0)?;
                    self.queue(tables, key)?;
                    self.stream.download(&self.x, actions.len(), &self.output)
                })?;
                self.graphs.insert(key, graph);
                self.model.device.log_memory("decoder captured");
            }
        }
        let device = Arc::clone(self.lane.device());
        let _decoding = device.decoding();
        if let Some(graph) = self.graphs.get(&key) {
            self.stream.record(&self.events[0])?;
            self.stream.launch_graph(graph)?;
            self.stream.record(&self.events[1])?;
        }
        let ended = self.stream.synchronize();
        match &self.persistent {
            Some(p) => p.check(ended)?,
            None => ended?,
        }
        actions.copy_from_slice(self.output.as_slice());
        Ok(())
    }
}

impl Decoder for CudaDecoder {
    type Cache = CudaCache;

    fn decode(&mut self, cache: &CudaCache, input: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError> {
        self.run(cache, input, actions)
    }

    fn decode_with_velocities(
        &mut self,
        cache: &CudaCache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
    ) -> Result<Vec<f32>, EngineError> {
        self.run(cache, input, actions)?;
        let mut velocities = vec![0.0; input.steps * actions.len()];
        self.velocities.read(0, &mut velocities)?;
        Ok(velocities)
    }
}
