//! The CUDA engine's names in a build without it: opening it says how to get one, and nothing else can happen.

use super::partition::Offer;
use super::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, KvCache};
use crate::model::{Checkpoint, Dims, Resampler};

/// Why there is no GPU in this build.
fn absent(ordinal: usize) -> EngineError {
    EngineError::Unavailable {
        device: format!("cuda:{ordinal}"),
        reason: "this build has no CUDA engine".into(),
        remedy: "Build with --features cuda, or use cpu or auto".into(),
    }
}

/// Never exists.
#[derive(Debug)]
pub enum CudaEngine {}
/// Never exists.
#[derive(Debug)]
pub enum CudaEncoder {}
/// Never exists.
#[derive(Debug)]
pub enum CudaDecoder {}
/// Never exists.
#[derive(Debug)]
pub enum CudaCache {}

/// Always [`EngineError::Unavailable`].
pub fn offer(ordinal: usize) -> Result<Offer, EngineError> {
    Err(absent(ordinal))
}

/// Nothing: there is no driver to prepare for.
pub fn prepare_process() {}

/// The GPU's name, or why it cannot be used.
pub fn probe(ordinal: usize) -> Result<String, EngineError> {
    Err(absent(ordinal))
}

impl CudaEngine {
    /// Always [`EngineError::Unavailable`].
    pub fn load(_: &Checkpoint, _: Resampler, ordinal: usize) -> Result<Self, EngineError> {
        Err(absent(ordinal))
    }

    /// Always [`EngineError::Unavailable`].
    pub fn random(_: &Dims, _: Resampler, ordinal: usize, _: u64) -> Result<Self, EngineError> {
        Err(absent(ordinal))
    }
}

/// GPU times of an encode in milliseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeTimes {
    /// Upload and conversion of the frames.
    pub images: f32,
    /// SigLIP and projector.
    pub vision: f32,
    /// Prefix trunk.
    pub trunk: f32,
}

impl CudaEncoder {
    /// Times of the last encode.
    pub fn last_times(&self) -> Result<EncodeTimes, EngineError> {
        match *self {}
    }
}

impl CudaDecoder {
    /// Milliseconds the last decode took on the GPU.
    pub fn last_ms(&self) -> Result<f32, EngineError> {
        match *self {}
    }
}

impl KvCache for CudaCache {
    fn len(&self) -> usize {
        match *self {}
    }
}

impl Encoder for CudaEncoder {
    type Cache = CudaCache;

    fn encode(&mut self, _: &EncodeInput<'_>, _: &mut CudaCache) -> Result<(), EngineError> {
        match *self {}
    }

    fn encode_with_embeddings(&mut self, _: &EncodeInput<'_>, _: &mut CudaCache) -> Result<Vec<f32>, EngineError> {
        match *self {}
    }
}

impl Decoder for CudaDecoder {
    type Cache = CudaCache;

    fn decode(&mut self, _: &CudaCache, _: &DecodeInput<'_>, _: &mut [f32]) -> Result<(), EngineError> {
        match *self {}
    }

    fn decode_with_velocities(
        &mut self,
        _: &CudaCache,
        _: &DecodeInput<'_>,
        _: &mut [f32],
    ) -> Result<Vec<f32>, EngineError> {
        match *self {}
    }
}

impl Engine for CudaEngine {
    type Cache = CudaCache;
    type Encoder = CudaEncoder;
    type Decoder = CudaDecoder;

    fn dims(&self) -> &Dims {
        match *self {}
    }

    fn describe(&self) -> String {
        match *self {}
    }

    fn cache(&self, _: usize, _: usize) -> Result<CudaCache, EngineError> {
        match *self {}
    }

    fn stages(&self) -> Result<(CudaEncoder, CudaDecoder), EngineError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_cuda_says_how_to_get_it() {
        let e = probe(0).unwrap_err().to_string();
        assert!(e.contains("cuda:0") && e.contains("--features cuda"), "{e}");
    }
}
