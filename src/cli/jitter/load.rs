//! What inference does to a machine, without a policy: every CPU computes and streams through memory.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// Memory of one thread, in bytes: past the caches of a core.
const PER_THREAD: usize = 32 << 20;
/// Memory of all threads together, in bytes.
const IN_ALL: usize = 1 << 30;
/// Words between two looks at the stop flag: 256 KiB.
const BLOCK: usize = 32 << 10;

/// Busy threads, one per CPU, with ordinary scheduling; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts them; returns when each has touched all of its memory.
    pub fn start() -> std::io::Result<Self> {
        let n = std::thread::available_parallelism().map_or(1, |n| n.get());
        let words = PER_THREAD.min(IN_ALL / n) / size_of::<u64>();
        let (ready, all_ready) = crossbeam_channel::bounded(n);
        let mut load = Self { stop: Arc::default(), threads: Vec::new() };
        for _ in 0..n {
            let (stop, ready) = (load.stop.clone(), ready.clone());
            load.threads.push(Builder::new().name("pi0_load".into()).spawn(move || {
                let mut memory: Vec<u64> = (0..words as u64).collect();
                let _ = ready.send(());
                while !stop.load(Ordering::Relaxed) {
                    memory.chunks_mut(BLOCK).take_while(|_| !stop.load(Ordering::Relaxed)).for_each(mix);
                }
            })?);
        }
        drop(ready);
        // Ends early only if a thread ended early.
        let _ = (0..n).try_for_each(|_| all_ready.recv());
        Ok(load)
    }
}

/// Reads, computes and writes every word.
fn mix(block: &mut [u64]) {
    for word in block.iter_mut() {
        // Knuth's MMIX generator.
        *word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
    black_box(block);
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
