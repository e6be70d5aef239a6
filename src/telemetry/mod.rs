//! Figures about a running node: histograms and their snapshots.

mod histogram;
pub mod trace;

pub use histogram::{Histogram, Stats};
