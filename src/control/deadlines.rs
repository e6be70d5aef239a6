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
    /// What the command was made from; `None` if no plan is followed.
    pub plan: Option<PlanTimes>,
}

/// The plan behind a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanTimes {
    /// When the newest image of its observation arrived.
    pub observed: Monotonic,
    /// Whether this is the first command of its chunk.
    pub adopted: bool,
}

/// Histograms of the loop, and its misses.
#[derive(Debug, Clone)]
pub struct Deadlines {
    deadline_ns: i64,
    misses: u64,
    late: Histogram,
    compute: Histogram,
    publish: Histogram,
    plan_age: Histogram,
    observation_to_command: Histogram,
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
    /// The deadline, from scheduled.
    pub deadline: i64,
    /// Deadline minus publish returned; `None` before the first command.
    pub slack: Option<Slack>,
    /// Observation to publish returned, for every command that follows a plan.
    pub plan_age: Stats,
    /// Observation to publish returned, for the first command of each chunk.
    pub observation_to_command: Stats,
}

/// What was left until the deadline when publish returned, in nanoseconds; negative past it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slack {
    /// The least so far.
    pub min: i64,
    /// 99 of 100 commands had at least this.
    pub p01: i64,
    /// Median.
    pub p50: i64,
}

impl Deadlines {
    /// A deadline of `deadline` seconds after the scheduled start; 0 means `period` seconds.
    pub fn new(deadline: f64, period: f64) -> Self {
        let mut deadlines = Self {
            deadline_ns: 0,
            misses: 0,
            late: Histogram::new(),
            compute: Histogram::new(),
            publish: Histogram::new(),
            plan_age: Histogram::new(),
            observation_to_command: Histogram::new(),
        };
        deadlines.set(deadline, period);
        deadlines
    }

    /// Another deadline, as in [`new`](Self::new); what was recorded stays.
    pub fn set(&mut self, deadline: f64, period: f64) {
        let seconds = if deadline > 0.0 { deadline } else { period };
        self.deadline_ns = (seconds * 1e9).round() as i64;
    }

    /// Records one tick; allocates nothing. True if it missed its deadline.
    pub fn record(&mut self, t: &TickTimes) -> bool {
        let ns = |from: Monotonic, to: Monotonic| u64::try_from(to.0.saturating_sub(from.0)).unwrap_or(0);
        self.late.record(ns(t.scheduled, t.woke));
        self.compute.record(ns(t.woke, t.computed));
        let Some(published) = t.published else { return false };
        self.publish.record(ns(t.scheduled, published));
        if let Some(plan) = t.plan {
            let age = ns(plan.observed, published);
            self.plan_age.record(age);
            if plan.adopted {
                self.observation_to_command.record(age);
            }
        }
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
        let publish = self.publish.stats();
        // Of all ticks to the present deadline: the least slack is that of the latest publish, and so on.
        let left = |taken: u64| self.deadline_ns.saturating_sub(i64::try_from(taken).unwrap_or(i64::MAX));
        let slack = Slack { min: left(publish.max), p01: left(publish.p99), p50: left(publish.p50) };
        DeadlinesSnapshot {
            misses: self.misses,
            wake_late: self.late.stats(),
            compute: self.compute.stats(),
            publish,
            deadline: self.deadline_ns,
            slack: (publish.count > 0).then_some(slack),
            plan_age: self.plan_age.stats(),
            observation_to_command: self.observation_to_command.stats(),
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
            plan: None,
        };
        assert!(!d.record(&at(Some(Monotonic(20_001_000)))), "exactly one period");
        assert!(d.record(&at(Some(Monotonic(20_001_001)))));
        assert!(!d.record(&at(None)));
        let s = d.snapshot();
        assert_eq!((s.misses, s.publish.count, s.wake_late.count), (1, 2, 3));
        assert!(!Deadlines::new(0.5, 0.02).record(&at(Some(Monotonic(400_000_000)))));
    }

    #[test]
    fn slack_is_what_is_left_of_the_deadline_and_negative_past_it() {
        let mut d = Deadlines::new(0.01, 0.02);
        let mut tick = |published: Option<i64>| {
            d.record(&TickTimes { published: published.map(Monotonic), ..TickTimes::default() });
            d.snapshot()
        };
        let s = tick(None);
        assert_eq!((s.slack, s.deadline), (None, 10_000_000));
        for _ in 0..98 {
            tick(Some(100));
        }
        tick(Some(127));
        let s = tick(Some(12_000_000));
        // Values below 128 are exact.
        assert_eq!(s.slack, Some(Slack { min: -2_000_000, p01: 9_999_873, p50: 9_999_900 }));
        assert_eq!(s.misses, 1);
    }

    #[test]
    fn a_plan_ages_with_every_command_and_is_counted_once_as_adopted() {
        let mut d = Deadlines::new(0.0, 0.02);
        let mut tick = |published: Option<i64>, plan| {
            d.record(&TickTimes { published: published.map(Monotonic), plan, ..TickTimes::default() });
        };
        let plan = |adopted| Some(PlanTimes { observed: Monotonic(1_000), adopted });
        tick(Some(1_050), plan(true));
        tick(Some(1_070), plan(false));
        tick(Some(1_090), plan(false));
        tick(Some(1_100), None);
        tick(None, plan(true));
        let s = d.snapshot();
        assert_eq!((s.plan_age.count, s.plan_age.min, s.plan_age.max), (3, 50, 90));
        assert_eq!((s.observation_to_command.count, s.observation_to_command.max), (1, 50));
    }
}
