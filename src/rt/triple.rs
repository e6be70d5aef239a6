//! Three cells that two threads pass round without waiting: one is the writer's, one the reader's, and one lies in the
//! middle. Each side swaps its own cell for the middle one, so a cell always has exactly one owner.

use super::sync::{Arc, AtomicU8, Ordering, UnsafeCell};

/// Set in `middle` when the writer put the cell there; the rest is the cell's index.
const FRESH: u8 = 4;

#[derive(Debug)]
struct Cells<T> {
    cells: [UnsafeCell<T>; 3],
    middle: AtomicU8,
}

// SAFETY: a cell is reached only through the index that its one owner holds; indices change hands by an atomic swap
// that releases what was written and acquires what the other side wrote.
unsafe impl<T: Send> Sync for Cells<T> {}

/// The side that fills cells.
#[derive(Debug)]
pub(crate) struct Input<T> {
    shared: Arc<Cells<T>>,
    own: u8,
}

/// The side that looks at them.
#[derive(Debug)]
pub(crate) struct Output<T> {
    shared: Arc<Cells<T>>,
    own: u8,
}

/// Both sides, over these three values; the reader starts at the last.
pub(crate) fn triple<T>([first, middle, last]: [T; 3]) -> (Input<T>, Output<T>) {
    let cells = [UnsafeCell::new(first), UnsafeCell::new(middle), UnsafeCell::new(last)];
    let shared = Arc::new(Cells { cells, middle: AtomicU8::new(1) });
    (Input { shared: shared.clone(), own: 0 }, Output { shared, own: 2 })
}

impl<T> Input<T> {
    /// Looks at or changes the writer's own cell: an old value, not the last one put.
    pub(crate) fn with<R>(&mut self, f: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: `own` is this side's cell, and `&mut self` is the only way to it.
        self.shared.cells[usize::from(self.own)].with_mut(|cell| f(unsafe { &mut *cell }))
    }

    /// Puts the own cell in the middle and takes the one that lay there.
    pub(crate) fn publish(&mut self) {
        self.own = self.shared.middle.swap(self.own | FRESH, Ordering::AcqRel) & !FRESH;
    }
}

impl<T> Output<T> {
    /// Takes the middle cell if the writer put it there since the last call; whether it did.
    pub(crate) fn update(&mut self) -> bool {
        // A hint: the swap below is what acquires. Nobody but this side takes FRESH away.
        let fresh = self.shared.middle.load(Ordering::Relaxed) & FRESH != 0;
        if fresh {
            self.own = self.shared.middle.swap(self.own, Ordering::AcqRel) & !FRESH;
        }
        fresh
    }

    /// The reader's own cell.
    pub(crate) fn get(&self) -> &T {
        // SAFETY: `own` is this side's cell; it leaves only in `update`, and the borrow of `self` keeps that out.
        self.shared.cells[usize::from(self.own)].with(|cell| unsafe { &*cell })
    }
}
