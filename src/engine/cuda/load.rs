//! The way of a tensor to the device: mapped file → pinned staging → device staging → conversion kernel.

use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use super::device::{Buffer, Device, Pinned};
use super::kernels::{Kernel, RandomArgs, Shape};
use super::lane::Lane;
use super::stream::{Event, Stream};
use super::weights::TokenTable;
use crate::engine::EngineError;
use crate::model::{Checkpoint, Dtype};

/// Bytes copied at a time; two pieces are in flight.
const PIECE: usize = 16 << 20;

/// Where weights come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// A checkpoint on disk.
    Checkpoint(&'a Checkpoint),
    /// Numbers drawn on the device from this seed: for benchmarks, not for robots.
    Random(u64),
}

impl Source<'_> {
    /// Roughly normal numbers of standard deviation `deviation` from a counter-based hash.
    pub fn random_host(seed: u64, deviation: f32, out: &mut [f32]) {
        for (i, v) in out.iter_mut().enumerate() {
            let mut z = seed.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            let parts = [z & 0xffff, (z >> 16) & 0xffff, (z >> 32) & 0xffff, z >> 48];
            let sum: u64 = parts.iter().sum();
            // Four uniforms have variance 1/3.
            *v = (sum as f32 / 65536.0 - 2.0) * 1.732_050_8 * deviation;
        }
    }
}

/// FNV-1a of a tensor's name, so that every tensor draws its own numbers.
fn name_seed(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Standard deviation that keeps activations near one: 1/√inputs for matrices, small for vectors.
fn deviation(shape: &[usize]) -> f32 {
    let inputs: usize = shape.iter().skip(1).product();
    if shape.len() == 1 { 0.1 } else { 1.0 / (inputs as f32).sqrt() }
}

fn dtype_number(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::Bf16 => 0,
        Dtype::F32 => 1,
        Dtype::F16 => 2,
    }
}

/// Two pieces of pinned memory, each with the event after which it may be filled again.
struct Pieces {
    pinned: [(Pinned<u8>, Event); 2],
    turn: usize,
}

impl Pieces {
    fn upload(&mut self, stream: &Stream, bytes: &[u8], to: &Buffer<u8>) -> Result<(), EngineError> {
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let (pinned, free) = &mut self.pinned[self.turn];
            self.turn ^= 1;
            free.wait()?;
            pinned
                .as_mut_slice()
                .par_chunks_mut(1 << 20)
                .zip(piece.par_chunks(1 << 20))
                .for_each(|(to, from)| to[..from.len()].copy_from_slice(from));
            stream.upload(pinned, piece.len(), to, i * PIECE)?;
            stream.record(free)?;
        }
        Ok(())
    }
}

/// Stages one tensor after the other on a stream of its own.
pub(super) struct Loader<'a> {
    device: Arc<Device>,
    stream: Stream,
    source: Source<'a>,
    pieces: Pieces,
    staging: Buffer<u8>,
    /// Elements done; seen on a terminal only.
    progress: ProgressBar,
}

/// A bar over `elements` weights; indicatif draws none where nobody looks.
fn progress_bar(elements: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {percent}% {eta}");
    ProgressBar::new(elements as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix("loading weights")
}

impl<'a> Loader<'a> {
    /// For about `elements` weights in all.
    pub fn new(device: &Arc<Device>, source: Source<'a>, elements: usize) -> Result<Self, EngineError> {
        let lane = Lane::whole(device);
        let stream = Stream::new(&lane)?;
        let piece = || -> Result<(Pinned<u8>, Event), EngineError> {
            let pair = (Pinned::zeroed(device, PIECE)?, Event::new(&lane)?);
            stream.record(&pair.1)?;
            Ok(pair)
        };
        let pieces = Pieces { pinned: [piece()?, piece()?], turn: 0 };
        let staging = Buffer::zeroed(device, PIECE)?;
        Ok(Self { device: Arc::clone(device), pieces, staging, stream, source, progress: progress_bar(elements) })
    }

    fn fill(&mut self, name: &str, shape: &[usize], keep: bool) -> Result<(Option<Buffer<u8>>, i32), EngineError> {
        let count: usize = shape.iter().product();
        let (tensor, dtype) = match self.source {
            Source::Checkpoint(c) => {
                let tensor = c.tensor(name, shape)?;
                let dtype = tensor.dtype();
                (Some(tensor), dtype)
            }
            Source::Random(_) => (None, Dtype::Bf16),
        };
        let bytes = count * dtype.size();
        let kept = if keep { Some(Buffer::zeroed(&self.device, bytes)?) } else { None };
        if kept.is_none() && self.staging.len() < bytes {
            // Earlier conversions may still read the old buffer.
            self.stream.synchronize()?;
            self.staging = Buffer::zeroed(&self.device, bytes)?;
        }
        match (tensor, self.source) {
            (Some(tensor), _) => {
                let to = kept.as_ref().unwrap_or(&self.staging);
                self.pieces.upload(&self.stream, tensor.bytes(), to)?;
            }
            (None, Source::Random(seed)) => {
                let to = kept.as_ref().unwrap_or(&self.staging).pointer();
                let args = RandomArgs {
                    to,
                    count: count as i64,
                    seed: name_seed(seed, name),
                    deviation: deviation(shape),
                    to_f32: 0,
                };
                let kernels = self.device.kernels();
                kernels.random.launch(&self.stream, conversion(count), &args)?;
            }
            (None, Source::Checkpoint(_)) => {}
        }
        self.progress.inc(count as u64);
        Ok((kept, dtype_number(dtype)))
    }

    /// Puts a tensor into the staging buffer; its address and element type hold until the next call.
    pub fn stage(&mut self, name: &str, shape: &[usize]) -> Result<(u64, i32), EngineError> {
        let (_, dtype) = self.fill(name, shape, false)?;
        Ok((self.staging.pointer(), dtype))
    }

    /// Puts a tensor into a buffer of its own, as it is.
    pub fn keep(&mut self, name: &str, shape: &[usize]) -> Result<(Buffer<u8>, i32), EngineError> {
        let (kept, dtype) = self.fill(name, shape, true)?;
        let kept = match kept {
            Some(buffer) => buffer,
            None => Buffer::zeroed(&self.device, 0)?,
        };
        Ok((kept, dtype))
    }

    /// A tensor's values on the host.
    pub fn host(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        match self.source {
            Source::Checkpoint(c) => Ok(c.tensor(name, shape)?.to_f32().to_vec()),
            Source::Random(seed) => {
                let mut values = vec![0.0; shape.iter().product()];
                Source::random_host(name_seed(seed, name), deviation(shape), &mut values);
                Ok(values)
            }
        }
    }

    /// Waits until everything is in its place.
    pub fn finish(&self) -> Result<(), EngineError> {
        self.stream.synchronize()?;
        self.progress.finish_and_clear();
        Ok(())
    }

    pub fn token_table(&self) -> Result<TokenTable, EngineError> {
        match self.source {
            Source::Checkpoint(c) => Ok(TokenTable::File(c.token_table()?)),
            Source::Random(seed) => Ok(TokenTable::Random(seed)),
        }
    }

    /// Queues a kernel of 256 threads a block that takes a warp for each of `count` results.
    pub fn per_warp<A: Copy>(&self, kernel: &Kernel<A>, count: usize, args: &A) -> Result<(), EngineError> {
        kernel.launch(&self.stream, Shape { dependent: false, ..Shape::blocks(count.div_ceil(8), 256) }, args)
    }

    /// Queues a conversion of `count` elements out of the staging buffer.
    pub fn convert<A: Copy>(&self, kernel: &Kernel<A>, count: usize, args: &A) -> Result<(), EngineError> {
        kernel.launch(&self.stream, conversion(count), args)
    }
}

/// A grid-stride launch.
fn conversion(count: usize) -> Shape {
    Shape { dependent: false, ..Shape::blocks(count.div_ceil(256).clamp(1, 132 * 16), 256) }
}
