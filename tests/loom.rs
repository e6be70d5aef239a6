//! Every interleaving of the lock-free code between threads, with loom: the library's own sources, compiled over loom's
//! atomics and cells (`sync` below takes the place of src/rt/sync.rs).

// What a model does not use is used by the library.
#![allow(dead_code, missing_docs)]

mod sync {
    pub(crate) use loom::cell::UnsafeCell;
    pub(crate) use loom::sync::Arc;
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};
}
#[path = "../src/rt/latest.rs"]
mod latest;
#[path = "../src/rt/signals.rs"]
mod signals;
#[path = "../src/rt/triple.rs"]
mod triple;

use latest::latest;
use signals::{Epoch, RequestBits};
use sync::Arc;

/// Two numbers that are equal unless somebody saw a value half written.
type Pair = (u64, u64);

#[test]
fn the_slot_gives_whole_values_in_order_and_accounts_for_each() {
    loom::model(|| {
        let (mut w, mut r) = latest::<Pair>((0, 0));
        let writer = loom::thread::spawn(move || {
            for n in 1..=3 {
                w.put((n, n));
            }
        });
        let (mut last, mut seen) = (0, 0);
        for _ in 0..2 {
            if let Some(&(a, b)) = r.take_new() {
                assert_eq!(a, b, "half a value");
                assert!(a > last, "{a} after {last}");
                (last, seen) = (a, seen + 1);
            }
            // Looking again without taking touches the reader's own cell only.
            assert_eq!(r.current().0, last);
        }
        writer.join().unwrap();
        seen += u64::from(r.take_new().is_some());
        assert_eq!(*r.current(), (3, 3), "the newest is there in the end");
        assert_eq!(seen + r.dropped(), 3);
    });
}

#[test]
fn a_value_filled_in_place_is_whole() {
    loom::model(|| {
        let (mut w, mut r) = latest::<Pair>((0, 0));
        let writer = loom::thread::spawn(move || {
            for n in 1..=2 {
                w.fill(|pair| {
                    pair.0 = n;
                    pair.1 = n;
                });
            }
        });
        for _ in 0..2 {
            let (a, b) = *r.newest();
            assert_eq!(a, b);
        }
        writer.join().unwrap();
        assert_eq!(*r.newest(), (2, 2));
    });
}

#[test]
fn a_request_is_taken_once_and_never_lost() {
    loom::model(|| {
        let bits = Arc::new(RequestBits::default());
        let asking: Vec<_> = [RequestBits::STOP, RequestBits::RESET]
            .map(|bit| {
                let bits = bits.clone();
                loom::thread::spawn(move || bits.ask(bit))
            })
            .into();
        let mut taken = vec![bits.take(), bits.take()];
        for thread in asking {
            thread.join().unwrap();
        }
        taken.push(bits.take());
        for bit in [RequestBits::STOP, RequestBits::RESET] {
            assert_eq!(taken.iter().filter(|t| *t & bit != 0).count(), 1, "{taken:?}");
        }
        assert_eq!(bits.take(), 0);
    });
}

/// The path of a stop: an operator asks, the control thread raises the epoch, the decoder stamps its chunk with the epoch
/// it read before it looked at the robot. Whatever the interleaving, a chunk that is let through saw the robot after the
/// stop, and the operator's request is seen by the tick after it.
#[test]
fn no_chunk_begun_before_a_stop_is_let_through_after_it() {
    loom::model(|| {
        let requests = Arc::new(RequestBits::default());
        let epoch = Arc::new(Epoch::default());
        // What the robot looks like: the control thread moves it on when it has stopped.
        let (mut robot, mut observed) = latest(0u64);
        // (epoch, what was observed) of the chunk on its way.
        let (mut chunks, mut chunk) = latest((u64::MAX, 0u64));

        let operator = {
            let requests = requests.clone();
            loom::thread::spawn(move || requests.ask(RequestBits::STOP))
        };
        let decoder = {
            let epoch = epoch.clone();
            loom::thread::spawn(move || {
                let begun_in = epoch.current();
                let seen = *observed.newest();
                chunks.put((begun_in, seen));
            })
        };
        let mut own = 0;
        for _ in 0..2 {
            if requests.take() & RequestBits::STOP != 0 {
                own += 1;
                robot.put(1);
                epoch.set(own);
            }
            if let Some(&(begun_in, seen)) = chunk.take_new()
                && begun_in == own
            {
                assert_eq!(seen, own, "a chunk made from what was there before the stop");
            }
        }
        operator.join().unwrap();
        decoder.join().unwrap();
        if own == 0 {
            assert_eq!(requests.take(), RequestBits::STOP, "the stop waits for the next tick");
        }
    });
}
