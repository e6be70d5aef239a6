//! Memory that an engine lends to camera frames, so that an encode finds their bytes where its device can fetch them.
//!
//! Making such memory takes milliseconds, so it is made once and comes back with the last clone of a frame. There is a
//! bound on what is out and waiting together; past it, and where no memory can be made, frames stay on the heap.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::EngineError;
use crate::model::{FrameMemory, Pixels};

/// Buffers at most: eight cameras, of each the few frames that are kept, the one that comes and one being encoded.
const MOST_BUFFERS: usize = 64;
/// Bytes at most: those of 43 frames of 1920×1080 in rgb8.
const MOST_BYTES: usize = 256 << 20;
/// Sizes are whole multiples of this, so that frames of about the same size use the same buffers.
const UNIT: usize = 64 << 10;
/// A buffer that waited while so many frames came has a size that no camera sends any more.
const IDLE: u64 = 256;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is out, and what waits to be lent again.
struct Shelf<B> {
    /// Size, [`takes`](Self::takes) when it came back, buffer.
    waiting: Vec<(usize, u64, B)>,
    takes: u64,
    /// Out and waiting.
    buffers: usize,
    bytes: usize,
    most_buffers: usize,
    most_bytes: usize,
    /// Making one has failed: no more are made.
    closed: bool,
}

/// What a shelf has for a frame.
enum Found<B> {
    Buffer(B),
    /// Room to make one, instead of these.
    Room(Vec<B>),
    Nothing,
}

impl<B> Shelf<B> {
    fn take(&mut self, size: usize) -> Found<B> {
        self.takes += 1;
        if let Some(at) = self.waiting.iter().position(|(s, ..)| *s == size) {
            return Found::Buffer(self.waiting.swap_remove(at).2);
        }
        let mut idle: Vec<usize> =
            (0..self.waiting.len()).filter(|at| self.takes - self.waiting[*at].1 > IDLE).collect();
        let fits =
            |buffers: usize, bytes: usize| buffers < self.most_buffers && bytes.saturating_add(size) <= self.most_bytes;
        let (mut buffers, mut bytes, mut freed) = (self.buffers, self.bytes, Vec::new());
        while !fits(buffers, bytes)
            && let Some(at) = idle.pop()
        {
            buffers -= 1;
            bytes -= self.waiting[at].0;
            freed.push(at);
        }
        if self.closed || !fits(buffers, bytes) {
            return Found::Nothing;
        }
        // From the last to the first: those before keep their places.
        let freed = freed.into_iter().map(|at| self.waiting.swap_remove(at).2).collect();
        (self.buffers, self.bytes) = (buffers + 1, bytes + size);
        Found::Room(freed)
    }

    /// The room that was taken could not be used.
    fn close(&mut self, size: usize) {
        self.buffers -= 1;
        self.bytes -= size;
        self.closed = true;
    }
}

/// Makes a buffer of so many bytes.
type Make<B> = Box<dyn Fn(usize) -> Result<B, EngineError> + Send + Sync>;

/// Buffers of one kind of memory. Those that are out when this goes are freed one by one, with their frames.
pub struct FramePool<B> {
    make: Make<B>,
    shelf: Arc<Mutex<Shelf<B>>>,
}

impl<B> FramePool<B> {
    /// Buffers that `make` makes of so many bytes.
    pub fn new(make: impl Fn(usize) -> Result<B, EngineError> + Send + Sync + 'static) -> Self {
        Self::bounded(MOST_BUFFERS, MOST_BYTES, Box::new(make))
    }

    fn bounded(most_buffers: usize, most_bytes: usize, make: Make<B>) -> Self {
        let shelf =
            Shelf { waiting: Vec::new(), takes: 0, buffers: 0, bytes: 0, most_buffers, most_bytes, closed: false };
        Self { make, shelf: Arc::new(Mutex::new(shelf)) }
    }

    /// Buffers out and waiting, and their bytes.
    pub fn size(&self) -> (usize, usize) {
        let shelf = lock(&self.shelf);
        (shelf.buffers, shelf.bytes)
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static> FrameMemory for FramePool<B> {
    fn keep(&self, bytes: &[u8]) -> Option<Pixels> {
        let size = bytes.len().max(1).checked_next_multiple_of(UNIT)?;
        let found = lock(&self.shelf).take(size);
        // Made and freed outside the lock, for both take their time.
        let mut buffer = match found {
            Found::Buffer(buffer) => buffer,
            Found::Room(instead) => {
                drop(instead);
                (self.make)(size)
                    .inspect_err(|e| {
                        lock(&self.shelf).close(size);
                        tracing::warn!("{e}; further camera frames wait in ordinary memory, encodes take longer");
                    })
                    .ok()?
            }
            Found::Nothing => return None,
        };
        buffer.as_mut()[..bytes.len()].copy_from_slice(bytes);
        let shelf = Arc::downgrade(&self.shelf);
        Some(Pixels::new(Lent { buffer: Some(buffer), size, used: bytes.len(), shelf }))
    }
}

/// A buffer that holds a frame's bytes. It goes back when this goes.
pub struct Lent<B> {
    /// There until this goes.
    buffer: Option<B>,
    size: usize,
    used: usize,
    shelf: Weak<Mutex<Shelf<B>>>,
}

impl<B> Lent<B> {
    /// The whole buffer, of which the frame may use less.
    pub fn buffer(&self) -> Option<&B> {
        self.buffer.as_ref()
    }
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Lent<B> {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |b| &b.as_ref()[..self.used])
    }
}

impl<B> Drop for Lent<B> {
    fn drop(&mut self) {
        // Without a shelf the buffer is freed here.
        let Some(shelf) = self.shelf.upgrade() else { return };
        if let Some(buffer) = self.buffer.take() {
            let mut shelf = lock(&shelf);
            let now = shelf.takes;
            shelf.waiting.push((self.size, now, buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Buffers and units at most.
    const MOST: usize = 8;

    /// A pool that counts what it made; it fails where `fail_from` have been made.
    fn pool(fail_from: usize) -> (FramePool<Vec<u8>>, Arc<AtomicUsize>) {
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let make = move |bytes| {
            if count.load(Ordering::Relaxed) == fail_from {
                let reason = "no more".into();
                return Err(EngineError::Device { what: "locking host memory", reason, remedy: "none".into() });
            }
            count.fetch_add(1, Ordering::Relaxed);
            Ok(vec![0xee; bytes])
        };
        (FramePool::bounded(MOST, MOST * UNIT, Box::new(make)), made)
    }

    fn address(p: &Pixels) -> *const u8 {
        p.as_ptr()
    }

    #[test]
    fn a_buffer_comes_back_with_the_last_clone() {
        let (pool, made) = pool(usize::MAX);
        let first = pool.keep(&[1; 1000]).unwrap();
        assert_eq!(first[..], [1; 1000]);
        let (place, clone) = (address(&first), first.clone());
        drop(first);
        let second = pool.keep(&[2; 1000]).unwrap();
        assert_ne!(address(&second), place, "a clone is still there");
        assert_eq!((clone[..].to_vec(), second[..].to_vec()), (vec![1; 1000], vec![2; 1000]));
        std::thread::spawn(|| drop(clone)).join().unwrap();
        // Another frame of about the same size, shorter or longer.
        let third = pool.keep(&[3; 1003]).unwrap();
        assert_eq!((address(&third), third[..].to_vec()), (place, vec![3; 1003]));
        assert_eq!((made.load(Ordering::Relaxed), pool.size()), (2, (2, 2 * UNIT)));
    }

    #[test]
    fn there_is_a_bound_and_room_again_below_it() {
        let (pool, _) = pool(usize::MAX);
        let mut held: Vec<Pixels> = (0..MOST).map(|_| pool.keep(&[1; 10]).unwrap()).collect();
        assert!(pool.keep(&[1; 10]).is_none(), "too many");
        held.pop();
        assert!(pool.keep(&[1; UNIT + 1]).is_none(), "the size of what waits is still in use");
        assert!(pool.keep(&[1; 10]).is_some());
        drop(held);
        assert_eq!(pool.size(), (MOST, MOST * UNIT));

        let (pool, _) = self::pool(usize::MAX);
        let large = vec![1; MOST * UNIT];
        let held = [pool.keep(&large[..4 * UNIT]).unwrap(), pool.keep(&large[..4 * UNIT]).unwrap()];
        assert!(pool.keep(&[1]).is_none(), "too much");
        drop(held);
        assert_eq!(pool.size(), (2, MOST * UNIT));
        let (pool, made) = self::pool(usize::MAX);
        assert!(pool.keep(&vec![1; MOST * UNIT + 1]).is_none(), "more than all");
        assert!(pool.keep(&large).is_some() && made.load(Ordering::Relaxed) == 1);
    }

    #[test]
    fn buffers_of_a_size_that_nobody_sends_any_more_make_room() {
        let (pool, made) = pool(usize::MAX);
        drop((0..MOST).map(|_| pool.keep(&[1; 10]).unwrap()).collect::<Vec<_>>());
        let refused = (0..).take_while(|_| pool.keep(&[1; UNIT + 1]).is_none()).count();
        assert_eq!(refused as u64, IDLE);
        for _ in 0..2 * IDLE {
            let held = [pool.keep(&[1; 2 * UNIT]), pool.keep(&[2; 2 * UNIT])];
            assert!(held.iter().all(|p| p.as_ref().is_some_and(|p| p.len() == 2 * UNIT)));
        }
        // Two of two units each have taken the place of four of one.
        assert_eq!(pool.size(), (MOST - 2, MOST * UNIT));
        assert_eq!(made.load(Ordering::Relaxed), MOST + 2);
    }

    #[test]
    fn where_no_memory_can_be_made_what_there_is_goes_on() {
        let (pool, made) = pool(1);
        let only = pool.keep(&[1; 10]).unwrap();
        assert!(pool.keep(&[2; 10]).is_none());
        assert_eq!(pool.size(), (1, UNIT));
        drop(only);
        assert_eq!(pool.keep(&[3; 10]).unwrap()[..], [3; 10]);
        made.store(0, Ordering::Relaxed);
        let held = pool.keep(&[4; 10]);
        assert!(held.is_some() && pool.keep(&[5; 10]).is_none(), "it is not tried again");
    }

    #[test]
    fn frames_may_outlive_the_pool() {
        let (pool, _) = pool(usize::MAX);
        let kept = pool.keep(&[9; 10]).unwrap();
        drop(pool);
        assert_eq!(kept[..], [9; 10]);
        assert!(kept.held_by::<Lent<Vec<u8>>>().is_some_and(|l| l.buffer().is_some_and(|b| b.len() == UNIT)));
    }
}
