//! A slot that holds the newest value: one writer, one reader, neither ever waits.
//!
//! Three copies of the value exist: one the writer fills, one the reader looks at, one in between. A value that was
//! never read is overwritten, and freed by the writer: the reader (a real-time thread) never frees anything.

use super::triple::{Input, Output, triple};

#[derive(Debug, Clone)]
struct Numbered<T> {
    number: u64,
    value: T,
}

/// The writing side.
#[derive(Debug)]
pub struct Writer<T: Send> {
    slot: Input<Numbered<T>>,
    number: u64,
}

/// The reading side.
#[derive(Debug)]
pub struct Reader<T: Send> {
    slot: Output<Numbered<T>>,
    seen: u64,
    dropped: u64,
}

/// A slot whose three copies start as clones of `initial`, which does not count as a value.
pub fn latest<T: Clone + Send>(initial: T) -> (Writer<T>, Reader<T>) {
    let numbered = |value| Numbered { number: 0, value };
    let (input, output) = triple([numbered(initial.clone()), numbered(initial.clone()), numbered(initial)]);
    (Writer { slot: input, number: 0 }, Reader { slot: output, seen: 0, dropped: 0 })
}

impl<T: Send> Writer<T> {
    /// Puts a value into the slot; the value two or three puts ago is dropped here.
    pub fn put(&mut self, value: T) {
        self.number += 1;
        let number = self.number;
        self.slot.with(|cell| *cell = Numbered { number, value });
        self.slot.publish();
    }

    /// Fills the next value in place and puts it into the slot: for values with memory of their own. What `fill` gets
    /// is an old value, not the last one.
    pub fn fill(&mut self, fill: impl FnOnce(&mut T)) {
        self.number += 1;
        let number = self.number;
        self.slot.with(|cell| {
            fill(&mut cell.value);
            cell.number = number;
        });
        self.slot.publish();
    }

    /// Values put so far.
    pub fn count(&self) -> u64 {
        self.number
    }
}

impl<T: Send> Reader<T> {
    /// The newest value if there is one that was not taken before.
    pub fn take_new(&mut self) -> Option<&T> {
        if !self.slot.update() {
            return None;
        }
        let newest = self.slot.get();
        self.dropped += newest.number - self.seen - 1;
        self.seen = newest.number;
        Some(&newest.value)
    }

    /// The newest value, new or not; the initial one if none was put yet.
    pub fn newest(&mut self) -> &T {
        self.take_new();
        &self.slot.get().value
    }

    /// The value last looked at, without looking for a newer one.
    pub fn current(&self) -> &T {
        &self.slot.get().value
    }

    /// Number of the value last looked at, counting from 1; 0 if none was put yet.
    pub fn number(&self) -> u64 {
        self.seen
    }

    /// Values that were overwritten before anybody looked at them, since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}
