//! Between a finished chunk and the robot: no device, no ROS, no wall clock, one pure [`Controller::tick`].
//!
//! The data goes down this list:
//!
//! | room | what happens there |
//! | --- | --- |
//! | [`chunk`] | what the policy answered |
//! | `timeline` | a chunk is accepted or refused; what of a plan the robot has consumed |
//! | `adopt` | when a chunk's turn comes, how it is dated, how it is blended in |
//! | `curve` | the reference: one continuous curve, and the pace at which it can be followed |
//! | `pace` | one period along the reference, all joints together |
//! | [`filter`] | one step of one joint, inside its limits |
//! | [`window`] | the next fraction of a second, with a braking tail, as it is published |
//! | [`mode`] | the mode table |
//! | [`reason`] | why: refusals and stops, as values and as text |
//! | [`io`], [`tick`] | what goes in and comes out, and the controller that joins it all |
//! | [`status`], [`deadlines`] | what can be asked about it afterwards |
//!
//! One idea carries the safety argument: **the command is what the robot was told.** A published window is a curve in
//! ROS time with continuous velocity, and the next tick continues that curve from the next of its points. However much
//! time passed (a jittered wake-up, skipped periods, a slow or paused clock), the robot is on the curve, and since each
//! window alone keeps all limits and ends at rest, so does any sequence of them.

pub(crate) mod adopt;
pub mod chunk;
pub mod config;
pub(crate) mod curve;
pub mod deadlines;
pub mod filter;
pub mod io;
pub mod joints;
pub mod mode;
pub(crate) mod pace;
pub mod reason;
pub mod status;
pub mod tick;
pub(crate) mod timeline;
pub mod window;

pub use chunk::{ActionChunk, ChunkTiming};
pub use config::{ConfigError, ControlConfig, JointConfig, JointLimits, MissPolicy, Seam};
pub use deadlines::{Deadlines, DeadlinesSnapshot, PlanTimes, Slack, TickTimes};
pub use io::{Adoption, ChunkVerdict, Lifecycle, Measured, Requests, TickInput, TickReport};
pub use joints::{JointVector, MAX_JOINTS};
pub use mode::{Level, MODES, Mode, ModeRow};
pub use reason::{ChunkRefusal, InputFault, InputHealth, Names, OutputNames, Reason, Refusal};
pub use status::{ControlStatus, Counters, Interventions, PlanView, Rule};
pub use tick::Controller;
pub use window::{Sent, Window};
