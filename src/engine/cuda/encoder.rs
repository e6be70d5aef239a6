//! Images and prompt to keys and values: SigLIP over all views at once, then the prefix trunk.
//!
//! Large products go to cuBLASLt, tower.cu or geglu_wide.cu, attention to attention_vision.cu, attention_wide.cu or attention.cu, the
//! rest is pointwise.cu. The residual streams stay in float32.

use std::collections::HashMap;
use std::sync::Arc;

use super::Model;
use super::device::{Buffer, Device, Pinned, Span};
use super::images::Images;
use super::kernels::{
    AttentionArgs, GegluArgs, GegluWideArgs, Hopper, Kernels, NormArgs, PlacedArgs, RopeArgs, Shape, TowerArgs,
    TowerBeginArgs,
};
use super::lane::Lane;
use super::lt::{Epilogue, Key, Lt, Operands, Scratch};
use super::plan::{self, HEAD_DIMS, Path, TOWER_K, TOWER_TILE, TowerKind};
use super::stream::{Event, Graph, Stream};
use super::weights::{
    EncoderWeights, Folded, LayerNorm, MAX_VIEWS, Tower, TowerLayer, TrunkLayer, TrunkRest, VisionLayer,
};
use crate::engine::{EncodeInput, Encoder, EngineError, KvCache};
use crate::model::Dims;

/// Graphs of the trunk that are kept, one for each number of rows; prefixes of further lengths do without.
const KEPT_GRAPHS: usize = 64;

/// What norms add to the variance.
const EPSILON: f32 = 1e-6;

/// Keys and values of one prefix on the device, `[layers, capacity, row]` each, of which `head_dim` are used.
pub struct CudaCache {
    keys: Buffer<u16>,
    values: Buffer<u16>,
    capacity: usize,
    head_dim: usize,
    row: usize,
    pub(super) rows: usize,
}

impl CudaCache {
    /// `row`: elements from one row to the next.
    pub(super) fn new(device: &Arc<Device>, dims: &Dims, capacity: usize, row: usize) -> Result<Self, EngineError> {
        let len = dims.trunk.layers * capacity * row;
        Ok(Self {
            keys: Buffer::zeroed(device, len)?,
            values: Buffer::zeroed(device, len)?,
            capacity,
            head_dim: dims.trunk.head_dim,
            row,
            rows: 0,
        })
    }

    pub(super) fn keys(&self) -> u64 {
        self.keys.pointer()
    }

    pub(super) fn values(&self) -> u64 {
        self.values.pointer()
    }

    /// Elements between layers.
    pub(super) fn layer_stride(&self) -> usize {
        self.capacity * self.row
    }

    /// Keys and values of a layer, `[rows, head_dim]` each: for comparison with an oracle.
    pub fn layer(&self, layer: usize) -> Result<[Vec<f32>; 2], EngineError> {
        let (at, len) = (layer * self.layer_stride(), self.rows * self.row);
        let used = |padded: Vec<f32>| {
            padded.chunks_exact(self.row).flat_map(|r| &r[..self.head_dim]).copied().collect::<Vec<f32>>()
        };
        Ok([used(self.keys.read_bf16(at, len)?), used(self.values.read_bf16(at, len)?)])
    }

    /// A planted fault: key `row` of every layer becomes that of the row before it.
    pub fn drop_key(&mut self, row: usize) -> Result<(), EngineError> {
        let mut line = vec![0u16; self.head_dim];
        for start in (0..self.keys.len()).step_by(self.layer_stride()) {
            for buffer in [&self.keys, &self.values] {
                buffer.read(start + (row - 1) * self.row, &mut line)?;
                buffer.write(start + row * self.row, &line)?;
            }
        }
        Ok(())
    }

    /// A planted fault: pretends the prefix had `rows` rows.
    pub fn set_rows(&mut self, rows: usize) {
        self.rows = rows;
    }
}

impl KvCache for CudaCache {
    fn len(&self) -> usize {
        self.rows
    }

    /// NaN patterns.
    fn poison(&mut self) -> Result<(), EngineError> {
        self.rows = 0;
        self.keys.fill(0xff)?;
        self.values.fill(0xff)
    }
}

/// Activations for up to `views` views and `rows` prefix rows.
struct Workspace {
    views: usize,
    rows: usize,
    patches: Buffer<u16>,
    vision: Buffer<f32>,
    vision_normed: Buffer<u16>,
    vision_qkv: Buffer<u16>,
    vision_attended: Buffer<u16>,
    vision_mlp: Buffer<u16>,
    /// For tower.cu: sums and sums of squares that attention's output projection leaves of the residual, and those that
    /// the MLP leaves.
    vision_moments: [Buffer<f32>; 2],
    /// The same of the trunk's residual before a product: for tower.cu, then for geglu_wide.cu.
    moments: Buffer<f32>,
    x: Buffer<f32>,
    /// What a layer adds to x, in parts.
    parts: Buffer<f32>,
    normed: Buffer<u16>,
    qkv: Buffer<u16>,
    attended: Buffer<u16>,
    gate_up: Buffer<u16>,
    mlp: Buffer<u16>,
}

impl Workspace {
    fn new(
        device: &Arc<Device>,
        dims: &Dims,
        weights: &EncoderWeights,
        views: usize,
        rows: usize,
    ) -> Result<Self, EngineError> {
        let (v, t) = (&dims.vision, &dims.trunk);
        let tokens = views * v.tokens();
        let half = |n: usize| Buffer::<u16>::zeroed(device, n);
        let packed = weights.tower_packed();
        let moments = || Buffer::zeroed(device, if packed { 2 * v.width / TOWER_TILE * tokens } else { 0 });
        Ok(Self {
            views,
            rows,
            patches: half(tokens * plan::patch_stride(dims))?,
            vision: Buffer::zeroed(device, tokens * v.width)?,
            vision_normed: half(tokens * v.width)?,
            vision_qkv: half(tokens * 3 * v.width)?,
            vision_attended: half(tokens * v.width)?,
            vision_mlp: half(tokens * if packed { plan::tower_pad(v.mlp) } else { v.mlp })?,
            vision_moments: [moments()?, moments()?],
            x: Buffer::zeroed(device, rows * t.width)?,
            parts: Buffer::zeroed(device, plan::part_rows(rows, t.mlp, t.width) * t.width)?,
            normed: half(rows.next_multiple_of(8) * t.width)?,
            qkv: half(rows * (t.heads + 2) * t.head_dim)?,
            attended: half(rows.next_multiple_of(8) * t.heads * t.head_dim)?,
            moments: Buffer::zeroed(device, if weights.wide_trunk { 2 * t.width / TOWER_TILE * rows } else { 0 })?,
            gate_up: half(if weights.wide_trunk { 0 } else { rows * 2 * t.mlp })?,
            mlp: half(rows * t.mlp)?,
        })
    }

    /// What products may be timed on while no encode is under way.
    fn scratch<'a>(&'a self, weights: &'a EncoderWeights) -> Scratch<'a> {
        let largest = |a: Span<'a>, b: Span<'a>| if a.bytes > b.bytes { a } else { b };
        let out = largest(self.gate_up.span(), largest(self.parts.span(), self.x.span()));
        Scratch { weights: weights.tower_room.span(), rows: self.mlp.span(), out }
    }
}

/// GPU times of the last encode in milliseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeTimes {
    /// Upload and conversion of the frames.
    pub images: f32,
    /// SigLIP and projector.
    pub vision: f32,
    /// Prefix trunk.
    pub trunk: f32,
}

/// The residual stream after every layer, `[rows, width]` each: for comparison with an oracle.
#[derive(Debug, Default)]
pub struct EncodeTaps {
    /// SigLIP, all layers.
    pub vision: Vec<Vec<f32>>,
    /// Trunk, all layers but the last, which makes keys and values only.
    pub trunk: Vec<Vec<f32>>,
}

/// The first stage on the GPU.
pub struct CudaEncoder {
    model: Arc<Model>,
    weights: Arc<EncoderWeights>,
    lane: Arc<Lane>,
    path: Path,
    stream: Stream,
    lt: Lt,
    images: Images,
    workspace: Option<Workspace>,
    /// By views.
    vision_graphs: HashMap<usize, Graph>,
    /// By rows.
    trunk_graphs: HashMap<usize, Graph>,
    params: Buffer<u64>,
    prompt: Vec<u32>,
    prompt_rows: (Pinned<f32>, Buffer<f32>),
    events: [Event; 4],
}

impl CudaEncoder {
    pub(super) fn new(
        model: Arc<Model>,
        weights: Arc<EncoderWeights>,
        lane: Arc<Lane>,
        other: Option<Arc<Lane>>,
        path: Path,
    ) -> Result<Self, EngineError> {
        if (weights.wide_trunk || weights.tower_packed()) && path == Path::Portable {
            return Err(plan::packed_for_hopper());
        }
        let device = Arc::clone(&model.device);
        let v = &model.dims.vision;
        let images = Images::new(&device, v.image, v.patch, plan::patch_stride(&model.dims), model.resampler);
        let event = || Event::new(&lane);
        Ok(Self {
            path,
            stream: Stream::of(&lane, path)?,
            lt: Lt::new(&lane, other, Arc::clone(&model.algorithms))?,
            images,
            workspace: None,
            vision_graphs: HashMap::new(),
            trunk_graphs: HashMap::new(),
            params: Buffer::zeroed(&device, 3)?,
            prompt: Vec::new(),
            prompt_rows: (Pinned::zeroed(&device, 0)?, Buffer::zeroed(&device, 0)?),
            events: [event()?, event()?, event()?, event()?],
            model,
            weights,
            lane,
        })
    }

    /// Times of the last encode.
    pub fn last_times(&self) -> Result<EncodeTimes, EngineError> {
        let _current = self.lane.enter()?;
        let [start, images, vision, trunk] = &self.events;
        Ok(EncodeTimes {
            images: images.ms_since(start)?,
            vision: vision.ms_since(images)?,
            trunk: trunk.ms_since(vision)?,
        })
    }

    /// Overwrites every working buffer with NaN patterns, so that a test sees a value nobody wrote.
    pub fn poison(&mut self) -> Result<(), EngineError> {
        let Some(w) = &self.workspace else { return Ok(()) };
        for b in [
            &w.vision_normed,
            &w.vision_qkv,
            &w.vision_attended,
            &w.vision_mlp,
            &w.normed,
            &w.qkv,
            &w.attended,
            &w.gate_up,
            &w.mlp,
        ] {
            b.fill(0xff)?;
        }
        for b in [&w.vision, &w.x, &w.parts, &w.vision_moments[0], &w.vision_moments[1], &w.moments] {
            b.fill(0xff)?;
        }
        Ok(())
    }

    /// The patches of the last encode as bf16 bits, `[views · tokens, patch_stride]`: for tests of the image kernel.
    pub fn patches(&self, views: usize) -> Result<(Vec<u16>, usize), EngineError> {
        let stride = plan::patch_stride(&self.model.dims);
        let mut out = vec![0; views * self.model.dims.vision.tokens() * stride];
        if let Some(w) = &self.workspace {
            w.patches.read(0, &mut out)?;
        }
        Ok((out, stride))
    }

    fn check(&self, input: &EncodeInput<'_>, cache: &CudaCache) -> Result<usize, EngineError> {
        let dims = &self.model.dims;
        let wrong =
            |what, expected: String, found: usize| EngineError::Shape { what, expected, found: found.to_string() };
        if input.views.is_empty() || input.views.len() > MAX_VIEWS {
            return Err(wrong("views", format!("1 to {MAX_VIEWS}"), input.views.len()));
        }
        if input.tokens.is_empty() {
            return Err(wrong("prompt tokens", "at least 1".into(), 0));
        }
        if let Some(t) = input.tokens.iter().find(|t| **t as usize >= dims.vocab) {
            return Err(wrong("prompt token", format!("below the vocabulary of {}", dims.vocab), *t as usize));
        }
        let rows = input.views.len() * dims.vision.tokens() + input.tokens.len();
        if rows > cache.capacity {
            return Err(wrong("prefix rows", format!("at most {} in this cache slot", cache.capacity), rows));
        }
        if rows > self.model.positions {
            return Err(wrong("prefix rows", format!("at most {}", self.model.positions), rows));
        }
        Ok(rows)
    }

    /// Grows the buffers; graphs that point into the old ones go with them.
    fn reserve(&mut self, views: usize, rows: usize) -> Result<(), EngineError> {
        if self.workspace.as_ref().is_some_and(|w| w.views >= views && w.rows >= rows) {
            return Ok(());
        }
        self.stream.synchronize()?;
        self.vision_graphs.clear();
        self.trunk_graphs.clear();
        let (views, rows) = self.workspace.as_ref().map_or((views, rows), |w| (w.views.max(views), w.rows.max(rows)));
        self.workspace = None;
        self.workspace = Some(Workspace::new(&self.model.device, &self.model.dims, &self.weights, views, rows)?);
        self.model.device.log_memory("encoder's buffers made");
        Ok(())
    }

    /// Room for that many rows of a prompt.
    fn reserve_prompt(&mut self, tokens: usize) -> Result<(), EngineError> {
        let needed = tokens * self.model.dims.trunk.width;
        if self.prompt_rows.1.len() < needed {
            self.stream.synchronize()?;
            self.prompt.clear();
            let device = &self.model.device;
            self.prompt_rows = (Pinned::zeroed(device, needed)?, Buffer::zeroed(device, needed)?);
        }
        Ok(())
    }

    /// Embeds the prompt and queues its upload, if it is not the one already there. The GPU has the images to work on
    /// meanwhile.
    fn embed(&mut self, tokens: &[u32], rows: usize) -> Result<(), EngineError> {
        if self.prompt == tokens {
            return Ok(());
        }
        let width = self.model.dims.trunk.width;
        self.prompt.clear();
        for (token, row) in tokens.iter().zip(self.prompt_rows.0.as_mut_slice().chunks_exact_mut(width)) {
            self.weights.tokens.embed(*token, row)?;
        }
        self.stream.upload(&self.prompt_rows.0, tokens.len() * width, &self.prompt_rows.1, 0)?;
        self.prompt.extend_from_slice(tokens);
        // Behind the rows that the tower writes.
        let Some(w) = &self.workspace else { return Ok(()) };
        self.stream.copy(&self.prompt_rows.1, tokens.len() * width, &w.x, (rows - tokens.len()) * width)
    }

    /// What queues this stage's kernels; `None` before there are buffers.
    fn queue<'a>(&'a mut self, taps: Option<&'a mut Vec<Vec<f32>>>) -> Option<Queue<'a>> {
        Some(Queue {
            model: &self.model,
            weights: &self.weights,
            path: self.path,
            sms: self.lane.sms(),
            stream: &self.stream,
            kernels: self.lane.kernels(),
            lt: &mut self.lt,
            w: self.workspace.as_ref()?,
            params: self.params.pointer(),
            taps,
        })
    }

    /// Plans of both halves, and the tower's graph, where a shape has none.
    fn plan(&mut self, views: usize, rows: usize) -> Result<(), EngineError> {
        let captured = self.vision_graphs.contains_key(&views);
        let Some(mut queue) = self.queue(None) else { return Ok(()) };
        let keys = queue.trunk_keys(rows);
        queue.lt.plan(queue.stream, &keys, &queue.w.scratch(queue.weights))?;
        if !captured {
            queue.prepare_vision(views, false)?;
            let graph = queue.stream.capture(|| queue.vision(views))?;
            self.vision_graphs.insert(views, graph);
            self.model.device.log_memory("tower captured");
        }
        Ok(())
    }

    /// Queues work in the lane's context and waits for its end, also after an error: when this returns nothing reads
    /// page-locked memory any more, neither the encoder's own nor that of the frames, which the caller may then free.
    fn settled<R>(&mut self, queue: impl FnOnce(&mut Self) -> Result<R, EngineError>) -> Result<R, EngineError> {
        let lane = Arc::clone(&self.lane);
        let _current = lane.enter()?;
        let queued = queue(self);
        self.stream.synchronize()?;
        queued
    }

    /// Everything up to the launch of the graphs but the prompt; returns the prefix rows.
    fn begin(&mut self, input: &EncodeInput<'_>, cache: &mut CudaCache) -> Result<usize, EngineError> {
        let rows = self.check(input, cache)?;
        cache.rows = 0;
        let (views, tokens) = (input.views.len(), input.tokens.len());
        self.reserve(views, rows)?;
        self.reserve_prompt(tokens)?;
        self.plan(views, rows)?;
        self.stream.record(&self.events[0])?;
        if let Some(w) = &self.workspace {
            let width = self.model.dims.trunk.width;
            let placed = PlacedArgs {
                prompt: self.prompt_rows.1.pointer(),
                prompt_to: w.x.at((rows - tokens) * width),
                prompt_count: if self.prompt == input.tokens { (tokens * width / 4) as i64 } else { 0 },
                params: self.params.pointer(),
                words: [cache.keys(), cache.values(), cache.layer_stride() as u64],
            };
            let vision_tokens = self.model.dims.vision.tokens();
            self.images.queue(&self.stream, self.lane.kernels(), input.views, &w.patches, vision_tokens, placed)?;
        }
        self.stream.record(&self.events[1])?;
        Ok(rows)
    }

    /// As [`Encoder::encode`], without graphs, and returns what every layer left.
    pub fn encode_with_taps(
        &mut self,
        input: &EncodeInput<'_>,
        cache: &mut CudaCache,
    ) -> Result<EncodeTaps, EngineError> {
        let mut taps = EncodeTaps::default();
        let rows = self.settled(|e| {
            let rows = e.begin(input, cache)?;
            e.embed(input.tokens, rows)?;
            if let Some(mut queue) = e.queue(Some(&mut taps.vision)) {
                queue.vision(input.views.len())?;
                queue.taps = Some(&mut taps.trunk);
                queue.trunk(rows)?;
            }
            Ok(rows)
        })?;
        cache.rows = rows;
        Ok(taps)
    }

    fn launch_vision(&self, views: usize) -> Result<(), EngineError> {
        if let Some(graph) = self.vision_graphs.get(&views) {
            self.stream.launch_graph(graph)?;
        }
        self.stream.record(&self.events[2])
    }

    /// By a graph, which saves 0.08 ms of 8.6. Where there is none, kernel by kernel, and the graph is made while the GPU works:
    /// a prompt of another length makes no frame late.
    fn launch_trunk(&mut self, rows: usize) -> Result<(), EngineError> {
        if let Some(graph) = self.trunk_graphs.get(&rows) {
            self.stream.launch_graph(graph)?;
            return self.stream.record(&self.events[3]);
        }
        if let Some(mut queue) = self.queue(None) {
            queue.trunk(rows)?;
        }
        self.stream.record(&self.events[3])?;
        if self.trunk_graphs.len() < KEPT_GRAPHS
            && let Some(mut queue) = self.queue(None)
        {
            let graph = queue.stream.capture(|| queue.trunk(rows))?;
            self.trunk_graphs.insert(rows, graph);
            self.model.device.log_memory("trunk captured");
        }
        Ok(())
    }
}

impl Encoder for CudaEncoder {
    type Cache = CudaCache;

    fn prepare(&mut self, views: usize, tokens: usize, most: usize, idle: bool) -> Result<(), EngineError> {
        let (images, most) = (views * self.model.dims.vision.tokens(), most.max(tokens));
        self.settled(|e| {
            e.reserve(views, images + most)?;
            e.reserve_prompt(most)?;
            let Some(mut queue) = e.queue(None) else { return Ok(()) };
            queue.prepare_vision(views, idle)?;
            let (scratch, stream) = (queue.w.scratch(queue.weights), queue.stream);
            queue.lt.prepare(stream, &queue.trunk_keys(images + tokens), &scratch, idle)?;
            let others: Vec<_> = (images + 1..=images + most).flat_map(|rows| queue.trunk_keys(rows)).collect();
            queue.lt.prepare_roughly(stream, &others, &scratch, idle)
        })
    }

    fn encode(&mut self, input: &EncodeInput<'_>, cache: &mut CudaCache) -> Result<(), EngineError> {
        cache.rows = self.settled(|e| {
            let rows = e.begin(input, cache)?;
            e.launch_vision(input.views.len())?;
            e.embed(input.tokens, rows)?;
            e.launch_trunk(rows)?;
            Ok(rows)
        })?;
        Ok(())
    }

    fn encode_with_embeddings(
        &mut self,
        input: &EncodeInput<'_>,
        cache: &mut CudaCache,
    ) -> Result<Vec<f32>, EngineError> {
        let rows = self.settled(|e| {
            let rows = e.begin(input, cache)?;
            e.launch_vision(input.views.len())?;
            e.embed(input.tokens, rows)?;
            Ok(rows)
        })?;
        let mut embeddings = vec![0.0; rows * self.model.dims.trunk.width];
        if let Some(w) = &self.workspace {
            w.x.read(0, &mut embeddings)?;
        }
        self.settled(|e| e.launch_trunk(rows))?;
        cache.rows = rows;
        Ok(embeddings)
    }
}

/// Queues the stage's kernels on a stream, captured or not.
struct Queue<'a> {
    model: &'a Model,
    weights: &'a EncoderWeights,
    path: Path,
    /// Multiprocessors of the stage's share.
    sms: usize,
    stream: &'a Stream,
    kernels: &'a Kernels,
    lt: &'a mut Lt,
    w: &'a Workspace,
    params: u64,
    /// Where the residual goes after every layer; none but for comparison with an oracle.
    taps: Option<&'a mut Vec<Vec<f32>>>,
}

impl Queue<'_> {
    fn tap(&mut self, residual: &Buffer<f32>, len: usize) -> Result<(), EngineError> {
        let Some(taps) = &mut self.taps else { return Ok(()) };
        self.stream.synchronize()?;
        let mut values = vec![0.0; len];
        residual.read(0, &mut values)?;
        taps.push(values);
        Ok(())
    }

    fn product(
        &mut self,
        rows: usize,
        outputs: usize,
        k: usize,
        epilogue: Epilogue,
        o: Operands,
    ) -> Result<(), EngineError> {
        self.lt.run(self.stream, Key { rows, outputs, k, epilogue }, o)
    }

    /// Plans for every product of the tower that is the library's: it may not be asked during a capture.
    fn prepare_vision(&mut self, views: usize, idle: bool) -> Result<(), EngineError> {
        let v = &self.model.dims.vision;
        let rows = views * v.tokens();
        let keys = [
            (v.width, plan::patch_stride(&self.model.dims), Epilogue::Add),
            (self.model.dims.trunk.width, v.width, Epilogue::WideBias),
            (3 * v.width, v.width, Epilogue::Bias),
            (v.width, v.width, Epilogue::AddBias),
            (v.mlp, v.width, Epilogue::BiasGelu),
            (v.width, v.mlp, Epilogue::AddBias),
        ]
        .map(|(outputs, k, epilogue)| Key { rows, outputs, k, epilogue });
        let own = if self.weights.tower_packed() { 4 } else { 0 };
        self.lt.prepare(self.stream, &keys[..keys.len() - own], &self.w.scratch(self.weights), idle)
    }

    /// The products of the trunk that are the library's.
    fn trunk_keys(&self, rows: usize) -> Vec<Key> {
        let t = &self.model.dims.trunk;
        let attention = t.heads * t.head_dim;
        let (_, down) = self.down(rows);
        let keys = [
            (t.width, t.mlp, down),
            (attention + 2 * t.head_dim, t.width, Epilogue::Store),
            (2 * t.head_dim, t.width, Epilogue::Store),
            (t.width, attention, Epilogue::Add),
            (2 * t.mlp, t.width, Epilogue::Store),
        ]
        .map(|(outputs, k, epilogue)| Key { rows, outputs, k, epilogue });
        let own = if self.weights.wide_trunk { 4 } else { 0 };
        keys[..keys.len() - own].to_vec()
    }

    /// How the down product of a trunk layer and the norm behind it share the work: index into [`plan::NORM_PARTS`].
    fn down(&self, rows: usize) -> (usize, Epilogue) {
        let t = &self.model.dims.trunk;
        let variant = plan::norm_parts(rows, t.mlp, t.width);
        match plan::NORM_PARTS[variant] {
            0 => (variant, Epilogue::Add),
            parts => (variant, Epilogue::Parts(parts)),
        }
    }

    fn layer_norm(
        &self,
        x: &Buffer<f32>,
        y: &Buffer<u16>,
        norm: &LayerNorm,
        rows: usize,
        width: usize,
    ) -> Result<(), EngineError> {
        let args = NormArgs {
            x: x.pointer(),
            parts: 0,
            y: y.pointer(),
            scale: norm.scale.pointer(),
            shift: norm.shift.pointer(),
            width: width as i32,
            inv_width: 1.0 / width as f32,
            eps: EPSILON,
            ..NormArgs::default()
        };
        self.kernels.norm[0].launch(self.stream, Shape::blocks(rows, plan::norm_threads(width)), &args)
    }

    /// The trunk's norm, behind the sum of x and the parts of `variant` of [`plan::NORM_PARTS`]; or what is left of it where
    /// tower.cu folds it in.
    fn rms_norm(&self, scale: &Buffer<f32>, rows: usize, variant: usize) -> Result<(), EngineError> {
        let width = self.model.dims.trunk.width;
        let args = NormArgs {
            x: self.w.x.pointer(),
            parts: self.w.parts.pointer(),
            y: self.w.normed.pointer(),
            scale: scale.pointer(),
            shift: 0,
            width: width as i32,
            inv_width: 1.0 / width as f32,
            eps: EPSILON,
            moments: self.w.moments.pointer(),
            octets: rows.div_ceil(8) as i32,
        };
        let kernels = if self.weights.wide_trunk { &self.kernels.packed } else { &self.kernels.norm };
        kernels[variant].launch(self.stream, Shape::blocks(rows, plan::norm_threads(width)), &args)
    }

    /// Queries of a trunk layer to qkv, its keys and values to the cache; the last layer has no queries.
    fn projected(&mut self, layer: &TrunkLayer, l: usize, rows: usize) -> Result<(), EngineError> {
        let (t, w) = (self.model.dims.trunk, self.w);
        let (x, qkv, rope) = (w.normed.pointer(), w.qkv.pointer(), self.model.rope.pointer());
        let heads = if layer.rest.is_some() { t.heads } else { 0 };
        let outputs = (heads + 2) * t.head_dim;
        if self.weights.wide_trunk {
            let Some(hopper) = self.kernels.hopper() else { return Err(plan::packed_for_hopper()) };
            let args = TowerArgs {
                w: layer.qkv.pointer(),
                x,
                moments: w.moments.pointer(),
                y: qkv,
                heads: heads as i32,
                layer: l as i32,
                cache_row: self.model.cache_row as i32,
                rope,
                params: self.params,
                ..TowerArgs::default()
            };
            return self.tower_product(hopper, TowerKind::Rotated, [rows, outputs, t.width], args);
        }
        let o = Operands { w: layer.qkv.pointer(), x, bias: 0, c: qkv, d: qkv };
        self.product(rows, outputs, t.width, Epilogue::Store, o)?;
        let args = RopeArgs {
            qkv,
            rope,
            params: self.params,
            rows: rows as i32,
            heads: heads as i32,
            head_dim: t.head_dim as i32,
            layer: l as i32,
            cache_row: self.model.cache_row as i32,
        };
        self.kernels.rope.launch(self.stream, Shape::items(rows * outputs / 8, 256), &args)
    }

    /// What follows the trunk's attention up to the MLP's hidden layer: x += out·attended, mlp = gelu(gate) ⊙ up of x
    /// behind its norm.
    fn gated(&mut self, rest: &TrunkRest, rows: usize) -> Result<(), EngineError> {
        let (t, w) = (self.model.dims.trunk, self.w);
        let (x, attention) = (w.x.pointer(), t.heads * t.head_dim);
        let o = Operands { w: rest.out.pointer(), x: w.attended.pointer(), bias: 0, c: x, d: x };
        self.product(rows, t.width, attention, Epilogue::Add, o)?;
        self.rms_norm(&rest.norm2, rows, 0)?;
        let gate_up = w.gate_up.pointer();
        let o = Operands { w: rest.gate_up.pointer(), x: w.normed.pointer(), bias: 0, c: gate_up, d: gate_up };
        self.product(rows, 2 * t.mlp, t.width, Epilogue::Store, o)?;
        let geglu = GegluArgs { gate_up, y: w.mlp.pointer(), rows: rows as i32, mlp: t.mlp as i32 };
        self.kernels.geglu.launch(self.stream, Shape::items(rows * t.mlp / 8, 256), &geglu)
    }

    /// The same by tower.cu and geglu_wide.cu, which fold the norm in; attention has left its result packed.
    fn gated_wide(&mut self, rest: &TrunkRest, rows: usize) -> Result<(), EngineError> {
        let (t, w) = (self.model.dims.trunk, self.w);
        let wide = plan::geglu_wide(rows, t.mlp, t.width, self.sms);
        let (Some(plan), Some(hopper)) = (wide, self.kernels.hopper()) else {
            return Err(plan::packed_for_hopper());
        };
        let (normed, moments) = (w.normed.pointer(), w.moments.pointer());
        let out = TowerArgs {
            w: rest.out.pointer(),
            x: w.attended.pointer(),
            residual: w.x.pointer(),
            scale: rest.norm2.pointer(),
            y: normed,
            left: moments,
            ..TowerArgs::default()
        };
        self.tower_product(hopper, TowerKind::Add, [rows, t.width, t.heads * t.head_dim], out)?;
        let [tokens, octets, token_tiles, short_tiles] =
            [rows, rows.div_ceil(8), plan.token_tiles, plan.short_tiles].map(|n| n as i32);
        let [weight_tiles, first_short, k_blocks, lead] =
            [plan.weight_tiles, plan.first_short, plan.k_blocks, plan.lead].map(|n| n as i32);
        let args = GegluWideArgs {
            w: rest.gate_up.pointer(),
            x: normed,
            moments,
            y: w.mlp.pointer(),
            tokens,
            octets,
            token_tiles,
            short_tiles,
            weight_tiles,
            first_short,
            k_blocks,
            lead,
            width_tiles: (t.width / TOWER_TILE) as i32,
            inv_width: 1.0 / t.width as f32,
            eps: EPSILON,
        };
        let shape = Shape { shared: plan.shared as u32, dependent: true, ..Shape::blocks(plan.blocks, 384) };
        hopper.geglu_wide[plan.variant].launch(self.stream, shape, &args)
    }

    fn attention(
        &self,
        heads: usize,
        batch: usize,
        variant: (usize, usize),
        args: &AttentionArgs,
    ) -> Result<(), EngineError> {
        let (rows, hopper) = (args.rows as usize, self.kernels.hopper().filter(|_| self.path == Path::Hopper));
        let blocks = |rows_each: usize, shared: usize| Shape {
            grid: [rows.div_ceil(rows_each) as u32, heads as u32, batch as u32],
            threads: 256,
            shared: shared as u32,
            cluster: 1,
            dependent: true,
        };
        // The heads share their keys and values where those of the next head are no further on.
        if let Some(hopper) = hopper.filter(|_| args.head_dim as usize == plan::WIDE_HEAD && args.kv_head == 0) {
            let plan = plan::attention_wide(rows * heads, self.sms);
            let shape = Shape {
                grid: [plan.blocks as u32, 1, batch as u32],
                cluster: plan.cluster as u32,
                ..blocks(rows, plan.shared)
            };
            let args = AttentionArgs { heads: heads as i32, ..*args };
            return hopper.attention_wide[plan.variant].launch(self.stream, shape, &args);
        }
        if let Some(hopper) = hopper.filter(|_| plan::attention_vision(args.head_dim as usize, args.keys as usize)) {
            return hopper.attention_vision.launch(self.stream, blocks(plan::VISION_ROWS, plan::VISION_SHARED), args);
        }
        let shape = blocks(plan::ATTENTION_ROWS, plan::attention_shared(variant.1));
        self.kernels.attention[variant.0].launch(self.stream, shape, args)
    }

    /// SigLIP's attention within each view; `octets` groups of 8 tokens where the result is wanted packed.
    fn vision_attention(&self, views: usize, octets: usize) -> Result<(), EngineError> {
        let (v, w) = (self.model.dims.vision, self.w);
        let (tokens, head_dim) = (v.tokens(), v.width / v.heads);
        let args = AttentionArgs {
            q: w.vision_qkv.pointer(),
            k: w.vision_qkv.at(v.width),
            v: w.vision_qkv.at(2 * v.width),
            out: w.vision_attended.pointer(),
            q_batch: (tokens * 3 * v.width) as i64,
            kv_batch: (tokens * 3 * v.width) as i64,
            out_batch: (tokens * v.width) as i64,
            q_row: 3 * v.width as i32,
            kv_row: 3 * v.width as i32,
            kv_head: head_dim as i32,
            out_row: v.width as i32,
            rows: tokens as i32,
            keys: tokens as i32,
            head_dim: head_dim as i32,
            scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
            out_octets: octets as i32,
            ..AttentionArgs::default()
        };
        self.attention(v.heads, views, self.model.vision_head, &args)
    }

    /// SigLIP's layers on the residual of `views`, products by the library.
    fn tower_of_rows(&mut self, layers: &[VisionLayer], views: usize) -> Result<(), EngineError> {
        let (v, w) = (self.model.dims.vision, self.w);
        let rows = views * v.tokens();
        let [normed, qkv, attended, mlp] =
            [&w.vision_normed, &w.vision_qkv, &w.vision_attended, &w.vision_mlp].map(Buffer::pointer);
        let h = w.vision.pointer();
        for layer in layers {
            self.layer_norm(&w.vision, &w.vision_normed, &layer.norm1, rows, v.width)?;
            let o = Operands { w: layer.qkv.pointer(), x: normed, bias: layer.qkv_bias.pointer(), c: qkv, d: qkv };
            self.product(rows, 3 * v.width, v.width, Epilogue::Bias, o)?;
            self.vision_attention(views, 0)?;
            let o = Operands { w: layer.out.pointer(), x: attended, bias: layer.out_bias.pointer(), c: h, d: h };
            self.product(rows, v.width, v.width, Epilogue::AddBias, o)?;
            self.layer_norm(&w.vision, &w.vision_normed, &layer.norm2, rows, v.width)?;
            let o = Operands { w: layer.fc1.pointer(), x: normed, bias: layer.fc1_bias.pointer(), c: mlp, d: mlp };
            self.product(rows, v.mlp, v.width, Epilogue::BiasGelu, o)?;
            let o = Operands { w: layer.fc2.pointer(), x: mlp, bias: layer.fc2_bias.pointer(), c: h, d: h };
            self.product(rows, v.width, v.mlp, Epilogue::AddBias, o)?;
            self.tap(&w.vision, rows * v.width)?;
        }
        Ok(())
    }

    /// The same by tower.cu: a product that adds to the residual leaves it times the scale of the norm behind, and that
    /// norm's sums.
    fn packed_tower(&mut self, layers: &[TowerLayer], views: usize) -> Result<(), EngineError> {
        let (v, w) = (self.model.dims.vision, self.w);
        let rows = views * v.tokens();
        let [normed, qkv, attended, mlp] =
            [&w.vision_normed, &w.vision_qkv, &w.vision_attended, &w.vision_mlp].map(Buffer::pointer);
        let [attention_left, mlp_left] = w.vision_moments.each_ref().map(Buffer::pointer);
        let (residual, mlp_width) = (w.vision.pointer(), plan::tower_pad(v.mlp));
        let Some(hopper) = self.kernels.hopper() else { return Err(plan::packed_for_hopper()) };
        let Some(first) = layers.first() else { return Ok(()) };
        let begin = TowerBeginArgs {
            x: residual,
            scale: first.norm1.scale.pointer(),
            y: normed,
            moments: mlp_left,
            tokens: rows as i32,
            width: v.width as i32,
        };
        hopper.tower_begin.launch(self.stream, Shape::blocks(rows, 256), &begin)?;
        for (l, layer) in layers.iter().enumerate() {
            let next = layers.get(l + 1).map_or(0, |next| next.norm1.scale.pointer());
            let folded = |weights: &Folded, moments: u64, y: u64| TowerArgs {
                w: weights.w.pointer(),
                x: normed,
                moments,
                fold: weights.fold.pointer(),
                bias: weights.bias.pointer(),
                y,
                ..TowerArgs::default()
            };
            let added = |w: &Buffer<u16>, bias: &Buffer<f32>, x: u64, scale: u64, left: u64| TowerArgs {
                w: w.pointer(),
                x,
                bias: bias.pointer(),
                residual,
                scale,
                y: normed,
                left,
                ..TowerArgs::default()
            };
            self.tower_product(
                hopper,
                TowerKind::Rows,
                [rows, 3 * v.width, v.width],
                folded(&layer.qkv, mlp_left, qkv),
            )?;
            self.vision_attention(views, rows / 8)?;
            let out = added(&layer.out, &layer.out_bias, attended, layer.norm2.scale.pointer(), attention_left);
            self.tower_product(hopper, TowerKind::Add, [rows, v.width, v.width], out)?;
            let fc1 = folded(&layer.fc1, attention_left, mlp);
            self.tower_product(hopper, TowerKind::Gelu, [rows, mlp_width, v.width], fc1)?;
            let fc2 = added(&layer.fc2, &layer.fc2_bias, mlp, next, mlp_left);
            self.tower_product(hopper, TowerKind::Add, [rows, v.width, mlp_width], fc2)?;
            self.tap(&w.vision, rows * v.width)?;
        }
        Ok(())
    }

    /// A product of tower.cu of `[rows, outputs, k]`, whole tiles all; `args` says what it reads and writes. A norm that is
    /// folded in is over k.
    fn tower_product(
        &self,
        hopper: &Hopper,
        kind: TowerKind,
        [rows, outputs, k]: [usize; 3],
        args: TowerArgs,
    ) -> Result<(), EngineError> {
        let (tiles, k_blocks) = (outputs / TOWER_TILE, k / TOWER_K);
        // Of the squares, one sum for each warp of the trunk's norm, or for each tile of a product of tower.cu.
        let sums = if kind == TowerKind::Rotated { plan::norm_threads(k) as usize / 32 } else { k / TOWER_TILE };
        let plan = plan::tower(kind, tiles, k_blocks, rows, self.sms);
        let args = TowerArgs {
            tokens: rows as i32,
            octets: rows.div_ceil(8) as i32,
            token_tiles: plan.token_tiles as i32,
            tiles: tiles as i32,
            weight_tiles: plan.weight_tiles as i32,
            k_blocks: k_blocks as i32,
            width_tiles: sums as i32,
            inv_width: 1.0 / k as f32,
            eps: EPSILON,
            ..args
        };
        let shape = Shape { shared: plan.shared as u32, ..Shape::blocks(plan.blocks, plan.threads as u32) };
        hopper.tower[plan.variant].launch(self.stream, shape, &args)
    }

    /// Patches to the first rows of x.
    fn vision(&mut self, views: usize) -> Result<(), EngineError> {
        let dims = self.model.dims;
        let v = dims.vision;
        let w = self.w;
        let rows = views * v.tokens();
        let weights = self.weights;
        let h = w.vision.pointer();
        let patch = Operands {
            w: weights.patch.pointer(),
            x: w.patches.pointer(),
            bias: 0,
            c: weights.position.pointer(),
            d: h,
        };
        self.product(rows, v.width, plan::patch_stride(&dims), Epilogue::Add, patch)?;
        match &weights.tower {
            Tower::Rows(layers) => self.tower_of_rows(layers, views)?,
            Tower::Packed(layers) => self.packed_tower(layers, views)?,
        }
        self.layer_norm(&w.vision, &w.vision_normed, &weights.post_norm, rows, v.width)?;
        let x = w.x.pointer();
        let o = Operands {
            w: weights.projector.pointer(),
            x: w.vision_normed.pointer(),
            bias: weights.projector_bias.pointer(),
            c: x,
            d: x,
        };
        self.product(rows, dims.trunk.width, v.width, Epilogue::WideBias, o)
    }

    /// x to keys and values of every layer.
    fn trunk(&mut self, rows: usize) -> Result<(), EngineError> {
        let t = self.model.dims.trunk;
        let w = self.w;
        let weights = self.weights;
        let (x, qkv) = (w.x.pointer(), w.qkv.pointer());
        let attention = t.heads * t.head_dim;
        let (variant, down) = self.down(rows);
        let sums = if down == Epilogue::Add { x } else { w.parts.pointer() };
        for (l, layer) in weights.trunk.iter().enumerate() {
            if l == 0 {
                self.rms_norm(&layer.norm1, rows, 0)?;
            }
            self.projected(layer, l, rows)?;
            let (Some(rest), Some(next)) = (&layer.rest, weights.trunk.get(l + 1)) else { break };
            let args = AttentionArgs {
                q: qkv,
                out: w.attended.pointer(),
                params: self.params,
                q_row: (attention + 2 * t.head_dim) as i32,
                kv_row: self.model.cache_row as i32,
                out_row: attention as i32,
                rows: rows as i32,
                keys: rows as i32,
                head_dim: t.head_dim as i32,
                layer: l as i32,
                scale: std::f32::consts::LOG2_E / (t.head_dim as f32).sqrt(),
                out_octets: if weights.wide_trunk { rows.div_ceil(8) as i32 } else { 0 },
                ..AttentionArgs::default()
            };
            self.attention(t.heads, 1, self.model.trunk_head, &args)?;
            if weights.wide_trunk {
                self.gated_wide(rest, rows)?;
            } else {
                self.gated(rest, rows)?;
            }
            let o = Operands { w: rest.down.pointer(), x: w.mlp.pointer(), bias: 0, c: sums, d: sums };
            self.product(rows, t.width, t.mlp, down, o)?;
            self.rms_norm(&next.norm1, rows, variant)?;
            self.tap(&w.x, rows * t.width)?;
        }
        Ok(())
    }
}

/// Head dimensions the encoder's attention is compiled for, looked up once.
pub(super) fn head_variant(head_dim: usize) -> Option<(usize, usize)> {
    plan::head_dim(&HEAD_DIMS, head_dim)
}
