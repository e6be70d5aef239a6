//! Between a finished chunk and the robot: no device, no ROS, no wall clock, one pure [`Controller::tick`].
//!
//! The data goes down this list:
//!
//! | room | what happens there |
//! | --- | --- |
//! | [`chunk`] | what the policy answered |
//! | [`timeline`] | a chunk is accepted or refused; which of its actions is due; what the robot has consumed |
//! | [`curve`] | accepted actions become one continuous reference; seams are blended; the pace that keeps limits |
//! | [`filter`] | one step from what the robot was told towards the reference, inside the limits |
//! | [`window`] | the next fraction of a second, with a braking tail, as it is published |
//! | [`mode`] | the mode table |
//! | [`reason`] | why: refusals and stops, as values and as text |
//! | [`tick`] | the controller that joins them |
//! | [`status`], [`deadlines`] | what can be asked about it afterwards |
//!
//! One idea carries the safety argument: **the command is what the robot was told.** A published window is a curve in
//! ROS time with continuous velocity, and every tick starts from that curve's value now. However much time passed (a
//! jittered wake-up, skipped periods, a slow or paused clock), the robot is on that curve, the next window continues
//! it, and since each window alone keeps all limits and ends at rest, so does any sequence of them.

pub mod chunk;
pub mod config;
pub mod curve;
pub mod deadlines;
pub mod filter;
pub mod joints;
pub mod mode;
pub mod reason;
pub mod status;
pub mod tick;
pub mod timeline;
pub mod window;

pub use chunk::{ActionChunk, ChunkTiming};
pub use config::{ConfigError, ControlConfig, JointConfig, JointLimits, MissPolicy, Seam};
pub use deadlines::{Deadlines, DeadlinesSnapshot, TickTimes};
pub use joints::{JointVector, MAX_JOINTS};
pub use mode::{Level, MODES, Mode, ModeRow};
pub use reason::{ChunkRefusal, InputFault, InputHealth, Names, Reason, Refusal};
pub use status::{ControlStatus, Counters, Interventions, PlanView, Rule};
pub use tick::{Adoption, ChunkVerdict, Controller, Lifecycle, LimitsError, Measured, Requests, TickInput, TickReport};
pub use window::Window;
