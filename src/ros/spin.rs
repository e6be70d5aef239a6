//! Taking what the middleware has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};

use super::failure::Refusal;
use crate::error::Fault;

/// Hands on everything that has come in on one stream.
pub type Drain = Box<dyn FnMut() + Send>;

/// A drain that gives each item to `take`, which must not wait for anybody.
pub fn drain<T: 'static>(
    mut stream: impl Stream<Item = T> + Unpin + Send + 'static,
    mut take: impl FnMut(T) + Send + 'static,
) -> Drain {
    Box::new(move || {
        while let Some(Some(item)) = stream.next().now_or_never() {
            take(item);
        }
    })
}

/// Wakes at least this often to see whether to end; messages wake it at once.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// A thread that owns an r2r node and spins it. r2r takes one message of each subscription a turn and drops the newest
/// where a stream is full, so every turn empties the streams.
pub struct Spinner {
    running: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Spinner {
    /// Starts spinning; `watch` is called after every turn.
    pub fn start(
        name: &str,
        mut node: r2r::Node,
        mut drains: Vec<Drain>,
        mut watch: impl FnMut(&r2r::Node) + Send + 'static,
    ) -> Result<Self, Refusal> {
        let running = Arc::new(AtomicBool::new(true));
        let go_on = running.clone();
        let thread = spawn(name, move || {
            while go_on.load(Ordering::Relaxed) {
                node.spin_once(LONGEST_WAIT);
                drains.iter_mut().for_each(|d| d());
                watch(&node);
            }
        })?;
        Ok(Self { running, thread })
    }

    /// Ends the thread; its node, publishers and services go with it.
    pub fn end(self) {
        self.running.store(false, Ordering::Relaxed);
        // A panic in it would have ended the process.
        let _ = self.thread.join();
    }
}

/// A named thread.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Refusal> {
    Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|e| Refusal::new(Fault::Machine, format!("cannot start thread '{name}': {e}")))
}
