//! The managed life of the node: one table of transitions, carried out one at a time on a thread of its own.
//!
//! Numbers and labels are those of `lifecycle_msgs` and of rcl_lifecycle's default state machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::core::Core;
use super::{NodeError, loader, lock};
use crate::control::Lifecycle;
use crate::error::{Blame, Fault};
use crate::pipeline::Pipeline;

/// A lifecycle state: four in which a node stays, six on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// No policy is loaded.
    Unconfigured = 1,
    /// The policy is loaded and warm; inference stands still.
    Inactive = 2,
    /// Inference runs; the robot moves only after `~/enable`.
    Active = 3,
    /// Over; only the end of the process comes after it.
    Finalized = 4,
    /// Loading and warming up.
    Configuring = 10,
    /// Freeing the policy.
    CleaningUp = 11,
    /// Stopping for good.
    ShuttingDown = 12,
    /// Starting inference.
    Activating = 13,
    /// Bringing the robot to rest, stopping inference.
    Deactivating = 14,
    /// A transition failed in a way that leaves nothing to go back to.
    ErrorProcessing = 15,
}

impl State {
    /// All of them.
    pub const ALL: [State; 10] = [
        State::Unconfigured,
        State::Inactive,
        State::Active,
        State::Finalized,
        State::Configuring,
        State::CleaningUp,
        State::ShuttingDown,
        State::Activating,
        State::Deactivating,
        State::ErrorProcessing,
    ];

    /// Its label.
    pub fn label(self) -> &'static str {
        match self {
            State::Unconfigured => "unconfigured",
            State::Inactive => "inactive",
            State::Active => "active",
            State::Finalized => "finalized",
            State::Configuring => "configuring",
            State::CleaningUp => "cleaningup",
            State::ShuttingDown => "shuttingdown",
            State::Activating => "activating",
            State::Deactivating => "deactivating",
            State::ErrorProcessing => "errorprocessing",
        }
    }

    pub(super) fn from_number(n: u8) -> Self {
        Self::ALL.into_iter().find(|s| *s as u8 == n).unwrap_or(State::Unconfigured)
    }
}

/// One edge of the state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// Its number.
    pub id: u8,
    /// Its label.
    pub label: &'static str,
    /// Where it begins.
    pub from: State,
    /// Where it leads.
    pub to: State,
}

/// What can be asked of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Configure,
    CleanUp,
    Activate,
    Deactivate,
    ShutDown,
}

/// One row of the state machine: a transition somebody asks for, and where its outcome leads. The numbers of the
/// outcomes are `outcomes`, + 1 and + 2 for success, failure and error.
struct Row {
    action: Action,
    id: u8,
    label: &'static str,
    from: State,
    through: State,
    success: State,
    failure: State,
    outcomes: u8,
}

#[rustfmt::skip]
const ROWS: [Row; 7] = [
    Row { action: Action::Configure, id: 1, label: "configure", from: State::Unconfigured, through: State::Configuring,
        success: State::Inactive, failure: State::Unconfigured, outcomes: 10 },
    Row { action: Action::CleanUp, id: 2, label: "cleanup", from: State::Inactive, through: State::CleaningUp,
        success: State::Unconfigured, failure: State::Inactive, outcomes: 20 },
    Row { action: Action::Activate, id: 3, label: "activate", from: State::Inactive, through: State::Activating,
        success: State::Active, failure: State::Inactive, outcomes: 30 },
    Row { action: Action::Deactivate, id: 4, label: "deactivate", from: State::Active, through: State::Deactivating,
        success: State::Inactive, failure: State::Active, outcomes: 40 },
    Row { action: Action::ShutDown, id: 5, label: "shutdown", from: State::Unconfigured, through: State::ShuttingDown,
        success: State::Finalized, failure: State::Finalized, outcomes: 50 },
    Row { action: Action::ShutDown, id: 6, label: "shutdown", from: State::Inactive, through: State::ShuttingDown,
        success: State::Finalized, failure: State::Finalized, outcomes: 50 },
    Row { action: Action::ShutDown, id: 7, label: "shutdown", from: State::Active, through: State::ShuttingDown,
        success: State::Finalized, failure: State::Finalized, outcomes: 50 },
];

/// Labels of the three outcomes, in the order of their numbers.
const OUTCOMES: [&str; 3] = ["transition_success", "transition_failure", "transition_error"];

impl Row {
    fn asked(&self) -> Edge {
        Edge { id: self.id, label: self.label, from: self.from, to: self.through }
    }

    fn outcome(&self, which: usize) -> Edge {
        let to = [self.success, self.failure, State::ErrorProcessing][which];
        Edge { id: self.outcomes + which as u8, label: OUTCOMES[which], from: self.through, to }
    }
}

fn row(action: Action) -> &'static Row {
    // Every action has a row.
    ROWS.iter().find(|r| r.action == action).unwrap_or(&ROWS[0])
}

/// The transitions that can be asked for in `state`.
pub fn available(state: State) -> Vec<Edge> {
    ROWS.iter().filter(|r| r.from == state).map(Row::asked).collect()
}

/// The whole state machine.
pub fn graph() -> Vec<Edge> {
    let mut edges: Vec<Edge> = ROWS.iter().map(Row::asked).collect();
    for row in &ROWS {
        let outcomes = (0..OUTCOMES.len()).map(|i| row.outcome(i));
        edges.extend(outcomes.filter(|e| !edges.contains(e)).collect::<Vec<_>>());
    }
    let after_error = [State::Unconfigured, State::Finalized, State::Finalized];
    edges.extend((0..OUTCOMES.len()).map(|i| Edge {
        id: 60 + i as u8,
        label: OUTCOMES[i],
        from: State::ErrorProcessing,
        to: after_error[i],
    }));
    edges
}

/// A wish, and who wants to know what came of it.
pub(super) struct Request {
    by: By,
    answer: Box<dyn FnOnce(bool) + Send>,
}

/// How a transition is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// By its number.
    Id(u8),
    /// By its label.
    Label(String),
}

/// Transitions, from any thread.
#[derive(Clone)]
pub struct Transitions {
    pub(super) core: Arc<Core>,
    pub(super) requests: Sender<Request>,
}

impl Transitions {
    /// Asks for a transition; `answer` is told whether it was made, on another thread and maybe much later.
    pub fn change(&self, by: By, answer: impl FnOnce(bool) + Send + 'static) {
        if let Err(e) = self.requests.send(Request { by, answer: Box::new(answer) }) {
            (e.0.answer)(false);
        }
    }

    /// The state now.
    pub fn state(&self) -> State {
        self.core.state()
    }
}

/// How often inputs and stages are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The body of the lifecycle thread: carries out what is asked, makes the node ready once it is active and every input
/// has been heard, and watches the stages for a fault.
pub(super) fn run(core: &Core, requests: &Receiver<Request>, events: &Sender<Edge>) {
    let life = Life { core, events };
    if core.autostart() {
        let begun = life.change(row(Action::Configure)).and_then(|()| life.change(row(Action::Activate)));
        if let Err((fault, problem)) = begun {
            // Nobody is there to ask again: the process ends with the reason.
            *lock(&core.failure) = Some((fault, problem));
            core.signals.set_lifecycle(Lifecycle::Failed);
        }
    }
    while !core.signals.stopping.load(Ordering::Acquire) {
        match requests.recv_timeout(LOOK) {
            Ok(Request { by, answer }) => answer(life.asked(&by)),
            Err(RecvTimeoutError::Timeout) => life.watch(),
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK),
        }
    }
}

struct Life<'a> {
    core: &'a Core,
    events: &'a Sender<Edge>,
}

impl Life<'_> {
    fn asked(&self, by: &By) -> bool {
        let state = self.core.state();
        let names = |r: &&Row| match by {
            By::Id(id) => r.id == *id,
            By::Label(label) => r.label == label,
        };
        let Some(row) = ROWS.iter().filter(|r| r.from == state).find(names) else {
            let can: Vec<_> = available(state).iter().map(|e| e.label).collect();
            let can = if can.is_empty() { "nothing".into() } else { can.join(", ") };
            tracing::warn!("lifecycle: {by:?} is not possible in state '{}'; possible: {can}", state.label());
            return false;
        };
        self.change(row).is_ok()
    }

    fn change(&self, row: &Row) -> Result<(), (Fault, String)> {
        self.enter(row.asked());
        let act = || match row.action {
            Action::Configure => loader::configure(self.core),
            Action::CleanUp => self.clean_up(),
            Action::Activate => self.activate(),
            Action::Deactivate => self.deactivate(),
            Action::ShutDown => self.deactivate().and_then(|()| self.clean_up()),
        };
        let outcome = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)) {
            Ok(outcome) => outcome.map_err(|e| (e.fault(), e.to_string())),
            Err(_) => Err((Fault::Internal, format!("{} panicked: see the log", row.label))),
        };
        if let Err((fault, problem)) = &outcome {
            tracing::error!("{} failed: {problem}", row.label);
            if row.action == Action::Configure {
                self.free();
                *lock(&self.core.not_configured) = Some((*fault, problem.clone()));
            }
        }
        self.enter(row.outcome(usize::from(outcome.is_err())));
        outcome
    }

    fn enter(&self, edge: Edge) {
        self.core.set_state(edge.to);
        tracing::info!("lifecycle: {} → {}", edge.from.label(), edge.to.label());
        // Nobody looks: nobody needs to know.
        let _ = self.events.try_send(edge);
    }

    fn activate(&self) -> Result<(), NodeError> {
        let decoded = self.core.pipeline_report().decode.runs;
        self.core.decoded_before.store(decoded, Ordering::Release);
        if let Some(pipeline) = &*lock(&self.core.pipeline) {
            pipeline.resume();
        }
        Ok(())
    }

    /// To a decelerated stop, if the robot moves; then inference stands still.
    fn deactivate(&self) -> Result<(), NodeError> {
        if self.core.signals.lifecycle() == Lifecycle::Ready {
            self.core.signals.set_lifecycle(Lifecycle::Warmup);
        }
        if !self.core.come_to_rest() {
            tracing::error!("the robot was told to stop and is not reported at rest; inference ends all the same");
        }
        if let Some(pipeline) = &*lock(&self.core.pipeline) {
            pipeline.pause();
        }
        Ok(())
    }

    fn clean_up(&self) -> Result<(), NodeError> {
        self.free();
        Ok(())
    }

    /// Ends the stages; what they had on the device is freed.
    fn free(&self) {
        self.core.signals.set_lifecycle(Lifecycle::Unconfigured);
        let pipeline = lock(&self.core.pipeline).take();
        drop(pipeline);
        lock(&self.core.device).clear();
    }

    fn watch(&self) {
        let core = self.core;
        if core.state() != State::Active || core.failure_is_known() {
            return;
        }
        if let Some((fault, problem)) = lock(&core.pipeline).as_ref().and_then(Pipeline::fault) {
            tracing::error!("{problem}");
            return core.fail_inference(fault, problem);
        }
        if core.signals.lifecycle() == Lifecycle::Warmup && core.with_facts(None, super::status::missing).is_none() {
            core.make_ready();
        }
    }
}

impl Core {
    pub fn state(&self) -> State {
        State::from_number(self.state.load(Ordering::Acquire))
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
    }

    fn autostart(&self) -> bool {
        lock(&self.settings).process.autostart
    }

    fn failure_is_known(&self) -> bool {
        lock(&self.failure).is_some()
    }

    /// Ready, unless the node is about to end.
    fn make_ready(&self) {
        self.signals.set_lifecycle(Lifecycle::Ready);
        if self.leaving.load(Ordering::Acquire) {
            self.signals.set_lifecycle(Lifecycle::Warmup);
        }
    }

    /// Waits until no command goes out any more, once something has told the control loop to stop. False if it takes
    /// longer than it may.
    pub(super) fn come_to_rest(&self) -> bool {
        let (stop_time, doubt) = {
            let settings = lock(&self.settings);
            // A pose in doubt is waited for until it is too old.
            (settings.safety.stop_time, settings.inputs.max_joint_state_age)
        };
        let deadline = Instant::now() + 2 * stop_time + doubt + Duration::from_millis(500);
        let turn = self.snapshot().turns;
        loop {
            let s = self.snapshot();
            // Two turns later the request has been seen, whatever tick it fell into.
            if s.turns >= turn + 2 && !s.status.mode.publishes() {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_the_default_one_of_managed_nodes() {
        let graph = graph();
        for (id, label, from, to) in [
            (1, "configure", State::Unconfigured, State::Configuring),
            (10, "transition_success", State::Configuring, State::Inactive),
            (11, "transition_failure", State::Configuring, State::Unconfigured),
            (12, "transition_error", State::Configuring, State::ErrorProcessing),
            (40, "transition_success", State::Deactivating, State::Inactive),
            (7, "shutdown", State::Active, State::ShuttingDown),
            (50, "transition_success", State::ShuttingDown, State::Finalized),
            (62, "transition_error", State::ErrorProcessing, State::Finalized),
        ] {
            assert!(graph.contains(&Edge { id, label, from, to }), "{id} {label}");
        }
        assert_eq!(graph.len(), 7 + 5 * 3 + 3);
        let labels = |s| available(s).iter().map(|e| e.label).collect::<Vec<_>>();
        assert_eq!(labels(State::Unconfigured), ["configure", "shutdown"]);
        assert_eq!(labels(State::Inactive), ["cleanup", "activate", "shutdown"]);
        assert_eq!(labels(State::Active), ["deactivate", "shutdown"]);
        assert!(labels(State::Finalized).is_empty() && labels(State::Configuring).is_empty());
        assert!(State::ALL.into_iter().all(|s| State::from_number(s as u8) == s));
    }
}
