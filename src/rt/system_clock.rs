//! The machine's own clocks.

use crate::clock::{Clock, Monotonic, RosTime};

/// The machine's clocks; ROS time is the wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn monotonic(&self) -> Monotonic {
        super::monotonic_now()
    }

    fn ros(&self) -> RosTime {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        RosTime(0) + since_epoch
    }
}
