//! What ran when: a ring of spans that any thread may write to, also one that must not wait, and its export for
//! <https://ui.perfetto.dev> (the Chrome trace format).
//!
//! Nothing is recorded until [`start`]. A full ring forgets the oldest spans.

use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use serde_json::json;

use crate::choice::choice;
use crate::clock::Monotonic;

choice! {
    /// What a span is of; each kind is a line of its own in the picture.
    What {
        /// One encode, numbered.
        Encode = "encoder",
        /// One decode, with the number of its chunk.
        Decode = "decoder",
        /// From the wake-up of a control tick until its command was sent.
        Tick = "control",
        /// A tick that missed its deadline, from when it was due.
        Missed = "deadline missed",
        /// Making the stages of another split.
        Build = "re-split, build",
        /// From asking for another split until it was in force.
        Resplit = "re-split",
    }
}

const ALL: [What; 6] = [What::Encode, What::Decode, What::Tick, What::Missed, What::Build, What::Resplit];

/// Spans kept: ten minutes of a node at 50 Hz that decodes at 200 Hz.
const CAPACITY: usize = 1 << 18;

/// One place of the ring. A span that is overwritten while it is read may mix two: only the oldest are ever overwritten.
#[derive(Default)]
struct Place {
    start: AtomicI64,
    end: AtomicI64,
    id: AtomicU64,
    /// One more than the index in [`ALL`]; 0 for an empty place.
    what: AtomicU64,
}

/// A ring of spans.
struct Ring {
    places: Box<[Place]>,
    next: AtomicU64,
}

impl Ring {
    fn new(capacity: usize) -> Self {
        Self { places: (0..capacity).map(|_| Place::default()).collect(), next: AtomicU64::new(0) }
    }

    fn put(&self, what: What, id: u64, start: Monotonic, end: Monotonic) {
        let at = self.next.fetch_add(1, Ordering::Relaxed) as usize % self.places.len();
        let place = &self.places[at];
        place.what.store(0, Ordering::Relaxed);
        place.start.store(start.0, Ordering::Relaxed);
        place.end.store(end.0, Ordering::Relaxed);
        place.id.store(id, Ordering::Relaxed);
        place.what.store(1 + what as u64, Ordering::Release);
    }

    /// Spans in the order of their beginning.
    fn spans(&self) -> Vec<(What, u64, i64, i64)> {
        let mut spans: Vec<_> = (self.places.iter())
            .filter_map(|p| {
                let what = ALL.get((p.what.load(Ordering::Acquire) as usize).checked_sub(1)?)?;
                Some((
                    *what,
                    p.id.load(Ordering::Relaxed),
                    p.start.load(Ordering::Relaxed),
                    p.end.load(Ordering::Relaxed),
                ))
            })
            .collect();
        spans.sort_by_key(|s| s.2);
        spans
    }

    /// The Chrome trace format: one thread a kind, times in microseconds from the first span on.
    fn export(&self) -> serde_json::Value {
        let spans = self.spans();
        let begin = spans.first().map_or(0, |s| s.2);
        let us = |ns: i64| ns as f64 * 1e-3;
        let names = ALL.iter().map(|w| {
            json!({ "ph": "M", "pid": 1, "tid": *w as u64 + 1, "name": "thread_name", "args": { "name": w.name() } })
        });
        let events = spans.iter().map(|(what, id, start, end)| {
            // Number 0 says that there is no number.
            let name = if *id == 0 { what.name().into() } else { format!("{} {id}", what.name()) };
            json!({ "ph": "X", "pid": 1, "tid": *what as u64 + 1, "name": name,
                "ts": us(start - begin), "dur": us((end - start).max(0)) })
        });
        json!({ "displayTimeUnit": "ms", "traceEvents": names.chain(events).collect::<Vec<_>>() })
    }
}

static RING: OnceLock<Ring> = OnceLock::new();

/// Records from now on.
pub fn start() {
    let _ = RING.set(Ring::new(CAPACITY));
}

/// A span, if anything is recorded: four stores, no lock, no allocation.
pub fn span(what: What, id: u64, start: Monotonic, end: Monotonic) {
    if let Some(ring) = RING.get() {
        ring.put(what, id, start, end);
    }
}

/// What has been recorded; `None` if nothing was to be.
pub fn text() -> Option<String> {
    RING.get().map(|ring| ring.export().to_string())
}

/// Writes what has been recorded; nothing if nothing was to be.
pub fn write(file: &Path) -> io::Result<()> {
    text().map_or(Ok(()), |text| std::fs::write(file, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choices_are_in_the_order_of_their_numbers() {
        assert!(ALL.iter().enumerate().all(|(i, w)| *w as usize == i));
        assert_eq!(ALL.len(), What::NAMES.len());
    }

    #[test]
    fn overlapping_spans_are_exported_on_lines_of_their_own() {
        let ring = Ring::new(8);
        ring.put(What::Decode, 7, Monotonic(2_000), Monotonic(6_000));
        ring.put(What::Encode, 8, Monotonic(1_000), Monotonic(5_000));
        let out = ring.export();
        let events: Vec<_> = out["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(events.len(), 2);
        assert_eq!(
            (&events[0]["name"], &events[0]["ts"], &events[0]["dur"]),
            (&json!("encoder 8"), &json!(0.0), &json!(4.0))
        );
        assert_eq!((&events[1]["ts"], &events[1]["dur"]), (&json!(1.0), &json!(4.0)));
        assert_ne!(events[0]["tid"], events[1]["tid"]);
    }

    #[test]
    fn a_full_ring_keeps_the_newest_from_every_thread() {
        let ring = Ring::new(64);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let ring = &ring;
                scope.spawn(move || {
                    (0..100).for_each(|i| {
                        ring.put(What::Tick, thread * 1000 + i, Monotonic(i as i64), Monotonic(i as i64))
                    });
                });
            }
        });
        let spans = ring.spans();
        assert_eq!(spans.len(), 64);
        assert!(spans.iter().all(|s| s.0 == What::Tick && s.1 % 1000 < 100));
    }
}
