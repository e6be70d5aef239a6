//! Which kernels the GPU tests run: the chip's own, or the portable ones where PI0_TEST_KERNELS=portable asks for them.

use pi0_mps::engine::Engine;
use pi0_mps::engine::cuda::{CudaEngine, Packing, Tuning};
use pi0_mps::model::{Checkpoint, Dims, Resampler};

/// Whether the portable kernels are asked for.
pub fn portable() -> bool {
    match std::env::var("PI0_TEST_KERNELS").as_deref() {
        Ok("portable") => true,
        Err(_) => false,
        Ok(other) => panic!("PI0_TEST_KERNELS: '{other}' is not 'portable'"),
    }
}

/// The default knobs, for the kernels asked for.
pub fn tuning() -> Tuning {
    Tuning::default().portable(portable())
}

/// `checkpoint` on the first GPU, with the kernels asked for.
pub fn load(checkpoint: &Checkpoint, resampler: Resampler) -> CudaEngine {
    asked(if portable() {
        CudaEngine::load_for(Packing::General, checkpoint, resampler, 0).unwrap()
    } else {
        CudaEngine::load(checkpoint, resampler, 0).unwrap()
    })
}

/// A model drawn from `seed`, likewise.
pub fn random(dims: &Dims, resampler: Resampler, seed: u64) -> CudaEngine {
    asked(if portable() {
        CudaEngine::random_for(Packing::General, dims, resampler, 0, seed).unwrap()
    } else {
        CudaEngine::random(dims, resampler, 0, seed).unwrap()
    })
}

/// `engine` with the kernels asked for.
fn asked(engine: CudaEngine) -> CudaEngine {
    let engine = engine.tuned(tuning());
    assert!(!portable() || engine.describe().ends_with("portable kernels"), "{}", engine.describe());
    engine
}
