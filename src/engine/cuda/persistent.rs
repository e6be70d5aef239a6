//! The persistent decoder: one cooperative kernel for all steps and layers (kernels/persistent.cu).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Buffer, Device, Pinned, Stream};
use super::kernels::{PersistentArgs, Shape};
use super::plan::{self, EXCHANGE_BYTES, PIECE_BYTES};
use super::time::Tables;
use super::weights::{DecoderWeights, Suffix};
use crate::engine::EngineError;
use crate::model::Dims;

/// Threads of a block: two warpgroups that compute and one whose first thread fetches weights.
const THREADS: u32 = 288;
/// Words of the kernel's `LayerArgs` and `StepArgs`.
const LAYER_WORDS: usize = 10;
const STEP_WORDS: usize = 4;
/// GPUs of one process that get a token of their own; the others share the last.
const TOKENS: usize = 16;

/// One cooperative grid at a time on a device: two of them could each hold SMs that the other's blocks wait for.
static IN_FLIGHT: [Mutex<()>; TOKENS] = [const { Mutex::new(()) }; TOKENS];

/// Held from launch to completion of a grid whose blocks wait for each other.
pub(super) fn token(device: &Device) -> MutexGuard<'static, ()> {
    // The mutex guards no data, so a panic elsewhere leaves nothing broken behind it.
    IN_FLIGHT[device.ordinal().min(TOKENS - 1)].lock().unwrap_or_else(PoisonError::into_inner)
}

/// What it needs beside the buffers it shares with the launch-based decoder.
pub(super) struct Persistent {
    blocks: usize,
    delay: u32,
    /// What blocks hand each other; filled with ones before each run.
    exchange: Buffer<u8>,
    /// 0, or 1 once a wait was given up.
    error: Buffer<i32>,
    status: Pinned<i32>,
    /// Addresses by step and layer, and by step, for a number of steps.
    tables: HashMap<usize, (Buffer<u64>, Buffer<u64>)>,
}

/// Device addresses of the decoder's buffers, and the size of one run.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    pub params: u64,
    pub rope: u64,
    pub noise: u64,
    pub previous: u64,
    pub weights: u64,
    pub gains: u64,
    pub state: u64,
    pub x: u64,
    pub velocities: u64,
    pub h: u64,
    pub steps: usize,
    /// Pieces of keys at most.
    pub pieces: usize,
}

impl Persistent {
    pub fn new(device: &Arc<Device>, blocks: usize, positions: usize, delay: u32) -> Result<Self, EngineError> {
        Ok(Self {
            blocks,
            delay,
            exchange: Buffer::zeroed(device, EXCHANGE_BYTES + plan::key_pieces(positions) * PIECE_BYTES)?,
            error: Buffer::zeroed(device, 1)?,
            status: Pinned::zeroed(device, 1)?,
            tables: HashMap::new(),
        })
    }

    /// Makes the address tables of `tables` if there are none yet.
    pub fn prepare(&mut self, device: &Arc<Device>, w: &DecoderWeights, tables: &Tables) -> Result<(), EngineError> {
        let steps = tables.times.len();
        if self.tables.contains_key(&steps) {
            return Ok(());
        }
        let mut layers = Vec::with_capacity(steps * w.layers.len() * LAYER_WORDS);
        let mut starts = Vec::with_capacity(steps * STEP_WORDS);
        for step in 0..steps {
            for (l, layer) in w.layers.iter().enumerate() {
                let after = w.layers.get(l + 1).map_or(&w.final_norm, |n| &n.norm1);
                let (qkv_bias, gate_up_bias) = tables.biases(step, l);
                let matrices = [&layer.qkv, &layer.out, &layer.gate_up, &layer.down];
                layers.extend(matrices.map(Buffer::pointer));
                layers.extend([qkv_bias, gate_up_bias]);
                layers.extend([tables.scale(&layer.norm2, step, 2 * l + 1), tables.gate(step, 2 * l)]);
                layers.extend([tables.scale(after, step, 2 * l + 2), tables.gate(step, 2 * l + 1)]);
            }
            let first = w.layers.first().map_or(0, |l| tables.scale(&l.norm1, step, 0));
            let time = u64::from((tables.times[step] as f32).to_bits());
            starts.extend([first, tables.in_bias(step), tables.out_bias(step), time]);
        }
        self.tables.insert(steps, (Buffer::from_slice(device, &layers)?, Buffer::from_slice(device, &starts)?));
        Ok(())
    }

    /// Queues a whole decode.
    pub fn queue(
        &self,
        stream: &Stream,
        device: &Device,
        dims: &Dims,
        w: &DecoderWeights,
        at: Addresses,
    ) -> Result<(), EngineError> {
        let Some((layers, starts)) = self.tables.get(&at.steps) else { return Ok(()) };
        stream.fill(&self.exchange, 0xff, EXCHANGE_BYTES + at.pieces * PIECE_BYTES)?;
        stream.fill(&self.error, 0, 1)?;
        let mut args = PersistentArgs {
            layers: layers.pointer(),
            steps: starts.pointer(),
            params: at.params,
            rope: at.rope,
            out_w: w.out.pointer(),
            noise: at.noise,
            previous: at.previous,
            weights: at.weights,
            gains: at.gains,
            state: at.state,
            x: at.x,
            velocities: at.velocities,
            h: at.h,
            exchange: self.exchange.pointer(),
            error: self.error.pointer(),
            scale: std::f32::consts::LOG2_E / (dims.expert.head_dim as f32).sqrt(),
            dt: (-1.0 / at.steps as f64) as f32,
            step_count: at.steps as i32,
            layer_count: w.layers.len() as i32,
            horizon: dims.horizon as i32,
            has_state: (plan::suffix_rows(dims) - dims.horizon) as i32,
            action_dim: dims.action_dim as i32,
            state_dim: dims.state_dim as i32,
            delay: self.delay as i32,
            ..PersistentArgs::default()
        };
        match &w.suffix {
            Suffix::Pi0 { fold, out, out_bias, state, state_bias, .. } => {
                args.time_w = out.pointer();
                args.time_bias = out_bias.pointer();
                args.in_w = fold.pointer();
                args.state_w = state.pointer();
                args.state_b = state_bias.pointer();
            }
            Suffix::Pi05 { action, .. } => args.in_w = action.pointer(),
        }
        let shape =
            Shape { shared: plan::PERSISTENT_SHARED as u32, dependent: false, ..Shape::blocks(self.blocks, THREADS) };
        device.kernels().persistent.launch_together(stream, shape, &args)?;
        stream.download(&self.error, 1, &self.status)
    }

    /// Whether the run that has just completed gave up a wait.
    pub fn check(&self) -> Result<(), EngineError> {
        if self.status.as_slice()[0] == 0 {
            return Ok(());
        }
        Err(EngineError::Device {
            what: "decoding",
            reason: format!("one of {} blocks waited in vain for another", self.blocks),
            remedy: "something else holds SMs of this share (nvidia-smi lists processes): end it, or restart \
                     with partition:=shared"
                .into(),
        })
    }

    /// Overwrites what blocks hand each other.
    pub fn poison(&self) -> Result<(), EngineError> {
        self.exchange.fill(0x55)
    }
}
