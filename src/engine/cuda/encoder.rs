//! Images and prompt to keys and values: SigLIP over all views at once, then the prefix trunk.
//!
//! Large products go to cuBLASLt, tower.cu or geglu_wide.cu, attention to attention_vision.cu, attention_wide.cu or attention.cu, the
//! rest is pointwise.cu. The residual streams stay in float32.

mod queue;

use std::collections::HashMap;
use std::sync::Arc;

use super::Model;
use super::device::{Buffer, Device, Pinned, Span};
use super::images::Images;
use super::kernels::PlacedArgs;
use super::lane::Lane;
use super::lt::{Effort, Lt, Scratch};
use super::plan::{self, HEAD_DIMS, Path, TOWER_TILE};
use super::stream::{Event, Graph, Stream};
use super::weights::{EncoderWeights, MAX_VIEWS};
use crate::engine::{EncodeInput, Encoder, EngineError, KvCache};
use crate::model::Dims;
use queue::Queue;

/// Graphs of the trunk that are kept, one for each number of rows; prefixes of further lengths do without.
const KEPT_GRAPHS: usize = 64;

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
            queue.lt.prepare(stream, &queue.trunk_keys(images + tokens), &scratch, Effort { idle, few: false })?;
            let others: Vec<_> = (images + 1..=images + most).flat_map(|rows| queue.trunk_keys(rows)).collect();
            queue.lt.prepare(stream, &others, &scratch, Effort { idle, few: true })
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

/// Head dimensions the encoder's attention is compiled for, looked up once.
pub(super) fn head_variant(head_dim: usize) -> Option<(usize, usize)> {
    plan::head_dim(&HEAD_DIMS, head_dim)
}
