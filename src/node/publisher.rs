//! The publisher thread: serialises and publishes what the control thread computed, and measures when that was done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::Receiver;

use crate::clock::Clock;
use crate::control::chunk::ActionChunk;
use crate::control::{Deadlines, DeadlinesSnapshot, TickTimes, Window};

/// Where commands go. Called on the publisher thread only.
pub trait Outputs: Send {
    /// Publishes the window of one tick.
    fn trajectory(&mut self, window: &Window);
    /// Publishes a chunk as the policy produced it.
    fn chunk(&mut self, chunk: &ActionChunk);
}

/// One published tick on its way out.
pub(super) struct Job {
    pub window: Box<Window>,
    pub times: TickTimes,
}

/// What the publisher thread owns.
pub(super) struct Publisher {
    pub outputs: Box<dyn Outputs>,
    pub jobs: rtrb::Consumer<Job>,
    pub free: rtrb::Producer<Box<Window>>,
    pub chunks: Receiver<Arc<ActionChunk>>,
    pub clock: Arc<dyn Clock>,
    pub deadlines: Arc<Mutex<Deadlines>>,
    pub stopping: Arc<AtomicBool>,
}

/// Without a wake-up the thread looks this often: only chunks and the end of the node come without one.
const IDLE: Duration = Duration::from_millis(10);

impl Publisher {
    /// Publishes until the node stops and nothing is left to publish.
    pub fn run(mut self) {
        loop {
            let last_round = self.stopping.load(Ordering::Acquire);
            while let Ok(mut job) = self.jobs.pop() {
                self.outputs.trajectory(&job.window);
                job.times.published = Some(self.clock.monotonic());
                self.deadlines.lock().unwrap_or_else(PoisonError::into_inner).record(&job.times);
                // As many places as windows: this cannot fail.
                let _ = self.free.push(job.window);
            }
            while let Ok(chunk) = self.chunks.try_recv() {
                self.outputs.chunk(&chunk);
            }
            if last_round {
                return;
            }
            std::thread::park_timeout(IDLE);
        }
    }
}

/// The figures so far.
pub(super) fn snapshot(deadlines: &Mutex<Deadlines>) -> DeadlinesSnapshot {
    deadlines.lock().unwrap_or_else(PoisonError::into_inner).snapshot()
}
