//! Real-time rights and primitives. Thin: decisions are pure functions, the rest is one system call each.

pub mod latest;
pub mod period;
pub mod rights;
pub mod signals;
mod sync;
mod triple;

/// A bounded queue from one thread to one other, without locks.
pub use rtrb as ring;

mod system_clock;

pub use system_clock::SystemClock;

use crate::clock::Monotonic;

/// Now, on CLOCK_MONOTONIC.
pub fn monotonic_now() -> Monotonic {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec for the call to fill; CLOCK_MONOTONIC exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    Monotonic(t.tv_sec * 1_000_000_000 + t.tv_nsec)
}
