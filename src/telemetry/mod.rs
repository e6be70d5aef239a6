//! Figures about a running node: histograms and their snapshots, and the flight recorder's memory.

mod histogram;
pub mod recorder;
pub mod trace;

pub use histogram::{Histogram, Stats};
