//! The threads of one stage. Each stage has its own, so that neither waits for the other's work.

use crate::engine::EngineError;

/// Who does the work of one call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Parallelism {
    /// The calling thread alone.
    None,
    /// The threads of the rayon pool it is called in.
    Rayon,
}

/// One thread (the caller's) or a pool.
pub(super) struct Workers {
    pool: Option<rayon::ThreadPool>,
}

impl Workers {
    pub(super) fn new(stage: &'static str, threads: usize) -> Result<Self, EngineError> {
        if threads <= 1 {
            return Ok(Self { pool: None });
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(move |i| format!("{stage}-{i}"))
            .build()
            .map(|pool| Self { pool: Some(pool) })
            .map_err(|e| EngineError::Unavailable {
                device: "cpu".into(),
                reason: format!("{threads} {stage} threads could not be started: {e}"),
                remedy: "Ask for fewer threads".into(),
            })
    }

    /// Runs `work` where its parallel parts find these threads.
    pub(super) fn run(&self, work: impl FnOnce(Parallelism) + Send) {
        match &self.pool {
            None => work(Parallelism::None),
            Some(pool) => pool.install(|| work(Parallelism::Rayon)),
        }
    }
}
