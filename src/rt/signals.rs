//! What other threads tell the control thread, and what it tells them, in one atomic each.

use super::sync::{AtomicU8, AtomicU64, Ordering};

/// Requests as bits that one tick takes all at once; none is lost and none is taken twice.
#[derive(Debug)]
pub struct RequestBits(AtomicU8);

impl Default for RequestBits {
    fn default() -> Self {
        Self(AtomicU8::new(0))
    }
}

impl RequestBits {
    /// Arm.
    pub const ENABLE: u8 = 1;
    /// Disarm.
    pub const DISABLE: u8 = 2;
    /// Stop, and stay stopped.
    pub const STOP: u8 = 4;
    /// Release a stop.
    pub const RESET: u8 = 8;

    /// Asks; takes effect at the next tick.
    pub fn ask(&self, bits: u8) {
        self.0.fetch_or(bits, Ordering::AcqRel);
    }

    /// Everything asked for since the last call.
    pub fn take(&self) -> u8 {
        self.0.swap(0, Ordering::AcqRel)
    }
}

/// The reset epoch: the control thread raises it, and a chunk carries the one that was read before anything else of its
/// observation. So a chunk of the current epoch was begun after the last stop.
#[derive(Debug)]
pub struct Epoch(AtomicU64);

impl Default for Epoch {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Epoch {
    /// The epoch in force when this returns, or an older one: never one that has not begun.
    pub fn current(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Says which one is in force; only the control thread does.
    pub fn set(&self, epoch: u64) {
        self.0.store(epoch, Ordering::Release);
    }
}
