//! Two kinds of time that must never be mixed: ROS time dates data, monotonic time wakes threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// Nanoseconds of ROS time (wall clock, or `/clock` under simulation). Zero means "not set".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RosTime(pub i64);

/// Nanoseconds of the monotonic clock since an arbitrary origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Monotonic(pub i64);

macro_rules! time_arithmetic {
    ($t:ident) => {
        impl $t {
            /// Signed seconds from `earlier` to `self`.
            pub fn seconds_since(self, earlier: Self) -> f64 {
                self.0.saturating_sub(earlier.0) as f64 * 1e-9
            }

            /// Signed milliseconds from `earlier` to `self`.
            pub fn ms_since(self, earlier: Self) -> f64 {
                self.seconds_since(earlier) * 1e3
            }

            /// This time moved by `seconds`, rounded to a nanosecond.
            pub fn plus_seconds(self, seconds: f64) -> Self {
                Self(self.0.saturating_add((seconds * 1e9).round() as i64))
            }
        }

        impl std::ops::Add<Duration> for $t {
            type Output = Self;
            fn add(self, d: Duration) -> Self {
                Self(self.0.saturating_add(i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)))
            }
        }
    };
}
time_arithmetic!(RosTime);
time_arithmetic!(Monotonic);

/// Where both times come from.
pub trait Clock: Send + Sync {
    /// Never jumps, never stops: for wake-ups, latencies and deadlines.
    fn monotonic(&self) -> Monotonic;
    /// May jump, pause or run at another rate: for stamps and the action timeline.
    fn ros(&self) -> RosTime;
}

/// A clock that moves only when told to: for tests and replay.
#[derive(Debug, Clone, Default)]
pub struct VirtualClock(Arc<(AtomicI64, AtomicI64)>);

impl VirtualClock {
    /// A clock that starts at the given times.
    pub fn new(monotonic: Monotonic, ros: RosTime) -> Self {
        Self(Arc::new((AtomicI64::new(monotonic.0), AtomicI64::new(ros.0))))
    }

    /// Moves both times forward.
    pub fn advance(&self, d: Duration) {
        let ns = i64::try_from(d.as_nanos()).unwrap_or(i64::MAX);
        self.0.0.fetch_add(ns, Ordering::SeqCst);
        self.0.1.fetch_add(ns, Ordering::SeqCst);
    }

    /// Sets ROS time alone, as a jump of `/clock` does.
    pub fn set_ros(&self, t: RosTime) {
        self.0.1.store(t.0, Ordering::SeqCst);
    }
}

impl Clock for VirtualClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.0.load(Ordering::SeqCst))
    }

    fn ros(&self) -> RosTime {
        RosTime(self.0.1.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_clock_moves_only_when_told() {
        let c = VirtualClock::new(Monotonic(5), RosTime(7));
        c.advance(Duration::from_nanos(10));
        assert_eq!((c.monotonic(), c.ros()), (Monotonic(15), RosTime(17)));
        c.set_ros(RosTime(3));
        assert_eq!((c.monotonic(), c.ros()), (Monotonic(15), RosTime(3)));
    }

    #[test]
    fn time_arithmetic_is_signed_and_saturates() {
        assert_eq!(RosTime(1_500_000_000).seconds_since(RosTime(2_000_000_000)), -0.5);
        assert_eq!(RosTime(0).plus_seconds(0.02), RosTime(20_000_000));
        assert_eq!(Monotonic(i64::MAX) + Duration::from_secs(1), Monotonic(i64::MAX));
    }
}
