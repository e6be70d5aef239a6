//! The whole node without a middleware: input slots, pipeline, control thread, publisher thread.
//!
//! ```text
//! Inputs ─► slots ─► Pipeline (encoder, decoder) ─► chunk ring ─► control thread ─► window ring ─► publisher ─► Outputs
//!                                ▲ plan, epoch                        │
//!                                └────────────────────────────────────┘        Commands ─► request bits ─► control
//! ```

mod control_loop;
mod convert;
mod core;
pub mod lifecycle;
mod loader;
pub mod messages;
mod publisher;
mod recorder;
mod replay;
mod status;
mod stepped;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::clock::Clock;
use crate::control::{ConfigError, Controller, Deadlines, Lifecycle};
use crate::engine::EngineError;
use crate::error::{Blame, Fault};
use crate::model::ModelError;
use crate::params::Settings;
use crate::pipeline::inputs::InputSlots;
use crate::pipeline::{PipelineError, Ports};
use crate::rt::latest::latest;
use crate::rt::period::Periodic;
use crate::rt::rights::{self, Right};

use control_loop::{ControlLoop, Signals, Snapshot};
pub use core::{Commands, Inputs, Source};
use core::{Core, InputsWired, input_rules, log_event};
use lifecycle::{Edge, Request, State, Transitions};
pub use publisher::Outputs;
use publisher::{Job, Publisher};
pub use recorder::Identity;
use recorder::Recorder;
pub use replay::{ReplayNode, ReplayOptions};
pub use status::{Diagnostic, Status};
pub use stepped::SteppedNode;

/// Windows in flight between control and publisher thread.
const WINDOWS: usize = 4;
/// Chunks in flight between decoder and control thread, and on their way back.
const CHUNKS: usize = 16;
/// Chunks waiting to be looked at on `~/action_chunk`.
const TAP: usize = 4;
/// Events waiting for the log.
const EVENTS: usize = 256;
/// Lifecycle transitions waiting to be told.
const TRANSITIONS: usize = 64;
/// Actions a chunk is taken to have before a policy is loaded.
const USUAL_HORIZON: usize = 50;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why the node cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A setting that the control core refuses.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The stages.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// Not possible now.
    #[error("{0}")]
    Refused(String),
    /// A thread could not be started.
    #[error("cannot start thread '{name}': {source}; raise the limit of threads (ulimit -u)")]
    Thread {
        /// Its name.
        name: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl Blame for NodeError {
    fn fault(&self) -> Fault {
        match self {
            NodeError::Config(e) => e.fault(),
            NodeError::Model(e) => e.fault(),
            NodeError::Engine(e) => e.fault(),
            NodeError::Pipeline(e) => e.fault(),
            NodeError::Refused(_) => Fault::Input,
            NodeError::Thread { .. } => Fault::Machine,
        }
    }
}

/// The parts of a node before anything moves them.
struct Parts {
    core: Arc<Core>,
    control: ControlLoop,
    publisher: Publisher,
    recorder: Option<recorder::Waiting>,
}

impl Parts {
    /// Makes all of them and joins them with slots and rings.
    fn new(
        settings: Settings,
        horizon: usize,
        clock: Arc<dyn Clock>,
        outputs: Box<dyn Outputs>,
        identity: Option<Identity>,
    ) -> Result<Self, NodeError> {
        let controller = Controller::new(convert::control(&settings, horizon))?;
        let names = convert::names(&settings);
        let (inputs, joints) = InputSlots::new(settings.inputs.cameras.len(), &names.joints, &settings.model.prompt);
        let inputs = Arc::new(inputs);
        let signals = Arc::new(Signals::default());
        signals.has_prompt.store(!settings.model.prompt.trim().is_empty(), Ordering::Release);

        let (chunks_in, chunks_out) = rtrb::RingBuffer::new(CHUNKS);
        // Whatever is in flight at once finds its way back: the ring in and the ring out are equally long.
        let (retired_in, retired_out) = rtrb::RingBuffer::new(2 * CHUNKS);
        let (mut free_in, free_out) = rtrb::RingBuffer::new(WINDOWS);
        let (jobs_in, jobs_out) = rtrb::RingBuffer::<Job>::new(WINDOWS);
        let (events_in, events_out) = rtrb::RingBuffer::new(EVENTS);
        let (changes_in, changes_out) = rtrb::RingBuffer::new(8);
        let (discarded_in, discarded_out) = rtrb::RingBuffer::new(16);
        let (tap_in, tap_out) = crossbeam_channel::bounded(TAP);
        for _ in 0..WINDOWS {
            // As many places as windows: this cannot fail.
            let _ = free_in.push(Box::new(controller.window()));
        }
        let status = controller.status();
        let (snapshot, snapshot_reader) = latest(Snapshot { status, turns: 0, seconds: 0.0, answer: None, blocked: 0 });
        let (plan, plan_reader) = latest(None);
        let config = controller.config();
        let deadlines = Arc::new(Mutex::new(Deadlines::new(config.deadline, config.period)));
        let rules = Box::new(input_rules(&settings, horizon));
        let recorder = identity.and_then(|identity| recorder::ends(&settings, &controller.window(), identity));
        let (recorder, ticks, windows, waiting) = match recorder {
            Some(r) => (Some(r.handle), Some(r.ticks), Some(r.windows), Some(r.recorder)),
            None => (None, None, None, None),
        };

        let core = Arc::new(Core {
            clock: clock.clone(),
            inputs: inputs.clone(),
            signals: signals.clone(),
            names: Mutex::new(Arc::new(names)),
            horizon: AtomicUsize::new(horizon),
            state: AtomicU8::new(State::Unconfigured as u8),
            leaving: AtomicBool::new(false),
            decoded_before: AtomicU64::new(0),
            not_configured: Mutex::new(None),
            ports: Arc::new(Mutex::new(Ports {
                chunks: chunks_in,
                retired: retired_out,
                plan: plan_reader,
                sequence: 0,
            })),
            wired: Mutex::new(InputsWired { cameras: vec![None; settings.inputs.cameras.len()], joint_states: None }),
            tap: tap_in,
            settings: Mutex::new(settings),
            snapshot: Mutex::new(snapshot_reader),
            deadlines: deadlines.clone(),
            pipeline: Mutex::new(None),
            changes: Mutex::new((changes_in, discarded_out)),
            events: Mutex::new(events_out),
            rights: Mutex::new(Vec::new()),
            device: Mutex::new(String::new()),
            failure: Mutex::new(None),
            recorder,
            asking: Mutex::new(()),
        });
        let publisher = Publisher {
            sent: None,
            outputs,
            jobs: jobs_out,
            free: free_in,
            chunks: tap_out,
            clock: clock.clone(),
            deadlines,
            signals: signals.clone(),
            stopping: Arc::default(),
            recorder: windows,
        };
        let control = ControlLoop {
            controller: Box::new(controller),
            clock,
            joints,
            inputs,
            rules,
            signals,
            chunks: chunks_out,
            retired: retired_in,
            free: free_out,
            jobs: jobs_in,
            publisher: None,
            snapshot,
            plan,
            events: events_in,
            changes: changes_out,
            discarded: discarded_in,
            recorder: ticks,
        };
        Ok(Self { core, control, publisher, recorder: waiting })
    }
}

/// The running node.
pub struct Node {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
    lifecycle: Option<JoinHandle<()>>,
    recorder: Option<Recorder>,
    requests: crossbeam_channel::Sender<Request>,
    transitions: crossbeam_channel::Receiver<Edge>,
    publisher_stop: Arc<AtomicBool>,
}

impl Node {
    /// Checks the settings and starts the control loop, unarmed. With `autostart` the policy is then loaded and run on
    /// the lifecycle thread; if that fails, [`failure`](Self::failure) says why.
    pub fn start(settings: Settings, clock: Arc<dyn Clock>, outputs: Box<dyn Outputs>) -> Result<Self, NodeError> {
        Self::start_as(Identity::default(), settings, clock, outputs)
    }

    /// The same for a node whose recordings say who it is.
    pub fn start_as(
        identity: Identity,
        settings: Settings,
        clock: Arc<dyn Clock>,
        outputs: Box<dyn Outputs>,
    ) -> Result<Self, NodeError> {
        let horizon = USUAL_HORIZON.max(settings.chunks.replan_steps + 1);
        let (period, process) = (settings.timing.period(), settings.process.clone());
        let Parts { core, mut control, publisher, recorder } =
            Parts::new(settings, horizon, clock, outputs, Some(identity))?;
        let publisher_stop = publisher.stopping.clone();
        let (requests, asked) = crossbeam_channel::unbounded();
        let (told, transitions) = crossbeam_channel::bounded(TRANSITIONS);
        let recorder = recorder.map(|waiting| Recorder::start(core.clone(), waiting)).transpose()?;
        let (threads, lifecycle) = (Vec::new(), None);
        let mut node = Self { core: core.clone(), threads, lifecycle, recorder, requests, transitions, publisher_stop };
        if process.lock_memory {
            node.report_right("lock_memory", &rights::lock_memory());
        }

        let control_cpu = process.cpu_affinity.first().copied();
        let below = process.rt_priority.map(|p| p.saturating_sub(1).max(1));
        control.publisher = Some(node.spawn("pi0_publisher", below, control_cpu, move || publisher.run())?);
        node.spawn("pi0_control", process.rt_priority, control_cpu, move || control.run(Periodic::new(period)))?;

        let lifecycle = std::thread::Builder::new()
            .name("pi0_lifecycle".into())
            .spawn(move || lifecycle::run(&core, &asked, &told))
            .map_err(|source| NodeError::Thread { name: "pi0_lifecycle", source })?;
        node.lifecycle = Some(lifecycle);
        Ok(node)
    }

    fn report_right(&self, what: &str, granted: &Right) {
        tracing::info!("{what}: {granted}");
        lock(&self.core.rights).push((what.into(), granted.to_string()));
    }

    /// Starts a thread that asks for its rights first and says what it got.
    fn spawn(
        &mut self,
        name: &'static str,
        priority: Option<u8>,
        cpu: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<std::thread::Thread, NodeError> {
        let core = self.core.clone();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                let mut got = Vec::new();
                if let Some(priority) = priority {
                    got.push((format!("{name}.priority"), rights::fifo(priority.into())));
                }
                if let Some(cpu) = cpu {
                    got.push((format!("{name}.cpu"), rights::affinity(cpu)));
                }
                rights::prefault_stack();
                for (what, right) in got {
                    tracing::info!("{what}: {right}");
                    lock(&core.rights).push((what, right.to_string()));
                }
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err() {
                    let message = format!("the {name} thread panicked: see the log; restart the node");
                    *lock(&core.failure) = Some((Fault::Internal, message));
                }
            })
            .map_err(|source| NodeError::Thread { name, source })?;
        let handle = thread.thread().clone();
        self.threads.push(thread);
        Ok(handle)
    }

    /// Where subscriptions put what they hear.
    pub fn inputs(&self) -> Inputs {
        Inputs(self.core.clone())
    }

    /// What services can ask for.
    pub fn commands(&self) -> Commands {
        Commands(self.core.clone())
    }

    /// Asks for lifecycle transitions.
    pub fn transitions(&self) -> Transitions {
        Transitions { core: self.core.clone(), requests: self.requests.clone() }
    }

    /// The next transition that was made and not told yet.
    pub fn transition_made(&self) -> Option<Edge> {
        self.transitions.try_recv().ok()
    }

    /// The whole node at this moment.
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// Whether commands are going out, the decelerating stop included.
    pub fn armed(&self) -> bool {
        self.core.snapshot().status.mode.publishes()
    }

    /// Why the node has to end, if it has to.
    pub fn failure(&self) -> Option<(Fault, String)> {
        lock(&self.core.failure).clone()
    }

    /// Writes to the log what happened on the control thread since the last call.
    pub fn log_events(&self) {
        while let Ok(event) = lock(&self.core.events).pop() {
            log_event(&event.report, event.chunk, &self.core.names());
        }
    }

    /// Takes over settings that were validated before; those that need an unarmed node are refused while armed.
    pub fn apply(&self, settings: &Settings) -> Result<(), NodeError> {
        self.core.apply(settings)
    }

    /// Brings the robot to a decelerated stop, publishes that to its end, then ends every thread.
    pub fn shutdown(mut self) -> Result<(), NodeError> {
        self.core.leaving.store(true, Ordering::Release);
        if self.core.signals.lifecycle() == Lifecycle::Ready {
            self.core.signals.set_lifecycle(Lifecycle::Warmup);
        }
        self.core.come_to_rest();
        self.log_events();
        self.join();
        match self.failure() {
            Some((_, message)) => Err(NodeError::Refused(message)),
            None => Ok(()),
        }
    }

    fn join(&mut self) {
        self.core.signals.stopping.store(true, Ordering::Release);
        if let Some(lifecycle) = self.lifecycle.take() {
            // Its panics are caught inside.
            let _ = lifecycle.join();
        }
        drop(lock(&self.core.pipeline).take());
        // Control first, so that nothing new comes to the publisher after its last round.
        for thread in self.threads.drain(..).rev() {
            if thread.thread().name() == Some("pi0_publisher") {
                self.publisher_stop.store(true, Ordering::Release);
                thread.thread().unpark();
            }
            let _ = thread.join();
        }
        // Last: it has what the others left.
        if let Some(mut recorder) = self.recorder.take() {
            recorder.end();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.join();
    }
}
