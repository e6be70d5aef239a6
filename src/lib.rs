//! Real-time control with the π0 vision-language-action policy.
//!
//! Layers, each knowing only those above it (`tests/layering.rs` checks the `use` lines):
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`clock`], [`error`], [`choice`] | time sources and stamps; who is at fault; enums with the names users know |
//! | [`rt`] | scheduling rights, period loop, latest-value slot |
//! | [`bag`] | recordings in MCAP and sqlite3, and the messages in them |
//! | [`telemetry`] | histograms and counters, the ring of the flight recorder, files that tools write |
//! | [`model`] | checkpoint, tokenizer, images, normalisation, action transforms |
//! | [`engine`] | the traits `Encoder`, `Decoder`, `KvCache` and their implementations |
//! | [`control`] | chunk timeline, limits, mode machine, one pure `tick` |
//! | [`pipeline`] | stage threads and double buffers |
//! | [`params`] | the one table of parameters, and the settings read from it |
//! | [`node`] | the whole node without a middleware: inputs, pipeline, control thread |
//! | [`ros`], [`cli`] | outermost; neither knows the other |

pub mod bag;
pub mod choice;
pub mod cli;
pub mod clock;
pub mod control;
pub mod engine;
pub mod error;
pub mod model;
pub mod node;
pub mod params;
pub mod pipeline;
pub mod ros;
pub mod rt;
pub mod telemetry;
