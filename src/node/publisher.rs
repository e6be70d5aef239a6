//! The publisher thread: serialises and publishes what the control thread computed, and measures when that was done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::Receiver;

use crate::clock::Clock;
use crate::control::chunk::ActionChunk;
use crate::control::{Deadlines, DeadlinesSnapshot, Sent, TickTimes, Window};
use crate::telemetry::trace::{self, What};

use super::control_loop::Signals;
use super::recorder::WindowTap;

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
    pub sent: Option<Sent>,
    pub jobs: rtrb::Consumer<Job>,
    pub free: rtrb::Producer<Box<Window>>,
    pub chunks: Receiver<Arc<ActionChunk>>,
    pub clock: Arc<dyn Clock>,
    pub deadlines: Arc<Mutex<Deadlines>>,
    pub signals: Arc<Signals>,
    pub stopping: Arc<AtomicBool>,
    pub recorder: Option<WindowTap>,
}

/// Without a wake-up the thread looks this often: only chunks and the end of the node come without one.
const IDLE: Duration = Duration::from_millis(10);

impl Publisher {
    /// Publishes until the node stops and nothing is left to publish.
    pub fn run(mut self) {
        loop {
            let last_round = self.stopping.load(Ordering::Acquire);
            self.round();
            if last_round {
                return;
            }
            std::thread::park_timeout(IDLE);
        }
    }

    /// Publishes what waits: of the windows the newest, since it goes on where the older ones would have led. None of
    /// them once the robot has braked by itself for want of one: what they continue is not where it is.
    pub fn round(&mut self) {
        let waiting = self.jobs.slots();
        let lapsed = self.jobs.peek().is_ok_and(|oldest| self.lapsed(&oldest.window));
        if lapsed {
            self.signals.adrift.store(true, Ordering::Release);
        }
        for newer in (0..waiting).rev() {
            let Ok(mut job) = self.jobs.pop() else { break };
            let sent = newer == 0 && !lapsed;
            if sent {
                self.sent = Some(job.window.follow(self.sent.as_ref()));
                self.outputs.trajectory(&job.window);
            } else {
                self.signals.unsent.fetch_add(1, Ordering::AcqRel);
            }
            let published = self.clock.monotonic();
            job.times.published = Some(published);
            if let Some(recorder) = self.recorder.as_mut().filter(|_| sent) {
                recorder.sent(&job.times, &job.window);
            }
            let missed = self.deadlines.lock().unwrap_or_else(PoisonError::into_inner).record(&job.times);
            trace::span(What::Tick, 0, job.times.woke, published);
            if missed {
                trace::span(What::Missed, 0, job.times.scheduled, published);
            }
            // As many places as windows: this cannot fail.
            let _ = self.free.push(job.window);
        }
        while let Ok(chunk) = self.chunks.try_recv() {
            if let Some(recorder) = &self.recorder {
                recorder.chunk(&chunk);
            }
            self.outputs.chunk(&chunk);
        }
    }

    /// Whether the driven part of a window is over: the robot is in a braking tail, or at the end of one.
    fn lapsed(&self, window: &Window) -> bool {
        let driven = window.driven_points().checked_sub(1).map_or(0.0, |last| window.seconds_from_start(last));
        self.clock.ros().seconds_since(window.start()) > driven
    }
}

/// The figures so far.
pub(super) fn snapshot(deadlines: &Mutex<Deadlines>) -> DeadlinesSnapshot {
    deadlines.lock().unwrap_or_else(PoisonError::into_inner).snapshot()
}
