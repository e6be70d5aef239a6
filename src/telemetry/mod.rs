//! Figures about a running node: histograms and their snapshots.

mod histogram;

pub use histogram::{Histogram, Stats};
