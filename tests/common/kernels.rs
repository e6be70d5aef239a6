//! Which kernels the GPU tests run: the chip's own, or the portable ones where PI0_TEST_KERNELS=portable asks for them.

use pi0_mps::engine::Engine;
use pi0_mps::engine::cuda::{CudaEngine, Tuning};

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

/// `engine` with the kernels asked for.
pub fn asked(engine: CudaEngine) -> CudaEngine {
    let engine = engine.tuned(tuning());
    assert!(!portable() || engine.describe().ends_with("portable kernels"), "{}", engine.describe());
    engine
}
