//! Deadlines of the control loop, on the monotonic clock.

use crate::clock::Monotonic;
use crate::telemetry::{Histogram, Stats};

/// The moments of one tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TickTimes {
    /// When the period began.
    pub scheduled: Monotonic,
    /// When the thread ran.
    pub woke: Monotonic,
    /// When the tick was computed.
    pub computed: Monotonic,
    /// When publish returned; `None` if there was nothing to publish.
    pub published: Option<Monotonic>,
}

/// Histograms of the loop, and its misses.
#[derive(Debug, Clone)]
pub struct Deadlines {
    deadline_ns: i64,
    misses: u64,
    late: Histogram,
    compute: Histogram,
    publish: Histogram,
}

/// A copy of the figures, times in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DeadlinesSnapshot {
    /// Published ticks whose publish returned after the deadline.
    pub misses: u64,
    /// Scheduled to awake.
    pub wake_late: Stats,
    /// Awake to computed.
    pub compute: Stats,
    /// Scheduled to publish returned.
    pub publish: Stats,
}

impl Deadlines {
    /// A deadline of `deadline` seconds after the scheduled start; 0 means `period` seconds.
    pub fn new(deadline: f64, period: f64) -> Self {
        let seconds = if deadline > 0.0 { deadline } else { period };
        Self {
            deadline_ns: (seconds * 1e9).round() as i64,
            misses: 0,
            late: Histogram::new(),
            compute: Histogram::new(),
            publish: Histogram::new(),
        }
    }

    /// Records one tick; allocates nothing. True if it missed its deadline.
    pub fn record(&mut self, t: &TickTimes) -> bool {
        let ns = |from: Monotonic, to: Monotonic| u64::try_from(to.0.saturating_sub(from.0)).unwrap_or(0);
        self.late.record(ns(t.scheduled, t.woke));
        self.compute.record(ns(t.woke, t.computed));
        let Some(published) = t.published else { return false };
        self.publish.record(ns(t.scheduled, published));
        let missed = published.0.saturating_sub(t.scheduled.0) > self.deadline_ns;
        self.misses += u64::from(missed);
        missed
    }

    /// Misses so far.
    pub fn misses(&self) -> u64 {
        self.misses
    }

    /// The figures so far.
    pub fn snapshot(&self) -> DeadlinesSnapshot {
        DeadlinesSnapshot {
            misses: self.misses,
            wake_late: self.late.stats(),
            compute: self.compute.stats(),
            publish: self.publish.stats(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_miss_is_counted_when_publish_returns_late_and_not_otherwise() {
        let mut d = Deadlines::new(0.0, 0.02);
        let at = |published| TickTimes {
            scheduled: Monotonic(1_000),
            woke: Monotonic(51_000),
            computed: Monotonic(60_000),
            published,
        };
        assert!(!d.record(&at(Some(Monotonic(20_001_000)))), "exactly one period");
        assert!(d.record(&at(Some(Monotonic(20_001_001)))));
        assert!(!d.record(&at(None)));
        let s = d.snapshot();
        assert_eq!((s.misses, s.publish.count, s.wake_late.count), (1, 2, 3));
        assert!(!Deadlines::new(0.5, 0.02).record(&at(Some(Monotonic(400_000_000)))));
    }
}
