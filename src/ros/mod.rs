//! The node on ROS 2: topics, services, parameters and diagnostics round the core. Only what touches the middleware
//! needs the feature `ros`.
//!
//! | thread | what it does |
//! | --- | --- |
//! | `ros-spin` | takes messages and puts them where they belong; never waits for anybody |
//! | `ros-picture-N` | decodes the compressed images of one camera |
//! | `ros-stop` | serves `~/stop` from a node of its own |
//! | `ros-services` | enable, reset, the parameter and the lifecycle services, which may take their time |
//! | `ros-status` | `~/status`, `/diagnostics` and `~/transition_event` |
//! | the core's publisher | calls [`Outputs`](crate::node::Outputs), which serialise and publish |

pub mod args;
pub mod clock;

#[cfg(feature = "ros")]
mod convert;
#[cfg(feature = "ros")]
mod failure;
#[cfg(feature = "ros")]
mod graph;
#[cfg(feature = "ros")]
mod inputs;
#[cfg(feature = "ros")]
mod lifecycle;
#[cfg(feature = "ros")]
mod log;
#[cfg(feature = "ros")]
mod outputs;
#[cfg(feature = "ros")]
mod parameters;
#[cfg(feature = "ros")]
mod pictures;
#[cfg(feature = "ros")]
mod run;
#[cfg(feature = "ros")]
mod services;
#[cfg(feature = "ros")]
mod spin;
#[cfg(feature = "ros")]
mod status;
#[cfg(feature = "ros")]
mod wiring;

#[cfg(feature = "ros")]
pub use run::run;
