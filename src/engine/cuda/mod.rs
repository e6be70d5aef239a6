//! π0 and π0.5 on an NVIDIA GPU: bf16 weights, float32 sums and residuals.
//!
//! Data flow: `images` (bytes to patches) → `encoder` (SigLIP and trunk, fills the cache) → `decoder` (action expert,
//! one graph of all steps), which runs `persistent` (one cooperative kernel, the published expert on Hopper),
//! launches of its own, or `portable` (other chips). `device` owns the driver's objects, `lane` says where a stage runs,
//! `stream` what runs there, `kernels` mirrors `kernels/*.cu`, `lt` the vendor's matrix products, `plan` every choice of
//! kernel and shape, `load` and `weights` the way from a file to the layouts above, `time` what depends on flow time
//! alone.
//!
//! A captured graph holds addresses of its stage's own buffers only; cache slots, lengths and guidance are read from a
//! block uploaded before each run. Results are bitwise repeatable: no float atomics, every sum in one order.

mod decoder;
mod device;
mod encoder;
mod faults;
mod images;
mod kernels;
mod lane;
mod load;
mod lt;
mod persistent;
mod plan;
mod portable;
mod rope;
mod stream;
mod time;
mod weights;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use decoder::CudaDecoder;
pub use device::{Capability, Device as Gpu};
pub use encoder::{CudaCache, CudaEncoder, EncodeTaps, EncodeTimes};
pub use plan::{Packing, Stage};

use super::frames::FramePool;
use super::partition::{Grant, Kind, Offer};
use super::{Engine, EngineError};
use crate::model::{Checkpoint, Dims, FrameMemory, Resampler};
use device::{Buffer, Pinned};
use lane::Lane;
use load::Source;
use weights::{DecoderWeights, EncoderWeights};

/// The GPU's name and what it offers, or why it cannot be used.
pub fn probe(ordinal: usize) -> Result<String, EngineError> {
    let gpu = Gpu::open(ordinal)?;
    let (free, total) = gpu.memory()?;
    let (major, minor) = gpu.capability();
    let gib = |n: usize| n as f64 / f64::from(1 << 30);
    Ok(format!(
        "{} (sm_{major}{minor}, {} SMs, {:.1} of {:.1} GiB free), {}",
        gpu.name(),
        gpu.sms(),
        gib(free),
        gib(total),
        gpu.path(false).name()
    ))
}

/// What GPU `ordinal` could be divided into for this process.
pub fn offer(ordinal: usize) -> Result<Offer, EngineError> {
    lane::offer(&*Gpu::open(ordinal)?)
}

/// What the driver reads once, when it starts: enough hardware queues for both stages (MPS clients get two). To be called
/// before anything else in `main`; a variable that is set stays as it is.
///
/// CUDA_MODULE_LOADING is left alone: kernels are loaded when an engine is made all the same (`Kernels`, `Lt::prepare`),
/// and those of cuBLASLt that nobody uses would take 340 MiB and 1.6 s.
pub fn prepare_process() {
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    let name = "CUDA_DEVICE_MAX_CONNECTIONS";
    if alone && std::env::var_os(name).is_none() {
        // SAFETY: this is the only thread of the process, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, "8") };
    }
}

/// What the stages share beside their weights.
struct Model {
    dims: Dims,
    resampler: Resampler,
    /// Index and padded size of the attention kernels.
    vision_head: (usize, usize),
    trunk_head: (usize, usize),
    decode_head: (usize, usize),
    /// Elements from one row of a cache to the next.
    cache_row: usize,
    /// Rows of the rotation table.
    positions: usize,
    rope: Buffer<f32>,
    /// The same for every share of the GPU, so that results do not depend on it.
    algorithms: Arc<lt::Algorithms>,
    device: Arc<Gpu>,
}

/// Knobs that change the speed but not the results, except `slices` and `portable`, which fix the order of sums.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    slices: plan::Slices,
    /// Whether kernels start before the one in front has ended.
    dependent: bool,
    /// Which kernel moves the weights of which later one into L2.
    prefetch: [Option<(Stage, Stage)>; 5],
    /// Kernels of which an SM holds one block at most.
    exclusive: [bool; 5],
    /// A kernel to launch twice: its time is the difference, its results are wrong.
    twice: Option<Stage>,
    /// Clusters of the persistent decoder at most.
    clusters: usize,
    /// Sleep of each of its blocks before each phase, up to so many ns; negative: one block never says that it is done.
    delay: i32,
    /// The kernels of other chips on Hopper too. They know of no knob but `twice`.
    portable: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            slices: plan::SLICES,
            dependent: true,
            prefetch: plan::PREFETCH,
            exclusive: plan::EXCLUSIVE,
            twice: None,
            clusters: usize::MAX,
            delay: 0,
            portable: false,
        }
    }
}

impl Tuning {
    /// These K slices for the products QKV, O, gate/up and down.
    pub fn slices(mut self, [qkv, out, gate_up, down]: [usize; 4]) -> Self {
        self.slices = plan::Slices { qkv, out, gate_up, down };
        self
    }

    /// At most so many clusters for the persistent decoder, as on a smaller share.
    pub fn clusters(mut self, most: usize) -> Self {
        self.clusters = most;
        self
    }

    /// Lets each block of the persistent decoder sleep up to so many ns before each phase, differently each time: nothing
    /// but time may change.
    pub fn delay(mut self, nanoseconds: u16) -> Self {
        self.delay = nanoseconds.into();
        self
    }

    /// A planted fault: one block of the persistent decoder never says that it has finished a phase.
    pub fn stall(mut self) -> Self {
        self.delay = -1;
        self
    }

    /// With or without dependent launch.
    pub fn dependent(mut self, on: bool) -> Self {
        self.dependent = on;
        self
    }

    /// Only these kernels keep an SM from holding two of their blocks.
    pub fn exclusive(mut self, stages: &[Stage]) -> Self {
        self.exclusive = [false; 5];
        stages.iter().for_each(|s| self.exclusive[*s as usize] = true);
        self
    }

    /// Launches this kernel twice: what one costs where it stands is the difference in time. Results are wrong.
    pub fn twice(mut self, stage: Stage) -> Self {
        self.twice = Some(stage);
        self
    }

    /// The portable kernels on any chip: so they can be tested on Hopper, which has its own.
    pub fn portable(mut self, on: bool) -> Self {
        self.portable = on;
        self
    }

    /// These prefetches into L2, at most five.
    pub fn prefetch(mut self, pairs: &[(Stage, Stage)]) -> Self {
        self.prefetch = [None; 5];
        for (slot, pair) in self.prefetch.iter_mut().zip(pairs) {
            *slot = Some(*pair);
        }
        self
    }
}

/// A checkpoint on one GPU.
pub struct CudaEngine {
    model: Arc<Model>,
    encoder: Arc<EncoderWeights>,
    decoder: Arc<DecoderWeights>,
    tuning: Tuning,
    offer: Offer,
    frames: Arc<FramePool<Pinned<u8>>>,
    /// Green contexts made so far. The driver keeps about 8 MiB of each that is destroyed (measured, driver 580), so
    /// none is: there are only as many as there are splits.
    green: Mutex<HashMap<Grant, [Arc<Lane>; 2]>>,
}

impl CudaEngine {
    /// Brings the weights of `checkpoint` to GPU `ordinal`. `resampler` brings camera frames to the model's size.
    ///
    /// Errors: no such GPU, driver or library; too little memory; dimensions the kernels cannot run.
    pub fn load(checkpoint: &Checkpoint, resampler: Resampler, ordinal: usize) -> Result<Self, EngineError> {
        Self::new(*checkpoint.dims(), Source::Checkpoint(checkpoint), resampler, ordinal, None)
    }

    /// As [`load`](Self::load), with the packing chosen by the caller.
    pub fn load_for(
        packing: Packing,
        checkpoint: &Checkpoint,
        resampler: Resampler,
        ordinal: usize,
    ) -> Result<Self, EngineError> {
        Self::new(*checkpoint.dims(), Source::Checkpoint(checkpoint), resampler, ordinal, Some(packing))
    }

    /// A model of these dimensions with weights drawn from `seed` on the GPU: for benchmarks.
    pub fn random(dims: &Dims, resampler: Resampler, ordinal: usize, seed: u64) -> Result<Self, EngineError> {
        Self::new(*dims, Source::Random(seed), resampler, ordinal, None)
    }

    /// As [`random`](Self::random), with the packing chosen by the caller.
    pub fn random_for(
        packing: Packing,
        dims: &Dims,
        resampler: Resampler,
        ordinal: usize,
        seed: u64,
    ) -> Result<Self, EngineError> {
        Self::new(*dims, Source::Random(seed), resampler, ordinal, Some(packing))
    }

    fn new(
        dims: Dims,
        source: Source<'_>,
        resampler: Resampler,
        ordinal: usize,
        packing: Option<Packing>,
    ) -> Result<Self, EngineError> {
        plan::check(&dims)?;
        let device = Gpu::open(ordinal)?;
        device.log_memory("context opened");
        let variant = |found: Option<(usize, usize)>, d: usize| {
            found.ok_or_else(|| EngineError::Shape {
                what: "head dimension",
                expected: "at most 256".into(),
                found: d.to_string(),
            })
        };
        let vision_head = dims.vision.width / dims.vision.heads;
        let head = dims.trunk.head_dim;
        let positions = plan::positions(&dims);
        let packing = plan::packing(&dims, device.kernels().hopper().is_some(), packing)?;
        let (encoder, decoder) = weights::load(&device, &dims, source, packing)?;
        device.log_memory("weights loaded");
        let model = Model {
            dims,
            resampler,
            vision_head: variant(encoder::head_variant(vision_head), vision_head)?,
            trunk_head: variant(encoder::head_variant(head), head)?,
            decode_head: variant(plan::head_dim(&plan::DECODE_HEAD_DIMS, head), head)?,
            cache_row: packing.cache_row(head),
            positions,
            rope: rope::table(&device, positions, head)?,
            algorithms: Arc::default(),
            device,
        };
        let mut offer = lane::offer(&model.device)?;
        let hopper = model.device.kernels().hopper().is_some();
        (offer.least_decoder, offer.decoder_waits) = plan::decoder_share(packing, hopper);
        let locked = Arc::clone(&model.device);
        Ok(Self {
            offer,
            frames: Arc::new(FramePool::new(move |bytes| Pinned::zeroed(&locked, bytes))),
            green: Mutex::default(),
            model: Arc::new(model),
            encoder: Arc::new(encoder),
            decoder: Arc::new(decoder),
            tuning: Tuning::default(),
        })
    }

    /// The same engine with other knobs for the stages made from now on.
    pub fn tuned(mut self, tuning: Tuning) -> Self {
        self.tuning = tuning;
        self
    }

    fn on(&self, [encoder, decoder]: [Arc<Lane>; 2]) -> Result<(CudaEncoder, CudaDecoder), EngineError> {
        let path = self.path();
        let other = (encoder.sms() < self.model.device.sms()).then(|| Arc::clone(&decoder));
        Ok((
            CudaEncoder::new(Arc::clone(&self.model), Arc::clone(&self.encoder), encoder, other, path)?,
            CudaDecoder::new(Arc::clone(&self.model), Arc::clone(&self.decoder), decoder, self.tuning, path)?,
        ))
    }

    /// Stages in two contexts of their own that are not partitioned: for tests of what `mps` needs, without its daemon.
    pub fn stages_in_own_contexts(&self) -> Result<(CudaEncoder, CudaDecoder), EngineError> {
        self.on(Lane::unpartitioned(&self.model.device)?)
    }

    fn path(&self) -> plan::Path {
        self.model.device.path(self.tuning.portable)
    }

    /// Classes of products whose algorithms have been timed so far, each on each share.
    pub fn measured(&self) -> usize {
        self.model.algorithms.measured()
    }

    /// Times of algorithms that were taken so far while every block of the traffic on the other stage's share ran.
    pub fn measured_beside_traffic(&self) -> usize {
        self.model.algorithms.beside()
    }

    /// The GPU it runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.model.device
    }
}

impl Engine for CudaEngine {
    type Cache = CudaCache;
    type Encoder = CudaEncoder;
    type Decoder = CudaDecoder;

    fn dims(&self) -> &Dims {
        &self.model.dims
    }

    fn describe(&self) -> String {
        let gpu = &self.model.device;
        let (major, minor) = gpu.capability();
        let kernels = self.path().name();
        format!("cuda:{}, {} (sm_{major}{minor}), bf16, {} SMs, {kernels}", gpu.ordinal(), gpu.name(), gpu.sms())
    }

    fn cache(&self, views: usize, tokens: usize) -> Result<CudaCache, EngineError> {
        let rows = views.saturating_mul(self.model.dims.vision.tokens()).saturating_add(tokens);
        if rows == 0 || rows > self.model.positions {
            return Err(EngineError::Shape {
                what: "cache slot",
                expected: format!("1 to {} rows", self.model.positions),
                found: format!("{rows} ({views} views and {tokens} prompt tokens)"),
            });
        }
        CudaCache::new(&self.model.device, &self.model.dims, rows, self.model.cache_row)
    }

    /// Page-locked.
    fn frame_memory(&self) -> Option<Arc<dyn FrameMemory>> {
        Some(Arc::clone(&self.frames) as Arc<dyn FrameMemory>)
    }

    fn offer(&self) -> Option<&Offer> {
        Some(&self.offer)
    }

    fn stages(&self) -> Result<(CudaEncoder, CudaDecoder), EngineError> {
        self.stages_on(Grant::whole(self.offer.sms))
    }

    fn stages_on(&self, grant: Grant) -> Result<(CudaEncoder, CudaDecoder), EngineError> {
        if grant.kind != Kind::Green {
            return self.on(Lane::pair(&self.model.device, grant)?);
        }
        let mut green = self.green.lock().unwrap_or_else(PoisonError::into_inner);
        let lanes = match green.get(&grant) {
            Some(lanes) => lanes.clone(),
            None => green.entry(grant).insert_entry(Lane::pair(&self.model.device, grant)?).get().clone(),
        };
        drop(green);
        self.on(lanes)
    }
}

fn check_len(what: &'static str, values: &[f32], expected: usize) -> Result<(), EngineError> {
    if values.len() == expected {
        return Ok(());
    }
    Err(EngineError::Shape { what, expected: format!("{expected} values"), found: values.len().to_string() })
}

fn check_finite(what: &'static str, values: &[f32]) -> Result<(), EngineError> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(EngineError::Shape {
            what,
            expected: "finite values".into(),
            found: format!("{} at index {at}", values[at]),
        }),
    }
}
