//! The whole node without a middleware: input slots, pipeline, control thread, publisher thread.
//!
//! ```text
//! Inputs ─► slots ─► Pipeline (encoder, decoder) ─► chunk ring ─► control thread ─► window ring ─► publisher ─► Outputs
//!                                ▲ plan, epoch                        │
//!                                └────────────────────────────────────┘        Commands ─► request bits ─► control
//! ```

mod control_loop;
mod convert;
mod loader;
mod publisher;
mod status;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::clock::{Clock, RosTime};
use crate::control::{ConfigError, ControlStatus, Controller, Deadlines, Lifecycle, Mode, Names, TickReport};
use crate::engine::EngineError;
use crate::error::{Blame, Fault};
use crate::model::{Checkpoint, Dims, Frame, ModelError, Policy};
use crate::params::Settings;
use crate::pipeline::inputs::InputSlots;
use crate::pipeline::{Pipeline, PipelineError, PipelineReport};
use crate::rt::latest::{Reader, latest};
use crate::rt::period::Periodic;
use crate::rt::rights::{self, Right};

use control_loop::{Change, ControlLoop, Event, InputRules, RequestBits, Signals, Snapshot};
pub use publisher::Outputs;
use publisher::{Job, Publisher};
pub use status::{Diagnostic, Status};

/// Windows in flight between control and publisher thread.
const WINDOWS: usize = 4;
/// Chunks in flight between decoder and control thread, and on their way back.
const CHUNKS: usize = 16;
/// Chunks waiting to be looked at on `~/action_chunk`.
const TAP: usize = 4;
/// Events waiting for the log.
const EVENTS: usize = 256;
/// So many identical frames in a row count as a frozen camera; a still scene has sensor noise, a frozen driver has not.
const FROZEN_FRAMES: u64 = 30;

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

/// What every part of the node can reach. Nothing in here is touched by the control thread but `signals` and `inputs`.
struct Core {
    clock: Arc<dyn Clock>,
    inputs: Arc<InputSlots>,
    signals: Arc<Signals>,
    names: Names,
    dims: Dims,
    settings: Mutex<Settings>,
    snapshot: Mutex<Reader<Snapshot>>,
    deadlines: Arc<Mutex<Deadlines>>,
    pipeline: Mutex<Option<Pipeline>>,
    changes: Mutex<(rtrb::Producer<Change>, rtrb::Consumer<Change>)>,
    events: Mutex<rtrb::Consumer<Event>>,
    rights: Mutex<Vec<(String, String)>>,
    device: Mutex<String>,
    failure: Mutex<Option<(Fault, String)>>,
    /// One caller of `enable` or `reset` at a time, so that each gets its own answer.
    asking: Mutex<()>,
}

/// The running node.
pub struct Node {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
    loader: Option<JoinHandle<()>>,
    publisher_stop: Arc<std::sync::atomic::AtomicBool>,
}

/// The subscriptions' side of the node.
#[derive(Clone)]
pub struct Inputs(Arc<Core>);

/// The services' side of the node.
#[derive(Clone)]
pub struct Commands(Arc<Core>);

impl Node {
    /// Checks checkpoint and settings, starts the control loop unarmed, and loads the policy in a thread of its own.
    pub fn start(settings: Settings, clock: Arc<dyn Clock>, outputs: Box<dyn Outputs>) -> Result<Self, NodeError> {
        let checkpoint = Checkpoint::open(&settings.model.checkpoint)?;
        let policy = Policy::open(&checkpoint, &settings.model.checkpoint, &convert::policy_options(&settings))?;
        let dims = *checkpoint.dims();
        let controller = Controller::new(convert::control(&settings, &dims))?;
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
        let period = settings.timing.period();
        let publisher_stop = Arc::default();
        let rules = Box::new(input_rules(&settings));
        let process = settings.process.clone();

        let core = Arc::new(Core {
            clock: clock.clone(),
            inputs: inputs.clone(),
            signals: signals.clone(),
            names,
            dims,
            settings: Mutex::new(settings),
            snapshot: Mutex::new(snapshot_reader),
            deadlines: deadlines.clone(),
            pipeline: Mutex::new(None),
            changes: Mutex::new((changes_in, discarded_out)),
            events: Mutex::new(events_out),
            rights: Mutex::new(Vec::new()),
            device: Mutex::new(String::new()),
            failure: Mutex::new(None),
            asking: Mutex::new(()),
        });
        let mut node =
            Self { core: core.clone(), threads: Vec::new(), loader: None, publisher_stop: Arc::clone(&publisher_stop) };
        if process.lock_memory {
            node.report_right("lock_memory", &rights::lock_memory());
        }

        let publisher = Publisher {
            outputs,
            jobs: jobs_out,
            free: free_in,
            chunks: tap_out,
            clock: clock.clone(),
            deadlines,
            stopping: publisher_stop,
        };
        let control_cpu = process.cpu_affinity.first().copied();
        let below = process.rt_priority.map(|p| p.saturating_sub(1).max(1));
        let publisher = node.spawn("pi0_publisher", below, control_cpu, move || publisher.run())?;
        let control = ControlLoop {
            controller: Box::new(controller),
            periodic: Periodic::new(period),
            clock,
            joints,
            inputs,
            rules,
            signals,
            chunks: chunks_out,
            retired: retired_in,
            free: free_out,
            jobs: jobs_in,
            publisher,
            snapshot,
            plan,
            events: events_in,
            changes: changes_out,
            discarded: discarded_in,
        };
        node.spawn("pi0_control", process.rt_priority, control_cpu, move || control.run())?;

        if process.autostart {
            let parts = loader::Parts {
                checkpoint,
                policy: Arc::new(policy),
                chunks: chunks_in,
                retired: retired_out,
                plan: plan_reader,
                tap: tap_in,
            };
            let loader = std::thread::Builder::new()
                .name("pi0_loader".into())
                .spawn(move || loader::run(&core, parts))
                .map_err(|source| NodeError::Thread { name: "pi0_loader", source })?;
            node.loader = Some(loader);
        }
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
            log_event(&event.report, event.chunk, &self.core.names);
        }
    }

    /// Takes over settings that were validated before; those that need an unarmed node are refused while armed.
    pub fn apply(&self, settings: &Settings) -> Result<(), NodeError> {
        self.core.apply(settings)
    }

    /// Brings the robot to a decelerated stop, publishes that to its end, then ends every thread.
    pub fn shutdown(mut self) -> Result<(), NodeError> {
        self.core.signals.requests.ask(RequestBits::DISABLE);
        let stop_time = lock(&self.core.settings).safety.stop_time;
        let deadline = Instant::now() + 2 * stop_time + Duration::from_millis(500);
        let turn = self.core.snapshot().turns;
        loop {
            let s = self.core.snapshot();
            // Two turns later the request has been seen, whatever tick it fell into.
            if (s.turns >= turn + 2 && !s.status.mode.publishes()) || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.log_events();
        self.join();
        match self.failure() {
            Some((_, message)) => Err(NodeError::Refused(message)),
            None => Ok(()),
        }
    }

    fn join(&mut self) {
        self.core.signals.stopping.store(true, Ordering::Release);
        if let Some(loader) = self.loader.take() {
            // Its panics are caught inside.
            let _ = loader.join();
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
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.join();
    }
}

fn input_rules(s: &Settings) -> InputRules {
    let live = convert::live(s);
    InputRules { camera_max_age_ms: live.camera_max_age_ms, drop_lost_views: live.drop_lost_views }
}

fn log_event(r: &TickReport, chunk: Option<u64>, names: &Names) {
    if r.mode != r.previous {
        tracing::info!("mode: {} → {}", r.previous, r.mode);
    }
    if let Some(reason) = r.stop {
        tracing::warn!("{}", reason.text(names));
    }
    if let Some(refusal) = r.refusal {
        tracing::warn!("not armed: {}", refusal.text(names));
    }
    let refused = match r.chunk {
        Some(crate::control::ChunkVerdict::Refused(why)) => Some(why),
        _ => r.dropped,
    };
    if let Some(why) = refused {
        tracing::warn!("chunk {} dropped: {}", chunk.unwrap_or_default(), why.text(names));
    }
}

impl Inputs {
    /// A frame of camera `camera` (index in `camera_names`), or why its message could not be used.
    pub fn frame(&self, camera: usize, stamp: RosTime, frame: Result<Frame, ModelError>) {
        match frame {
            Ok(frame) => self.0.inputs.put_frame(camera, frame, stamp, self.0.clock.monotonic()),
            Err(e) => {
                let first = camera < self.0.inputs.cameras() && self.0.inputs.refusal(camera).is_none();
                if first {
                    tracing::error!("camera '{}': {e}", self.0.names.cameras[camera]);
                }
                self.0.inputs.refuse_frame(camera, e.to_string());
            }
        }
    }

    /// A joint state message; names that are not joints of this node are ignored and reported.
    pub fn joints(&self, stamp: RosTime, names: &[String], positions: &[f64]) {
        self.0.inputs.put_joints(names, positions, stamp, self.0.clock.monotonic());
    }

    /// A new prompt, taken at the next chunk boundary.
    pub fn prompt(&self, text: &str) -> Result<(), NodeError> {
        if text.trim().is_empty() {
            return Err(NodeError::Refused("prompt '' is empty: the old one stays".into()));
        }
        let generation = self.0.inputs.put_prompt(text);
        self.0.signals.has_prompt.store(true, Ordering::Release);
        lock(&self.0.settings).model.prompt = text.into();
        tracing::info!("prompt {generation}: {text}");
        Ok(())
    }
}

impl Commands {
    /// Arms or disarms; the answer says what was done, or why not.
    pub fn enable(&self, on: bool) -> Result<String, String> {
        let core = &self.0;
        let _one_at_a_time = lock(&core.asking);
        if on && let Some(note) = core.note() {
            return Err(note);
        }
        let before = core.snapshot().turns;
        core.signals.requests.ask(if on { RequestBits::ENABLE } else { RequestBits::DISABLE });
        if !on {
            core.wait(|s| s.turns >= before + 2)?;
            return Ok("disarmed".into());
        }
        let s = core.wait(|s| s.answer.is_some_and(|(turn, _)| turn > before))?;
        match s.answer.and_then(|(_, refusal)| refusal) {
            Some(refusal) => Err(refusal.text(&core.names)),
            None => Ok(format!("armed: {}", core.arming_summary())),
        }
    }

    /// Latched decelerating stop. The request itself is one atomic write; the wait is only for the answer.
    pub fn stop(&self) -> Result<String, String> {
        let core = &self.0;
        core.signals.requests.ask(RequestBits::STOP);
        let before = core.snapshot().turns;
        core.wait(|s| s.turns >= before + 2)?;
        Ok("stopping; call ~/reset to release".into())
    }

    /// Releases a stop or a fault to `active`, not armed.
    pub fn reset(&self) -> Result<String, String> {
        let core = &self.0;
        let _one_at_a_time = lock(&core.asking);
        let before = core.snapshot().turns;
        core.signals.requests.ask(RequestBits::RESET);
        let s = core.wait(|s| s.turns >= before + 2)?;
        match s.status.mode {
            Mode::Stopped | Mode::Fault | Mode::Stopping => Err(format!("not released: mode is '{}'", s.status.mode)),
            mode => Ok(format!("released: mode is '{mode}', not armed")),
        }
    }
}

impl Core {
    fn snapshot(&self) -> Snapshot {
        *lock(&self.snapshot).newest()
    }

    /// Waits for the control loop to have done something; fails when the loop does not turn.
    fn wait(&self, done: impl Fn(&Snapshot) -> bool) -> Result<Snapshot, String> {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            let s = self.snapshot();
            if done(&s) {
                return Ok(s);
            }
            if Instant::now() > deadline {
                return Err("the control loop does not answer: see the log; restart the node".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn pipeline_report(&self) -> PipelineReport {
        lock(&self.pipeline).as_ref().map(Pipeline::report).unwrap_or_default()
    }

    /// What keeps the node from becoming active, or what failed.
    fn note(&self) -> Option<String> {
        if let Some((_, failure)) = lock(&self.failure).clone() {
            return Some(failure);
        }
        match self.signals.lifecycle() {
            Lifecycle::Ready => None,
            Lifecycle::Unconfigured if !lock(&self.settings).process.autostart => {
                Some("autostart is false: the policy is not loaded".into())
            }
            Lifecycle::Unconfigured => Some("loading the policy".into()),
            Lifecycle::Warmup => self.with_facts(None, |f| status::missing(f)).or(Some("warming up".into())),
            Lifecycle::Failed => None,
        }
    }

    fn arming_summary(&self) -> String {
        self.with_facts(None, |f| {
            let cameras: Vec<_> =
                f.cameras.iter().map(|c| format!("{} {}", c.name, status::camera_text(f, c))).collect();
            format!("cameras: {}; prompt '{}'", cameras.join(", "), f.prompt)
        })
    }

    fn status(&self) -> Status {
        let note = self.note();
        self.with_facts(note.as_deref(), Status::new)
    }

    fn with_facts<R>(&self, note: Option<&str>, f: impl FnOnce(&status::Facts<'_>) -> R) -> R {
        let settings = lock(&self.settings).clone();
        let snapshot = self.snapshot();
        let pipeline = self.pipeline_report();
        let cameras: Vec<_> = (settings.inputs.cameras.iter().enumerate())
            .map(|(i, c)| status::CameraView {
                name: c.name.clone(),
                max_age_ms: c.max_age.as_secs_f64() * 1e3,
                freshness: self.inputs.freshness(i),
                size: self.inputs.frame(i).map(|s| (s.frame.width(), s.frame.height())),
                refusal: self.inputs.refusal(i),
            })
            .collect();
        let (joints, unknown) = (self.inputs.joints(), self.inputs.unknown_joints());
        let device = lock(&self.device).clone();
        let rights = [lock(&self.rights).clone(), pipeline.rights.clone()].concat();
        let control: &ControlStatus = &snapshot.status;
        f(&status::Facts {
            ros_now: self.clock.ros(),
            now: self.clock.monotonic(),
            seconds: snapshot.seconds,
            control,
            names: &self.names,
            deadlines: publisher::snapshot(&self.deadlines),
            pipeline: &pipeline,
            pipeline_mode: settings.gpu.pipeline_mode.name(),
            cameras: &cameras,
            joints: &joints,
            max_joint_age_ms: settings.inputs.max_joint_state_age.as_secs_f64() * 1e3,
            unknown_joints: &unknown,
            note,
            prompt: &self.inputs.prompt().text,
            device: &device,
            rights: &rights,
            frozen_after: FROZEN_FRAMES,
        })
    }

    fn apply(&self, new: &Settings) -> Result<(), NodeError> {
        let mut settings = lock(&self.settings);
        let old = &*settings;
        if new == old {
            return Ok(());
        }
        let control = convert::control(new, &self.dims);
        if control != convert::control(old, &self.dims) {
            let controller = Box::new(Controller::new(control)?);
            *lock(&self.deadlines) = Deadlines::new(controller.config().deadline, controller.config().period);
            self.send(Change::Controller(controller))?;
        }
        let rules = input_rules(new);
        if rules != input_rules(old) {
            self.send(Change::Rules(Box::new(rules)))?;
        }
        if let Some(pipeline) = &*lock(&self.pipeline) {
            pipeline.set_live(convert::live(new));
        }
        if new.model.prompt != old.model.prompt {
            self.inputs.put_prompt(&new.model.prompt);
            self.signals.has_prompt.store(!new.model.prompt.trim().is_empty(), Ordering::Release);
        }
        *settings = new.clone();
        Ok(())
    }

    fn send(&self, change: Change) -> Result<(), NodeError> {
        let mut rings = lock(&self.changes);
        while rings.1.pop().is_ok() {}
        rings
            .0
            .push(change)
            .map_err(|_| NodeError::Refused("the control loop does not take the change: try again".into()))
    }
}
