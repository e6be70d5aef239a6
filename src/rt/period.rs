//! A periodic loop at absolute times: no drift, no bursts.

use std::time::Duration;

use crate::clock::Monotonic;

/// One wake-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wake {
    /// When the period began.
    pub scheduled: Monotonic,
    /// When the thread ran.
    pub woke: Monotonic,
    /// Whole periods that passed since the last wake-up without one of their own.
    pub skipped: u64,
}

/// The next period's start after one that began at `last`, seen at `now`, and the periods left out: a loop that is late
/// keeps its phase and never catches up in a burst. A start that is not over yet is not skipped.
pub fn next_start(last: Monotonic, now: Monotonic, period: Duration) -> (Monotonic, u64) {
    let period = i64::try_from(period.as_nanos()).unwrap_or(i64::MAX).max(1);
    let late = now.0.saturating_sub(last.0.saturating_add(period));
    // The period that runs now has begun late: it still counts as the next one if less than all of it is gone.
    let skipped = (late / period).max(0);
    (Monotonic(last.0.saturating_add(period.saturating_mul(skipped + 1))), skipped as u64)
}

/// Wakes the calling thread once per period on CLOCK_MONOTONIC.
#[derive(Debug, Clone)]
pub struct Periodic {
    period: Duration,
    last: Monotonic,
}

impl Periodic {
    /// The first period begins one period from now. A period of zero is taken as one nanosecond.
    pub fn new(period: Duration) -> Self {
        Self { period, last: super::monotonic_now() }
    }

    /// The period.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// Sleeps until the next period begins; returns at once if it has.
    pub fn wait(&mut self) -> Wake {
        let (scheduled, skipped) = next_start(self.last, super::monotonic_now(), self.period);
        sleep_until(scheduled);
        self.last = scheduled;
        Wake { scheduled, woke: super::monotonic_now(), skipped }
    }
}

/// Sleeps until `t` on CLOCK_MONOTONIC; returns at once if that is over.
pub fn sleep_until(t: Monotonic) {
    let until = libc::timespec {
        tv_sec: (t.0.max(0) / 1_000_000_000) as libc::time_t,
        tv_nsec: (t.0.max(0) % 1_000_000_000) as libc::c_long,
    };
    loop {
        // SAFETY: `until` is a valid timespec; with TIMER_ABSTIME the remainder is not written and may be null.
        let rc =
            unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &until, std::ptr::null_mut()) };
        // A signal is no reason to be early; any other error would be one to spin, so it ends the wait.
        if rc != libc::EINTR {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: Duration = Duration::from_nanos(100);

    #[test]
    fn an_overrun_skips_whole_periods_and_keeps_the_phase() {
        for (now, start, skipped) in [
            (1000, 1100, 0),
            (1099, 1100, 0),
            (1100, 1100, 0),
            (1199, 1100, 0), // late, but this period is not over
            (1200, 1200, 1),
            (1250, 1200, 1),
            (1999, 1900, 8),
            (900, 1100, 0),
        ] {
            assert_eq!(next_start(Monotonic(1000), Monotonic(now), P), (Monotonic(start), skipped), "now {now}");
        }
    }

    #[test]
    fn every_period_is_either_run_or_skipped() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let (mut last, mut now, mut runs, mut skips) = (Monotonic(0), 0i64, 0, 0);
        for _ in 0..10_000 {
            let (start, skipped) = next_start(last, Monotonic(now), P);
            assert_eq!(start.0 % 100, 0, "the phase is kept");
            assert!(start > last && start.0 > now - 100, "no burst: at most the period that runs now");
            now = now.max(start.0)
                + if rng.random_bool(0.1) { rng.random_range(0..2000) } else { rng.random_range(0..90) };
            (last, runs, skips) = (start, runs + 1, skips + skipped);
        }
        assert_eq!(last.0, 100 * (runs + skips as i64));
    }

    #[test]
    fn it_wakes_at_its_times_and_not_before() {
        let mut p = Periodic::new(Duration::from_millis(2));
        let mut last = None;
        for _ in 0..20 {
            let w = p.wait();
            assert!(w.woke >= w.scheduled);
            if let Some(last) = last {
                let gap = w.scheduled.0 - last;
                assert_eq!(gap, 2_000_000 * (1 + w.skipped as i64));
            }
            last = Some(w.scheduled.0);
        }
    }
}
