//! ROS time: the wall clock, or what `/clock` last said.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::clock::{Clock, Monotonic, RosTime};
use crate::rt::SystemClock;

/// The node's clock: stamps follow `/clock` if simulated, wake-ups never do.
#[derive(Debug, Clone, Default)]
pub struct NodeClock {
    simulated: Option<Arc<AtomicI64>>,
}

impl NodeClock {
    /// A clock that follows [`set`](Self::set) if `use_sim_time`, else the wall clock.
    pub fn new(use_sim_time: bool) -> Self {
        Self { simulated: use_sim_time.then(Arc::default) }
    }

    /// What `/clock` says now; nothing happens on the wall clock.
    pub fn set(&self, t: RosTime) {
        if let Some(s) = &self.simulated {
            s.store(t.0, Ordering::Relaxed);
        }
    }
}

impl Clock for NodeClock {
    fn monotonic(&self) -> Monotonic {
        SystemClock.monotonic()
    }

    /// Zero before the first `/clock`.
    fn ros(&self) -> RosTime {
        match &self.simulated {
            Some(s) => RosTime(s.load(Ordering::Relaxed)),
            None => SystemClock.ros(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulated_time_follows_the_topic_and_monotonic_time_does_not() {
        let clock = NodeClock::new(true);
        assert_eq!(clock.ros(), RosTime(0));
        let before = clock.monotonic();
        clock.clone().set(RosTime(5));
        assert_eq!(clock.ros(), RosTime(5));
        assert!(clock.monotonic() >= before);

        let wall = NodeClock::new(false);
        wall.set(RosTime(5));
        assert!(wall.ros() > RosTime(1_600_000_000_000_000_000));
    }
}
