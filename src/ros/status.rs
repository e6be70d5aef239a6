//! `~/status` on change and once a second, `/diagnostics` once a second, `~/transition_event` as they come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use r2r::diagnostic_msgs::msg::{DiagnosticArray, DiagnosticStatus};
use r2r::std_msgs::msg::Header;
use r2r::{Publisher, QosProfile};

use super::convert::{diagnostic, stamp};
use super::failure::{Refusal, middleware};
use super::lifecycle::TransitionPublisher;
use crate::clock::Clock;
use crate::node::{Node, Status};

const PERIOD: Duration = Duration::from_secs(1);
/// How soon a change is seen.
const LOOK: Duration = Duration::from_millis(50);

/// The three publishers.
pub struct StatusPublisher {
    name: String,
    status: Publisher<DiagnosticStatus>,
    diagnostics: Publisher<DiagnosticArray>,
    transitions: TransitionPublisher,
    clock: Arc<dyn Clock>,
}

impl StatusPublisher {
    /// Advertises them. Names in diagnostics start with the node's full name without its leading slash, as
    /// diagnostic_updater writes it.
    pub fn advertise(node: &mut r2r::Node, full_name: &str, clock: Arc<dyn Clock>) -> Result<Self, Refusal> {
        let reliable = QosProfile::default().keep_last(1).reliable();
        let status =
            node.create_publisher("~/status", reliable.clone()).map_err(middleware("advertising '~/status'"))?;
        let diagnostics = node
            .create_publisher("/diagnostics", reliable.keep_last(10))
            .map_err(middleware("advertising '/diagnostics'"))?;
        let transitions = TransitionPublisher::advertise(node)?;
        Ok(Self { name: full_name.trim_start_matches('/').into(), status, diagnostics, transitions, clock })
    }

    /// Publishes and writes the core's events to the log until the sender of `quit` is gone; calls `failed` once the
    /// node has to end.
    pub fn run(self, core: &Node, quit: &Receiver<()>, failed: impl FnOnce()) {
        let mut failed = Some(failed);
        let mut last: Option<Status> = None;
        let mut due = Instant::now();
        while let Err(RecvTimeoutError::Timeout) = quit.recv_timeout(LOOK) {
            core.log_events();
            while let Some(edge) = core.transition_made() {
                self.transitions.publish(&edge, self.clock.ros());
            }
            if core.failure().is_some()
                && let Some(failed) = failed.take()
            {
                failed();
            }
            let status = core.status();
            let periodic = Instant::now() >= due;
            let changed = last
                .as_ref()
                .is_none_or(|l| (l.level, l.mode, &l.message) != (status.level, status.mode, &status.message));
            if changed || periodic {
                self.publish_status(&status);
            }
            if periodic {
                self.publish_diagnostics(&status);
                due = (due + PERIOD).max(Instant::now());
            }
            last = Some(status);
        }
        self.publish_status(&core.status());
    }

    fn publish_status(&self, s: &Status) {
        let mode = ("mode".to_owned(), s.mode.to_string());
        let values = std::iter::once(mode).chain(s.values.iter().filter(|(k, _)| k != "mode").cloned());
        let message = diagnostic(s.level, &self.name, &s.message, values, &self.name);
        self.failed("~/status", self.status.publish(&message));
    }

    fn publish_diagnostics(&self, s: &Status) {
        let status = s.diagnostics.iter().map(|d| {
            let name = format!("{}: {}", self.name, d.name);
            diagnostic(d.level, &name, &d.message, d.values.iter().cloned(), &self.name)
        });
        let header = Header { stamp: stamp(self.clock.ros()), frame_id: String::new() };
        self.failed("/diagnostics", self.diagnostics.publish(&DiagnosticArray { header, status: status.collect() }));
    }

    fn failed(&self, topic: &str, result: r2r::Result<()>) {
        if let Err(e) = result {
            tracing::warn!("publishing {topic} failed: {e}");
        }
    }
}
