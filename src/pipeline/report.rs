//! What the stages have done: counters, times, the newest complaint and a fault that ends it all.

use crate::error::Fault;
use crate::telemetry::Histogram;

/// One stage.
#[derive(Debug, Clone, Default)]
pub struct StageReport {
    /// Runs that succeeded.
    pub runs: u64,
    /// Runs that failed.
    pub errors: u64,
    /// Duration of a run, ns.
    pub time: Histogram,
}

/// A re-split that is in force.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resplit {
    /// Making the new stages beside the running ones, ms.
    pub build_ms: f64,
    /// From the request until both stages had swapped, ms.
    pub total_ms: f64,
    /// Whether the stages were kept ready.
    pub cached: bool,
}

/// Both stages; a clone is a snapshot.
#[derive(Debug, Clone, Default)]
pub struct PipelineReport {
    /// Encoder.
    pub encode: StageReport,
    /// Decoder.
    pub decode: StageReport,
    /// From a filled slot to the start of its decode, ns.
    pub queue: Histogram,
    /// From the end of a decode until the control thread took its chunk, ns.
    pub hand_over: Histogram,
    /// From the arrival of the newest image to the finished chunk, ns.
    pub chunk: Histogram,
    /// Chunks older than `chunk_budget_ms` when they were ready.
    pub over_budget: u64,
    /// Filled slots displaced by newer ones before they were decoded.
    pub displaced: u64,
    /// Chunks dropped because the control thread did not take them.
    pub not_taken: u64,
    /// Observations not encoded because the stamps of their images were too far apart.
    pub skewed: u64,
    /// Chunks guided by the plan in execution.
    pub guided: u64,
    /// The shares in force and why.
    pub partition: String,
    /// Re-splits that came into force.
    pub resplits: u64,
    /// The newest of them.
    pub last_resplit: Option<Resplit>,
    /// Why nothing is being encoded or decoded just now.
    pub waiting_for: Option<String>,
    /// Newest error of a stage.
    pub last_error: Option<String>,
    /// Rights the stage threads asked for and what came of it.
    pub rights: Vec<(String, String)>,
    /// Why the pipeline cannot go on, and who has to act.
    pub fault: Option<(Fault, String)>,
}
