//! Figures about a running node: histograms and their snapshots, the flight recorder's memory, and the files that
//! results go to.

mod histogram;
mod out_file;
pub mod recorder;
pub mod trace;

pub use histogram::{Histogram, Stats};
pub use out_file::OutFile;
