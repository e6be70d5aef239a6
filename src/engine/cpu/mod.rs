//! The float32 oracle: π0 and π0.5 on the CPU, plain to read first and reasonably fast second.
//!
//! Data flow: `vision` (SigLIP, per view) → `prefix` (trunk, fills the cache) → `expert` (action expert over cache and
//! suffix, once per step) with `flow` (time and Euler). `gemma` is the layer both stacks share, `matrix`, `math` and
//! `attention` the arithmetic, `weights` the names in the checkpoint.
//!
//! Three savings, all exact: masked views and padding are not there at all, the last trunk layer makes only keys and
//! values, and the state row of π0 is worked out once instead of at every step.
//!
//! Results do not depend on the number of threads: every sum has one order.

mod attention;
mod expert;
mod flow;
mod gemma;
mod math;
mod matrix;
mod prefix;
#[cfg(test)]
mod tests;
mod vision;
mod weights;
mod workers;

use std::sync::Arc;

pub use expert::CpuDecoder;
pub use prefix::{CpuCache, CpuEncoder};

use super::{Engine, EngineError};
use crate::model::{Checkpoint, Dims, Preprocessor, Resampler};
use weights::{DecoderWeights, EncoderWeights};

/// A checkpoint on the CPU.
pub struct CpuEngine {
    dims: Dims,
    encoder: Arc<EncoderWeights>,
    decoder: Arc<DecoderWeights>,
    resampler: Resampler,
    threads: usize,
}

impl CpuEngine {
    /// Takes the weights of `checkpoint`: F32 weights stay in the mapped file, others are converted into memory.
    ///
    /// `resampler` brings camera frames to the model's size; planes come as they are. `threads` is what each stage may use (they can run at the same time); 1 means the calling thread.
    pub fn load(checkpoint: &Checkpoint, resampler: Resampler, threads: usize) -> Result<Self, EngineError> {
        if threads == 0 {
            return Err(EngineError::Shape { what: "threads", expected: "at least 1".into(), found: "0".into() });
        }
        let dims = *checkpoint.dims();
        weights::check(&dims)?;
        Ok(Self {
            dims,
            encoder: Arc::new(EncoderWeights::load(checkpoint)?),
            decoder: Arc::new(DecoderWeights::load(checkpoint)?),
            resampler,
            threads,
        })
    }
}

impl Engine for CpuEngine {
    type Cache = CpuCache;
    type Encoder = CpuEncoder;
    type Decoder = CpuDecoder;

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn describe(&self) -> String {
        let threads = if self.threads == 1 { "1 thread".into() } else { format!("{} threads", self.threads) };
        format!("cpu, float32, {threads} a stage")
    }

    fn cache(&self, views: usize, tokens: usize) -> Result<CpuCache, EngineError> {
        /// Far above any prefix, so that a wrong number cannot eat the memory.
        const MAX_ROWS: usize = 1 << 16;
        let rows = views.saturating_mul(self.dims.vision.tokens()).saturating_add(tokens);
        if rows == 0 || rows > MAX_ROWS {
            return Err(EngineError::Shape {
                what: "cache slot",
                expected: format!("1 to {MAX_ROWS} rows"),
                found: format!("{rows} ({views} views and {tokens} prompt tokens)"),
            });
        }
        Ok(CpuCache::new(&self.dims, rows))
    }

    fn stages(&self) -> Result<(CpuEncoder, CpuDecoder), EngineError> {
        let preprocessor = Preprocessor::new(self.dims.vision.image, self.resampler);
        Ok((
            CpuEncoder::new(self.dims, Arc::clone(&self.encoder), preprocessor, self.threads)?,
            CpuDecoder::new(self.dims, Arc::clone(&self.decoder), self.threads)?,
        ))
    }
}

/// Makes `buffer` at least `len` long; it never shrinks, so a warm stage does not allocate.
fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
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
