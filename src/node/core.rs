//! What the parts of a running node share, and its two faces: what subscriptions put in, what services ask for.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::control_loop::{Change, Event, InputRules, Signals, Snapshot};
use super::lifecycle::State;
use super::status::{self, Status};
use super::{NodeError, convert, lock, publisher, recorder};
use crate::clock::{Clock, Monotonic, RosTime};
use crate::control::chunk::ActionChunk;
use crate::control::{
    ChunkVerdict, ControlConfig, Controller, Deadlines, InputFault, Lifecycle, Mode, Names, TickReport,
};
use crate::engine::EngineError;
use crate::error::Fault;
use crate::model::{Frame, ModelError};
use crate::params::Settings;
use crate::pipeline::inputs::InputSlots;
use crate::pipeline::{Pipeline, PipelineReport, Ports};
use crate::rt::latest::Reader;
use crate::rt::signals::RequestBits;

/// So many identical frames in a row count as a frozen camera; a still scene has sensor noise, a frozen driver has not.
const FROZEN_FRAMES: u64 = 30;

/// The control loop answers within a period or two, if it turns at all.
const PATIENCE: Duration = Duration::from_secs(2);

/// Nothing to follow is no task.
const EMPTY_PROMPT: &str = "the prompt is empty: say what to do; the old one stays";

/// What every part of the node can reach. Nothing in here is touched by the control thread but `signals` and `inputs`.
pub(super) struct Core {
    pub clock: Arc<dyn Clock>,
    pub inputs: Arc<InputSlots>,
    pub signals: Arc<Signals>,
    pub names: Mutex<Arc<Names>>,
    /// Actions of a chunk of the policy; before one is loaded, some number that fits the settings.
    pub horizon: AtomicUsize,
    /// The lifecycle state, by its number.
    pub state: AtomicU8,
    /// The node is about to end: it does not become ready any more.
    pub leaving: AtomicBool,
    /// Chunks that had been decoded when inference was last activated.
    pub decoded_before: AtomicU64,
    /// Why the policy could not be loaded, until it is tried again.
    pub not_configured: Mutex<Option<(Fault, String)>>,
    pub ports: Arc<Mutex<Ports>>,
    pub wired: Mutex<InputsWired>,
    pub tap: crossbeam_channel::Sender<Arc<ActionChunk>>,
    pub settings: Mutex<Settings>,
    pub snapshot: Mutex<Reader<Snapshot>>,
    pub deadlines: Arc<Mutex<Deadlines>>,
    pub pipeline: Mutex<Option<Pipeline>>,
    pub changes: Mutex<(rtrb::Producer<Change>, rtrb::Consumer<Change>)>,
    pub events: Mutex<rtrb::Consumer<Event>>,
    pub rights: Mutex<Vec<(String, String)>>,
    pub device: Mutex<String>,
    pub failure: Mutex<Option<(Fault, String)>>,
    /// The flight recorder, unless it is switched off.
    pub recorder: Option<Arc<recorder::Handle>>,
    /// One caller of `enable` or `reset` at a time, so that each gets its own answer.
    pub asking: Mutex<()>,
}

/// A topic that the node listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Of the camera with this index in `camera_names`.
    Camera(usize),
    /// `joint_states`.
    JointStates,
}

/// What is wrong with the publishers of every source.
#[derive(Debug, Default)]
pub(super) struct InputsWired {
    pub cameras: Vec<Option<String>>,
    pub joint_states: Option<String>,
}

/// The subscriptions' side of the node.
#[derive(Clone)]
pub struct Inputs(pub(super) Arc<Core>);

/// The services' side of the node.
#[derive(Clone)]
pub struct Commands(pub(super) Arc<Core>);

impl Inputs {
    /// A frame of camera `camera` (index in `camera_names`), or why its message could not be used.
    pub fn frame(&self, camera: usize, stamp: RosTime, frame: Result<Frame, ModelError>) {
        self.frame_of(camera, stamp, self.0.clock.monotonic(), frame);
    }

    /// The same for a message that arrived a while ago and took its time to decode.
    pub fn frame_of(&self, camera: usize, stamp: RosTime, arrived: Monotonic, frame: Result<Frame, ModelError>) {
        match frame {
            Ok(frame) => self.0.inputs.put_frame(camera, frame, stamp, arrived),
            Err(e) => {
                let first = camera < self.0.inputs.cameras() && self.0.inputs.refusal(camera).is_none();
                if first {
                    tracing::error!("camera '{}': {e}", self.0.names().cameras[camera]);
                }
                self.0.inputs.refuse_frame(camera, e.to_string());
            }
        }
    }

    /// A joint state message; names that are not joints of this node are ignored and reported.
    pub fn joints(&self, stamp: RosTime, names: &[String], positions: &[f64]) {
        let now = self.0.clock.monotonic();
        if let Some(recorder) = &self.0.recorder {
            recorder.joints(now, self.0.clock.ros(), stamp, names, positions);
        }
        self.0.inputs.put_joints(names, positions, stamp, now);
    }

    /// What is wrong with an output, [`InputFault::OutputUnconnected`] or [`InputFault::OutputContested`], until told
    /// otherwise: no arming, and a stop.
    pub fn outputs(&self, fault: Option<InputFault>) {
        self.0.signals.outputs.set(fault);
    }

    /// The full name of an output's topic and of the other nodes that publish on it, as the texts will say them; told
    /// before the fault that they explain, and kept after it: the reason for a stop stays.
    pub fn output_topic(&self, output: usize, topic: &str, others: Vec<String>) {
        let mut names = lock(&self.0.names);
        if let Some(output) = Arc::make_mut(&mut names).outputs.get_mut(output) {
            (output.topic, output.others) = (topic.into(), others);
        }
    }

    /// Why nothing can be heard from a source, as far as its publishers tell, until told otherwise.
    pub fn wiring(&self, of: Source, problem: Option<String>) {
        let mut wired = lock(&self.0.wired);
        let place = match of {
            Source::Camera(i) => wired.cameras.get_mut(i),
            Source::JointStates => Some(&mut wired.joint_states),
        };
        if let Some(place) = place {
            *place = problem;
        }
    }

    /// A new prompt, taken at the next chunk boundary.
    pub fn prompt(&self, text: &str) -> Result<(), NodeError> {
        if text.trim().is_empty() {
            return Err(NodeError::Refused(EMPTY_PROMPT.into()));
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
            Some(refusal) => Err(refusal.text(&core.names())),
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

    /// Writes the last seconds to a file; answers with its path.
    pub fn save_recording(&self) -> Result<String, String> {
        let Some(recorder) = &self.0.recorder else {
            return Err("the recorder is switched off: restart with recorder.enabled true".into());
        };
        recorder.save().map(|path| path.display().to_string())
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
    pub fn snapshot(&self) -> Snapshot {
        *lock(&self.snapshot).newest()
    }

    /// Waits for the control loop to have done something; fails when the loop does not turn.
    fn wait(&self, done: impl Fn(&Snapshot) -> bool) -> Result<Snapshot, String> {
        let deadline = Instant::now() + PATIENCE;
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

    pub fn pipeline_report(&self) -> PipelineReport {
        match &*lock(&self.pipeline) {
            Some(pipeline) => pipeline.report(),
            None => PipelineReport { fault: lock(&self.not_configured).clone(), ..Default::default() },
        }
    }

    /// What keeps the node from becoming active, or what failed.
    fn note(&self) -> Option<String> {
        if let Some((_, failure)) = lock(&self.failure).clone() {
            return Some(failure);
        }
        match self.signals.lifecycle() {
            Lifecycle::Ready => None,
            Lifecycle::Unconfigured => Some(match (lock(&self.not_configured).clone(), self.state()) {
                (Some((_, why)), _) => format!("configure failed: {why}"),
                (None, State::Unconfigured) => "unconfigured, no policy is loaded: configure and activate".into(),
                (None, State::Finalized) => "finalized: restart the process".into(),
                (None, _) => "loading the policy".into(),
            }),
            Lifecycle::Warmup => match self.state() {
                State::Inactive => Some("inactive, inference stands still: activate".into()),
                State::Deactivating | State::ShuttingDown => None,
                State::Configuring => Some("warming up".into()),
                _ => self.with_facts(None, status::missing).or(Some("warming up".into())),
            },
            Lifecycle::Failed => None,
        }
    }

    /// The stages have ended for good.
    pub fn fail_inference(&self, fault: Fault, why: String) {
        self.signals.inference_failed.store(true, Ordering::Release);
        self.signals.set_lifecycle(Lifecycle::Failed);
        *lock(&self.failure) = Some((fault, why));
    }

    fn arming_summary(&self) -> String {
        self.with_facts(None, |f| {
            let cameras: Vec<_> =
                f.cameras.iter().map(|c| format!("{} {}", c.name, status::camera_text(f, c))).collect();
            format!("cameras: {}; prompt '{}'", cameras.join(", "), f.prompt)
        })
    }

    pub fn status(&self) -> Status {
        let note = self.note();
        self.with_facts(note.as_deref(), Status::new)
    }

    pub fn with_facts<R>(&self, note: Option<&str>, f: impl FnOnce(&status::Facts<'_>) -> R) -> R {
        let settings = lock(&self.settings).clone();
        let snapshot = self.snapshot();
        let pipeline = self.pipeline_report();
        let cameras: Vec<_> = (settings.inputs.cameras.iter().enumerate())
            .map(|(i, c)| status::CameraView {
                name: c.name.clone(),
                max_age_ms: c.max_age.as_secs_f64() * 1e3,
                freshness: self.inputs.freshness(i),
                size: self.inputs.frame(i).map(|s| (s.frame.width(), s.frame.height())),
                refusal: self.inputs.refusal(i).or_else(|| lock(&self.wired).cameras.get(i)?.clone()),
            })
            .collect();
        let (joints, unknown) = (self.inputs.joints(), self.inputs.unknown_joints());
        let device = lock(&self.device).clone();
        let rights = [lock(&self.rights).clone(), pipeline.rights.clone()].concat();
        f(&status::Facts {
            ros_now: self.clock.ros(),
            now: self.clock.monotonic(),
            seconds: snapshot.seconds,
            control: &snapshot.status,
            output_fault: self.signals.outputs.get(),
            limits_from: &settings.joints.iter().map(|j| j.limits_from.clone()).collect::<Vec<_>>(),
            description_problems: &settings.safety.description_problems,
            unsent: self.signals.unsent.load(Ordering::Acquire),
            output_window_ms: settings.output_window.as_secs_f64() * 1e3,
            blocked_ms: snapshot.blocked as f64 * settings.timing.period().as_secs_f64() * 1e3,
            names: &self.names(),
            deadlines: publisher::snapshot(&self.deadlines),
            pipeline: &pipeline,
            decoded_before: self.decoded_before.load(Ordering::Acquire),
            load_error: lock(&self.not_configured).is_some(),
            lifecycle: self.state().label(),
            pipeline_mode: settings.gpu.pipeline_mode.name(),
            cameras: &cameras,
            joints: &joints,
            max_joint_age_ms: settings.inputs.max_joint_state_age.as_secs_f64() * 1e3,
            unknown_joints: &unknown,
            joint_states_wiring: lock(&self.wired).joint_states.as_deref(),
            note,
            prompt: &self.inputs.prompt().text,
            device: &device,
            rights: &rights,
            frozen_after: FROZEN_FRAMES,
            recorder: self.recorder.as_ref().map(|r| r.report()),
        })
    }

    /// What the texts call things at present.
    pub fn names(&self) -> Arc<Names> {
        lock(&self.names).clone()
    }

    pub fn apply(&self, new: &Settings) -> Result<(), NodeError> {
        let mut settings = lock(&self.settings);
        let old = &*settings;
        if new == old {
            return Ok(());
        }
        if new.model.prompt.trim().is_empty() && !old.model.prompt.trim().is_empty() {
            return Err(NodeError::Refused(EMPTY_PROMPT.into()));
        }
        let pipeline = lock(&self.pipeline);
        if let Some(pipeline) = &*pipeline {
            pipeline.decide(new.gpu.split).map_err(EngineError::from)?;
        }
        let horizon = self.horizon.load(Ordering::Acquire);
        let (control, before) = (convert::control(new, horizon), convert::control(old, horizon));
        // How old a chunk may be goes with the rules, which change while the robot moves as well.
        let (max_chunk_age, max_image_age) = (before.max_chunk_age, before.max_image_age);
        if (ControlConfig { max_chunk_age, max_image_age, ..control.clone() }) != before {
            let controller = Box::new(Controller::new(control)?);
            lock(&self.deadlines).set(controller.config().deadline, controller.config().period);
            self.send(Change::Controller(controller))?;
        }
        let rules = input_rules(new, horizon);
        if rules != input_rules(old, horizon) {
            self.send(Change::Rules(Box::new(rules)))?;
        }
        if let Some(pipeline) = &*pipeline {
            pipeline.set_live(convert::live(new));
            if new.gpu.split != old.gpu.split {
                pipeline.set_split(new.gpu.split).map_err(EngineError::from)?;
            }
        }
        if new.model.prompt != old.model.prompt {
            self.inputs.put_prompt(&new.model.prompt);
            self.signals.has_prompt.store(!new.model.prompt.trim().is_empty(), Ordering::Release);
        }
        *settings = new.clone();
        Ok(())
    }

    /// Hands a change to the control loop, which takes what waits once a period: a request of many waits for room.
    pub(super) fn send(&self, mut change: Change) -> Result<(), NodeError> {
        let mut rings = lock(&self.changes);
        let deadline = Instant::now() + PATIENCE;
        loop {
            while rings.1.pop().is_ok() {}
            change = match rings.0.push(change) {
                Ok(()) => return Ok(()),
                Err(rtrb::PushError::Full(change)) if Instant::now() < deadline => change,
                Err(_) => {
                    return Err(NodeError::Refused("the control loop does not take the change: try again".into()));
                }
            };
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// For chunks of `horizon` actions.
pub(super) fn input_rules(s: &Settings, horizon: usize) -> InputRules {
    let (live, control) = (convert::live(s), convert::control(s, horizon));
    InputRules {
        camera_max_age_ms: live.camera_max_age_ms,
        drop_lost_views: live.drop_lost_views,
        max_chunk_age: control.max_chunk_age,
        max_image_age: control.max_image_age,
    }
}

/// How serious a line of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EventLevel {
    Info,
    Warn,
}

/// What a tick has to say: one line each.
pub(super) fn event_texts(r: &TickReport, chunk: Option<u64>, names: &Names) -> Vec<(EventLevel, String)> {
    let mut lines = Vec::new();
    if r.mode != r.previous {
        lines.push((EventLevel::Info, format!("mode: {} → {}", r.previous, r.mode)));
    }
    if let Some(reason) = r.stop {
        lines.push((EventLevel::Warn, reason.text(names)));
    }
    let refused = match r.chunk {
        Some(ChunkVerdict::Refused(why)) => chunk.map(|chunk| (chunk, why)),
        _ => None,
    };
    for (chunk, why) in r.dropped.into_iter().chain(refused) {
        lines.push((EventLevel::Warn, format!("chunk {chunk} dropped: {}", why.text(names))));
    }
    lines
}

pub(super) fn log_event(r: &TickReport, chunk: Option<u64>, names: &Names) {
    for (level, text) in event_texts(r, chunk, names) {
        match level {
            EventLevel::Info => tracing::info!("{text}"),
            EventLevel::Warn => tracing::warn!("{text}"),
        }
    }
}
