//! The latest-value slot over real threads; `tests/loom.rs` has every interleaving of fewer steps.

use pi0_mps::rt::latest::latest;

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
