//! How the process ends when it must not go on.

use std::sync::mpsc;
use std::time::Duration;

use crate::error::{Blame, Fault};
use crate::node::Commands;

/// Why the node does not run: what is wrong, and who has to act.
#[derive(Debug)]
pub struct Refusal {
    /// Decides the exit code.
    pub fault: Fault,
    /// Every problem, one a line.
    pub problems: Vec<String>,
}

impl Refusal {
    /// One problem that the user or the machine's owner can solve.
    pub fn new(fault: Fault, problem: impl Into<String>) -> Self {
        Self { fault, problems: vec![problem.into()] }
    }
}

impl<E: Blame> From<E> for Refusal {
    fn from(e: E) -> Self {
        Self::new(e.fault(), e.to_string())
    }
}

/// A failure of the middleware, with what was being done.
pub fn middleware(doing: impl std::fmt::Display) -> impl FnOnce(r2r::Error) -> Refusal {
    move |e| Refusal::new(Fault::Machine, format!("{doing}: {e}"))
}

/// How long a dying process waits for the robot to be told to stop.
const LAST_STOP: Duration = Duration::from_secs(1);

/// A panic in any thread is an error in this program: it is logged, the robot is stopped as far as that still works,
/// and the process ends, so that no half of it goes on.
pub fn stop_on_panic(commands: Commands) {
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        tracing::error!("thread '{}' failed: {info}; stopping", thread.name().unwrap_or("unnamed"));
        // In a thread of its own: the one that failed may be the one that would have to do it.
        let (done, wait) = mpsc::channel();
        let commands = commands.clone();
        std::thread::spawn(move || {
            let _ = done.send(commands.stop());
        });
        let stopped = matches!(wait.recv_timeout(LAST_STOP), Ok(Ok(_)));
        tracing::error!("the robot was {}told to stop", if stopped { "" } else { "NOT " });
        signal_hook::low_level::exit(i32::from(Fault::Internal.exit_code()));
    }));
}
