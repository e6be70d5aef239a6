//! The persistent decoder: one cooperative kernel for all steps (kernels/persistent.cu).

use std::collections::HashMap;
use std::sync::Arc;

use super::device::{Buffer, Device, Pinned};
use super::kernels::{Kernel, PersistentArgs, Shape};
use super::lane::Lane;
use super::plan::{self, RANKS};
use super::stream::Stream;
use super::time::Tables;
use super::weights::DecoderWeights;
use crate::engine::EngineError;
use crate::model::Dims;

/// Threads of a block: eight warps that compute, one that fetches weights, one that fetches activations.
const THREADS: u32 = 320;
/// Words of the kernel's `LayerArgs` and `StepArgs`.
const LAYER_WORDS: usize = 10;
const STEP_WORDS: usize = 5;

/// The kernel's counters: of all blocks, of ten heads and of four quarters, each in its own piece of memory.
const COUNTER_BYTES: usize = (1 + 10 + RANKS) * 128;

/// What it needs beside the buffers it shares with the launch-based decoder.
pub(super) struct Persistent {
    shape: Shape,
    delay: i32,
    /// Blocks that have finished phases; zero before each decode.
    arrived: Buffer<u8>,
    /// 0, or 1 once a wait was given up; in host memory, since the context does not outlive that.
    error: Pinned<u8>,
    /// The kernel's `LayerArgs` by step and layer, and behind them its `StepArgs`, for a number of steps.
    tables: HashMap<usize, Buffer<u64>>,
}

impl Persistent {
    /// As many clusters as the lane of `stream` holds at once, at most `clusters`.
    pub fn new(lane: &Lane, stream: &Stream, clusters: usize, delay: i32) -> Result<Self, EngineError> {
        let _current = lane.enter()?;
        let device = lane.device();
        let kernel = kernel(lane, 0)?;
        let sized = |clusters: usize| Shape {
            shared: plan::PERSISTENT_SHARED as u32,
            cluster: RANKS as u32,
            dependent: false,
            ..Shape::blocks(clusters * RANKS, THREADS)
        };
        let offered = kernel.clusters_at_once(stream, sized(1))?.min(lane.sms() / RANKS);
        let mut this = Self {
            shape: sized(0),
            delay,
            arrived: Buffer::zeroed(device, COUNTER_BYTES)?,
            error: Pinned::zeroed(device, size_of::<u32>())?,
            tables: HashMap::new(),
        };
        // What the driver offers is a guess where SMs are shared out: an empty run says what it grants.
        let mut refused = None;
        let _decoding = device.decoding();
        for clusters in (1..=offered.min(clusters)).rev() {
            this.shape = sized(clusters);
            match kernel
                .launch_together(stream, this.shape, &PersistentArgs::default())
                .and_then(|()| stream.synchronize())
            {
                Ok(()) => {
                    tracing::debug!("persistent decoder: {clusters} clusters of {RANKS} on {} SMs", lane.sms());
                    return Ok(this);
                }
                Err(e) => refused = Some(e),
            }
        }
        Err(refused.unwrap_or_else(|| EngineError::Device {
            what: "placing the decoder",
            reason: format!("a share of {} SMs holds no cluster of {RANKS} blocks", lane.sms()),
            remedy: "Give the decoder a larger share: raise mps_decoder_percentage".into(),
        }))
    }

    /// Blocks that run at once.
    pub fn blocks(&self) -> usize {
        self.shape.grid[0] as usize
    }

    /// Makes the table of `tables` if there is none yet.
    pub fn prepare(&mut self, device: &Arc<Device>, w: &DecoderWeights, tables: &Tables) -> Result<(), EngineError> {
        let steps = tables.times.len();
        if self.tables.contains_key(&steps) {
            return Ok(());
        }
        let mut table = Vec::with_capacity(steps * (w.layers.len() * LAYER_WORDS + STEP_WORDS));
        for step in 0..steps {
            for (l, layer) in w.layers.iter().enumerate() {
                let after = w.layers.get(l + 1).map_or(&w.final_norm, |n| &n.norm1);
                let (qkv_bias, gate_up_bias) = tables.biases(step, l);
                table.extend([&layer.qkv, &layer.out, &layer.gate_up, &layer.down].map(Buffer::pointer));
                table.extend([qkv_bias, gate_up_bias]);
                table.extend([tables.scale(&layer.norm2, step, 2 * l + 1), tables.gate(step, 2 * l)]);
                table.extend([tables.scale(after, step, 2 * l + 2), tables.gate(step, 2 * l + 1)]);
            }
        }
        for (step, time) in tables.times.iter().enumerate() {
            table.extend(w.layers.first().map(|l| tables.scale(&l.norm1, step, 0)));
            table.extend([tables.in_bias(step), tables.out_bias(step)]);
            table.extend([tables.scale(&w.final_norm, step, 2 * w.layers.len()), u64::from((*time as f32).to_bits())]);
        }
        self.tables.insert(steps, Buffer::from_slice(device, &table)?);
        Ok(())
    }

    /// Queues a decode of `steps` steps, for which there is a table, by a variant of [`plan::persistent`]; `args` names the
    /// decoder's buffers and weights.
    pub fn decode(
        &self,
        lane: &Lane,
        stream: &Stream,
        dims: &Dims,
        steps: usize,
        variant: usize,
        args: PersistentArgs,
    ) -> Result<(), EngineError> {
        let Some(table) = self.tables.get(&steps) else { return Ok(()) };
        let args = PersistentArgs {
            layers: table.pointer(),
            steps: table.at(steps * dims.expert.layers * LAYER_WORDS),
            arrived: self.arrived.pointer(),
            error: self.error.as_ptr() as u64,
            scale: std::f32::consts::LOG2_E / (dims.expert.head_dim as f32).sqrt(),
            inv_width: 1.0 / dims.expert.width as f32,
            dt: (-1.0 / steps as f64) as f32,
            step_count: steps as i32,
            layer_count: dims.expert.layers as i32,
            horizon: dims.horizon as i32,
            has_state: (plan::suffix_rows(dims) - dims.horizon) as i32,
            suffix: plan::suffix_rows(dims) as i32,
            action_dim: dims.action_dim as i32,
            state_dim: dims.state_dim as i32,
            delay: self.delay,
            ..args
        };
        stream.fill(&self.arrived, 0)?;
        kernel(lane, variant)?.launch_together(stream, self.shape, &args)
    }

    /// What a run that has ended says: `ended` is what the driver did.
    pub fn check(&self, ended: Result<(), EngineError>) -> Result<(), EngineError> {
        if self.error.as_slice().iter().all(|b| *b == 0) {
            return ended;
        }
        Err(EngineError::Device {
            what: "decoding",
            reason: format!("one of {} blocks waited two seconds in vain for another", self.blocks()),
            remedy:
                "Something else holds SMs of this share (nvidia-smi lists processes): end it, and restart this process"
                    .into(),
        })
    }
}

fn kernel(lane: &Lane, variant: usize) -> Result<&Kernel<PersistentArgs>, EngineError> {
    lane.kernels().hopper().and_then(|h| h.persistent.get(variant)).ok_or_else(|| EngineError::Device {
        what: "loading kernels",
        reason: "the persistent decoder is for sm_90a only".into(),
        remedy: "Rebuild with PI0_CUDA_ARCHS=90a".into(),
    })
}
