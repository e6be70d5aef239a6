//! Hand-over between stages: slots move, nothing is shared.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means a stage panicked; the value is still whole, since every write is one assignment.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A one-place mailbox in which the newest value wins.
#[derive(Debug)]
pub struct Mailbox<T> {
    state: Mutex<(Option<T>, bool)>,
    changed: Condvar,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self { state: Mutex::new((None, false)), changed: Condvar::new() }
    }
}

impl<T> Mailbox<T> {
    /// Puts `value` in; the value it displaced comes back, so that a cache slot is never lost.
    pub fn put(&self, value: T) -> Option<T> {
        let displaced = lock(&self.state).0.replace(value);
        self.changed.notify_all();
        displaced
    }

    /// Takes the value if one is there.
    pub fn try_take(&self) -> Option<T> {
        let value = lock(&self.state).0.take();
        if value.is_some() {
            self.changed.notify_all();
        }
        value
    }

    /// Waits up to `timeout` for a value; `None` when it ran out or the mailbox was closed.
    pub fn take(&self, timeout: Duration) -> Option<T> {
        let mut state = lock(&self.state);
        if state.0.is_none() && !state.1 {
            state = match self.changed.wait_timeout_while(state, timeout, |s| s.0.is_none() && !s.1) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        let value = state.0.take();
        drop(state);
        if value.is_some() {
            self.changed.notify_all();
        }
        value
    }

    /// Wakes everybody who waits, now and later.
    pub fn close(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_newest_value_wins_and_the_displaced_one_comes_back() {
        let m = Mailbox::default();
        assert_eq!(m.put(1), None);
        assert_eq!(m.put(2), Some(1));
        assert_eq!(m.try_take(), Some(2));
        assert_eq!(m.take(Duration::from_millis(1)), None);
    }

    #[test]
    fn closing_wakes_a_waiter() {
        let m = Arc::new(Mailbox::<u8>::default());
        let waiter = std::thread::spawn({
            let m = m.clone();
            move || m.take(Duration::from_secs(60))
        });
        m.close();
        assert_eq!(waiter.join().ok(), Some(None));
    }

    #[test]
    fn a_slot_is_neither_lost_nor_doubled_between_two_threads() {
        // Five slots go round through the mailbox and a free list; at the end all five are there, once.
        let filled = Arc::new(Mailbox::<usize>::default());
        let (free_tx, free_rx) = crossbeam_channel::unbounded();
        (0..5).for_each(|i| free_tx.send(i).unwrap());
        let consumer = std::thread::spawn({
            let (filled, free_tx) = (filled.clone(), free_tx.clone());
            move || {
                let mut taken = 0;
                while let Some(slot) = filled.take(Duration::from_millis(200)) {
                    taken += 1;
                    free_tx.send(slot).unwrap();
                }
                taken
            }
        });
        let mut displaced = 0;
        for _ in 0..10_000 {
            let slot = free_rx.recv().unwrap();
            if let Some(old) = filled.put(slot) {
                displaced += 1;
                free_tx.send(old).unwrap();
            }
        }
        assert_eq!(consumer.join().unwrap() + displaced, 10_000);
        let mut left: Vec<_> = free_rx.try_iter().collect();
        left.sort_unstable();
        assert_eq!(left, [0, 1, 2, 3, 4]);
    }
}
