//! A slot that holds the newest value: one writer, one reader, neither ever waits.
//!
//! Three copies of the value exist: one the writer fills, one the reader looks at, one in between. A value that was
//! never read is overwritten, and freed by the writer: the reader (a real-time thread) never frees anything.

use triple_buffer::{Input, Output, triple_buffer};

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
    let (input, output) = triple_buffer(&Numbered { number: 0, value: initial });
    (Writer { slot: input, number: 0 }, Reader { slot: output, seen: 0, dropped: 0 })
}

impl<T: Send> Writer<T> {
    /// Puts a value into the slot; the value two or three puts ago is dropped here.
    pub fn put(&mut self, value: T) {
        self.number += 1;
        self.slot.write(Numbered { number: self.number, value });
    }

    /// Fills the next value in place and puts it into the slot: for values with memory of their own. What `fill` gets
    /// is an old value, not the last one.
    pub fn fill(&mut self, fill: impl FnOnce(&mut T)) {
        self.number += 1;
        let buffer = self.slot.input_buffer_mut();
        fill(&mut buffer.value);
        buffer.number = self.number;
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
        let newest = self.slot.peek_output_buffer();
        self.dropped += newest.number - self.seen - 1;
        self.seen = newest.number;
        Some(&newest.value)
    }

    /// The newest value, new or not; the initial one if none was put yet.
    pub fn newest(&mut self) -> &T {
        self.take_new();
        &self.slot.peek_output_buffer().value
    }

    /// The value last looked at, without looking for a newer one.
    pub fn current(&self) -> &T {
        &self.slot.peek_output_buffer().value
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reader_sees_the_newest_once_and_knows_what_it_missed() {
        let (mut w, mut r) = latest(0);
        assert_eq!(r.take_new(), None);
        assert_eq!((*r.newest(), r.number(), r.dropped()), (0, 0, 0));
        w.put(1);
        assert_eq!(r.take_new(), Some(&1));
        assert_eq!(r.take_new(), None);
        assert_eq!((*r.newest(), r.dropped()), (1, 0));
        for v in 2..=5 {
            w.put(v);
        }
        assert_eq!(r.take_new(), Some(&5));
        assert_eq!((r.dropped(), r.number()), (3, 5));
        w.fill(|v| *v = 6);
        assert_eq!(*r.current(), 5);
        assert_eq!((*r.newest(), r.dropped(), w.count()), (6, 3, 6));
    }

    #[test]
    fn across_threads_values_only_go_forward_and_every_one_is_accounted() {
        const N: u64 = 200_000;
        let (mut w, mut r) = latest(0u64);
        let writer = std::thread::spawn(move || (1..=N).for_each(|v| w.put(v)));
        let (mut last, mut seen) = (0, 0);
        while last < N {
            if let Some(&v) = r.take_new() {
                assert!(v > last);
                (last, seen) = (v, seen + 1);
            }
        }
        writer.join().unwrap();
        assert_eq!(seen + r.dropped(), N);
    }

    #[test]
    fn an_overwritten_value_is_freed_by_the_writer() {
        let (mut w, mut r) = latest(None);
        let first = std::sync::Arc::new(());
        w.put(Some(first.clone()));
        r.take_new();
        for _ in 0..2 {
            w.put(None);
            r.take_new();
        }
        // The reader gave it back; the writer frees it with its next puts.
        (0..2).for_each(|_| w.put(None));
        assert_eq!(std::sync::Arc::strong_count(&first), 1);
    }
}
