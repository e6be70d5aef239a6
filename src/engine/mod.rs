//! The device seam: what an encoder, a decoder and the cache between them can do.
//!
//! One [`Engine`] serves one checkpoint. Its encoder turns images and prompt into a key/value cache, its decoder turns
//! a cache, the joint state and noise into a chunk of normalised actions. The two never share a buffer: a
//! [`KvCache`] is a value that moves from one to the other and back, so both can work at the same time.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda_stub.rs"]
pub mod cuda;
mod device;
pub mod frames;
pub mod guidance;
pub mod partition;

pub use device::{Device, Resolved};
use partition::{Grant, Offer, Refusal};
use std::sync::Arc;

use crate::choice::choice;
use crate::error::{Blame, Fault};
use crate::model::{Dims, Frame, FrameMemory, ModelError};

/// One valid camera view, in the model's order. Views that are missing are simply not there:
/// a masked view is no key to anybody and moves no position, so leaving it out is exact.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// A frame as the camera sent it; the engine converts, resizes, pads and scales it.
    Frame(&'a Frame),
    /// `[3, size, size]` RGB planes in [-1, 1].
    Planes(&'a [f32]),
}

/// What one prefix is made of.
#[derive(Debug, Clone, Copy)]
pub struct EncodeInput<'a> {
    /// Valid views, at least one.
    pub views: &'a [View<'a>],
    /// Valid prompt tokens (no padding), at least one.
    pub tokens: &'a [u32],
}

choice! {
    /// How the weight of guidance falls from the committed steps to the free ones.
    GuidanceSchedule {
        /// Falls linearly.
        Linear = "linear",
        /// Falls as `c·(e^c − 1)/(e − 1)`.
        Exp = "exp",
        /// One up to the end of guidance.
        Ones = "ones",
        /// Zero after the committed steps.
        Zeros = "zeros",
    }
}

/// Guided real-time chunking: keep the new chunk close to what is left of the previous one.
#[derive(Debug, Clone, Copy)]
pub struct Guidance<'a> {
    /// Unexecuted actions of the previous chunk, `[rows, action_dim]` in normalised model space.
    pub previous: &'a [f32],
    /// Committed steps: weight one.
    pub inference_delay: usize,
    /// Index at which guidance ends, clipped to the rows of `previous`.
    pub execution_horizon: usize,
    /// Upper bound of the guidance gain; 10 in the reference.
    pub max_weight: f32,
    /// Weights between the two.
    pub schedule: GuidanceSchedule,
}

/// What one chunk is decoded from, beside the cache.
#[derive(Debug, Clone, Copy)]
pub struct DecodeInput<'a> {
    /// Normalised joint state, zero-padded to `state_dim`. π0.5 has it in the prompt and ignores this.
    pub state: &'a [f32],
    /// Initial noise, `[horizon, action_dim]`.
    pub noise: &'a [f32],
    /// Flow-matching steps; 10 in the reference.
    pub steps: usize,
    /// Real-time chunking, or none.
    pub guidance: Option<Guidance<'a>>,
}

/// A key/value cache slot: written by the encoder that owns it, read by the decoder that owns it next.
pub trait KvCache: Send + 'static {
    /// Valid prefix rows held now; 0 before the first encode.
    fn len(&self) -> usize;

    /// Whether nothing has been encoded into this slot.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Overwrites what it holds with what no encoder writes, so that a decoder that reads it too early is noticed.
    fn poison(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}

/// The first stage: images and prompt to keys and values.
pub trait Encoder: Send + 'static {
    /// The slot it fills.
    type Cache: KvCache;

    /// Makes ready for so many views: prompts of `tokens` tokens are encoded as fast as this share can, the first of any other
    /// length up to `most` waits for nothing that takes long. `idle`: no stage works on the device now, so that it may be
    /// kept busy to find out what is fast beside a busy decoder.
    fn prepare(&mut self, views: usize, tokens: usize, most: usize, idle: bool) -> Result<(), EngineError> {
        let _ = (views, tokens, most, idle);
        Ok(())
    }

    /// Fills `cache`; when it returns, the cache is complete and may be handed to the decoder.
    fn encode(&mut self, input: &EncodeInput<'_>, cache: &mut Self::Cache) -> Result<(), EngineError>;

    /// As [`encode`](Self::encode), and returns the prefix embeddings `[rows, width]` for a parity check.
    fn encode_with_embeddings(
        &mut self,
        input: &EncodeInput<'_>,
        cache: &mut Self::Cache,
    ) -> Result<Vec<f32>, EngineError>;
}

/// The second stage: cache, state and noise to actions.
pub trait Decoder: Send + 'static {
    /// The slot it reads.
    type Cache: KvCache;

    /// Writes `[horizon, action_dim]` normalised actions into `actions`.
    fn decode(&mut self, cache: &Self::Cache, input: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError>;

    /// As [`decode`](Self::decode), and returns the model's velocity at every step, `[steps, horizon, action_dim]`
    /// (before guidance), for a parity check.
    fn decode_with_velocities(
        &mut self,
        cache: &Self::Cache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
    ) -> Result<Vec<f32>, EngineError>;
}

/// A device with a checkpoint loaded.
pub trait Engine: Send + Sync + 'static {
    /// Its cache slot.
    type Cache: KvCache;
    /// Its encoder.
    type Encoder: Encoder<Cache = Self::Cache>;
    /// Its decoder.
    type Decoder: Decoder<Cache = Self::Cache>;

    /// The model's dimensions.
    fn dims(&self) -> &Dims;

    /// One line for people: device, precision, threads or SMs.
    fn describe(&self) -> String;

    /// An empty cache slot for up to `views` views and `tokens` prompt tokens.
    fn cache(&self, views: usize, tokens: usize) -> Result<Self::Cache, EngineError>;

    /// Where frames should wait for its encoder; `None` where one memory is as good as another.
    fn frame_memory(&self) -> Option<Arc<dyn FrameMemory>> {
        None
    }

    /// What of the device each stage could be given; `None` where it has nothing to divide.
    fn offer(&self) -> Option<&Offer> {
        None
    }

    /// The two stages, each with the whole device; they share the weights.
    fn stages(&self) -> Result<(Self::Encoder, Self::Decoder), EngineError>;

    /// The two stages, each on its share; they share the weights, with those of other grants too.
    fn stages_on(&self, grant: Grant) -> Result<(Self::Encoder, Self::Decoder), EngineError> {
        let _ = grant;
        self.stages()
    }
}

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The checkpoint is not what the model needs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An input does not fit the model.
    #[error("{what}: expected {expected}, got {found}")]
    Shape {
        /// The input, by name.
        what: &'static str,
        /// What fits.
        expected: String,
        /// What came.
        found: String,
    },
    /// The device asked for is not part of this build or not on this machine.
    #[error("device '{device}' is not available: {reason}. {remedy}")]
    Unavailable {
        /// As the user named it.
        device: String,
        /// Why not.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The shares asked for cannot be had.
    #[error(transparent)]
    Partition(#[from] Refusal),
    /// A call to the device failed; the engine cannot be used further.
    #[error("GPU, {what}: {reason}. {remedy}")]
    Device {
        /// What was being done.
        what: &'static str,
        /// What the driver or library said.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The device has too little free memory.
    #[error(
        "{device}: {needed} bytes of GPU memory are needed, {free} are free. Close what else uses the GPU (nvidia-smi)"
    )]
    Memory {
        /// The device, by name.
        device: String,
        /// Bytes needed.
        needed: usize,
        /// Bytes free.
        free: usize,
    },
}

impl EngineError {
    /// Whether the engine is lost: a CUDA error is sticky, and every later call would fail too.
    pub fn is_fatal(&self) -> bool {
        matches!(self, EngineError::Device { .. })
    }
}

impl Blame for EngineError {
    fn fault(&self) -> Fault {
        match self {
            EngineError::Model(e) => e.fault(),
            EngineError::Shape { .. } | EngineError::Partition(_) => Fault::Input,
            EngineError::Unavailable { .. } | EngineError::Device { .. } | EngineError::Memory { .. } => Fault::Machine,
        }
    }
}
