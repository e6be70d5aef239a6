//! The flight recorder of a running node: takes what the real-time threads leave in rings, keeps the last seconds, and
//! writes them on a stop, on a fault and when asked.
//!
//! The control thread and the publisher thread only push values of fixed size into rings whose memory was reserved at
//! start; where a ring is full, the value is lost and counted, and nobody waits.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use super::core::Core;
use super::messages::Messages;
use super::{NodeError, lock};
use crate::bag::Record;
use crate::bag::message::{JointState, Text, Tick};
use crate::clock::{Clock, Monotonic, RosTime};
use crate::control::chunk::ActionChunk;
use crate::control::{ControlStatus, JointVector, Mode, Reason, TickReport, TickTimes, Window};
use crate::params::{self, Settings};
use crate::telemetry::recorder::{MOST_BYTES, Ring, Shelf};

/// Ticks on their way to the recorder: half a second at 1 kHz is far more than it ever sleeps.
const TICKS: usize = 512;
/// Published windows on their way.
const WINDOWS: usize = 64;
/// Windows are recorded at most this often; every tick has its command anyhow.
const WINDOW_PERIOD: Duration = Duration::from_micros(9_500);
/// Joint states on their way.
const JOINT_STATES: usize = 4096;
/// Chunks on their way.
const CHUNKS: usize = 64;
/// How often the rings are emptied.
const LOOK: Duration = Duration::from_millis(20);
/// How often status and diagnostics are recorded.
const STATUS: Duration = Duration::from_secs(1);
/// What follows a stop at rest is recorded for this long,
const AFTER: Duration = Duration::from_millis(500);
/// and a stop that does not come to rest is not waited for longer than this.
const LONGEST_STOP: Duration = Duration::from_secs(5);
/// How long `~/save_recording` waits for its file.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who the node is, for its recordings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Full name, `/namespace/name`.
    pub name: String,
    /// Its parameters as a params file, so that a recording can be replayed by itself.
    pub parameters: String,
}

impl Default for Identity {
    fn default() -> Self {
        Self { name: super::messages::DEFAULT_NAME.into(), parameters: String::new() }
    }
}

/// What one tick leaves for the recorder.
#[derive(Debug, Clone, Copy)]
pub(super) struct TickRecord {
    pub ros: RosTime,
    pub times: TickTimes,
    pub skipped: u64,
    pub report: TickReport,
    /// The chunk that was given to the tick.
    pub given: Option<u64>,
    pub measured: JointVector,
    pub epoch: u64,
    /// The plan that is followed.
    pub plan: Option<u64>,
    pub interventions: u64,
    pub tracking_error: f64,
    pub seam_jump: f64,
    pub command: JointVector,
}

impl TickRecord {
    /// Of no tick.
    const NONE: Self = Self {
        ros: RosTime(0),
        times: TickTimes {
            scheduled: Monotonic(0),
            woke: Monotonic(0),
            computed: Monotonic(0),
            published: None,
            plan: None,
        },
        skipped: 0,
        report: TickReport {
            published: false,
            previous: Mode::Unconfigured,
            mode: Mode::Unconfigured,
            refusal: None,
            chunk: None,
            dropped: None,
            adoption: None,
            stop: None,
            restarted: false,
        },
        given: None,
        measured: JointVector::NONE,
        epoch: 0,
        plan: None,
        interventions: 0,
        tracking_error: 0.0,
        seam_jump: 0.0,
        command: JointVector::NONE,
    };
}

/// The control thread's end: pushing allocates nothing and takes no lock.
pub(super) struct TickTap {
    ring: rtrb::Producer<TickRecord>,
    lost: Arc<AtomicU64>,
}

impl TickTap {
    /// Leaves a tick.
    pub fn push(&mut self, status: &ControlStatus, record: impl FnOnce(&ControlStatus) -> TickRecord) {
        if self.ring.push(record(status)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A window that was published.
pub(super) struct Sent {
    times: TickTimes,
    window: Option<Box<Window>>,
}

/// The publisher thread's end.
pub(super) struct WindowTap {
    spare: rtrb::Consumer<Box<Window>>,
    ring: rtrb::Producer<Sent>,
    chunks: Sender<Arc<ActionChunk>>,
    next: Monotonic,
    lost: Arc<AtomicU64>,
}

impl WindowTap {
    /// Leaves a window that went out, without allocating: it is copied into memory made at start.
    pub fn sent(&mut self, times: &TickTimes, window: &Window) {
        let mut copy = None;
        if times.scheduled >= self.next {
            self.next = times.scheduled + WINDOW_PERIOD;
            copy = self.spare.pop().ok();
            if let Some(copy) = &mut copy {
                copy.copy_from(window);
            }
        }
        if self.ring.push(Sent { times: *times, window: copy }).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Leaves a chunk.
    pub fn chunk(&self, chunk: &Arc<ActionChunk>) {
        if self.chunks.try_send(chunk.clone()).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What the rest of the node knows of its recorder.
pub(super) struct Handle {
    requests: Sender<Sender<Result<PathBuf, String>>>,
    joints: Sender<(Monotonic, RosTime, JointState)>,
    lost: Arc<AtomicU64>,
    report: Mutex<Report>,
}

/// What the recorder has done.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Report {
    pub seconds: f64,
    pub bytes: usize,
    pub lost: u64,
    pub written: u64,
    pub last: Option<PathBuf>,
    /// Why the last one was not written.
    pub failure: Option<String>,
}

impl Handle {
    /// Leaves a joint state message.
    pub fn joints(&self, at: Monotonic, ros: RosTime, stamp: RosTime, names: &[String], positions: &[f64]) {
        let message = JointState { stamp, names: names.to_vec(), positions: positions.to_vec() };
        if self.joints.try_send((at, ros, message)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes the last seconds now; answers with the path.
    pub fn save(&self) -> Result<PathBuf, String> {
        let (reply, answer) = bounded(1);
        match self.requests.try_send(reply) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err("many recordings are asked for already: try again".into()),
            Err(TrySendError::Disconnected(_)) => return Err("the recorder has ended: restart the node".into()),
        }
        answer.recv_timeout(PATIENCE).unwrap_or_else(|_| Err("the recorder does not answer: see the log".into()))
    }

    pub fn report(&self) -> Report {
        Report { lost: self.lost.load(Ordering::Relaxed), ..lock(&self.report).clone() }
    }
}

/// Every end of a recorder before it runs.
pub(super) struct Ends {
    pub handle: Arc<Handle>,
    pub ticks: TickTap,
    pub windows: WindowTap,
    pub recorder: Waiting,
}

/// What the recorder's own thread will own.
pub(super) struct Waiting {
    ticks: rtrb::Consumer<TickRecord>,
    sent: rtrb::Consumer<Sent>,
    spare: rtrb::Producer<Box<Window>>,
    chunks: Receiver<Arc<ActionChunk>>,
    joints: Receiver<(Monotonic, RosTime, JointState)>,
    requests: Receiver<Sender<Result<PathBuf, String>>>,
    handle: Arc<Handle>,
    identity: Identity,
}

/// The rings; `None` if the recorder is switched off. `window` is one with the room that published ones have.
pub(super) fn ends(settings: &Settings, window: &Window, identity: Identity) -> Option<Ends> {
    if !settings.recorder.enabled {
        return None;
    }
    let lost = Arc::new(AtomicU64::new(0));
    let (ticks_in, ticks) = touched(TICKS, || TickRecord::NONE);
    let (sent_in, sent) = touched(TICKS, || Sent { times: TickTimes::default(), window: None });
    let (mut spare, spare_out) = rtrb::RingBuffer::new(WINDOWS);
    for _ in 0..WINDOWS {
        // As many places as windows: this cannot fail.
        let _ = spare.push(Box::new(window.clone()));
    }
    let (chunks_in, chunks) = bounded(CHUNKS);
    let (joints_in, joints) = bounded(JOINT_STATES);
    let (requests_in, requests) = bounded(4);
    let handle =
        Arc::new(Handle { requests: requests_in, joints: joints_in, lost: lost.clone(), report: Mutex::default() });
    Some(Ends {
        handle: handle.clone(),
        ticks: TickTap { ring: ticks_in, lost: lost.clone() },
        windows: WindowTap { spare: spare_out, ring: sent_in, chunks: chunks_in, next: Monotonic(i64::MIN), lost },
        recorder: Waiting { ticks, sent, spare, chunks, joints, requests, handle, identity },
    })
}

/// A ring every page of which has been written to: who fills it later meets no page fault.
fn touched<T>(places: usize, value: impl Fn() -> T) -> (rtrb::Producer<T>, rtrb::Consumer<T>) {
    let (mut to, mut from) = rtrb::RingBuffer::new(places);
    while to.push(value()).is_ok() {}
    while from.pop().is_ok() {}
    (to, from)
}

/// The folder of recordings if none is given: where ROS keeps what it writes.
fn default_folder() -> PathBuf {
    let ros = std::env::var_os("ROS_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".ros"));
    ros.or_else(home).unwrap_or_else(std::env::temp_dir).join("pi0_mps")
}

/// A stop that will be written when the robot has come to rest.
#[derive(Debug, Clone, PartialEq)]
struct Pending {
    reason: String,
    since: Monotonic,
    /// Since when nothing is published any more.
    resting: Option<Monotonic>,
}

/// A file that is being written.
struct Writing {
    thread: JoinHandle<Result<PathBuf, String>>,
    asked: Option<Sender<Result<PathBuf, String>>>,
}

/// The running recorder.
pub(super) struct Recorder {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    /// Starts its thread, an ordinary one.
    pub fn start(core: Arc<Core>, waiting: Waiting) -> Result<Self, NodeError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let mut body = Body::new(core, waiting);
        let thread = std::thread::Builder::new()
            .name("pi0_recorder".into())
            .spawn(move || {
                while !stopping.load(Ordering::Acquire) {
                    body.round();
                    std::thread::park_timeout(LOOK);
                }
                body.end();
            })
            .map_err(|source| NodeError::Thread { name: "pi0_recorder", source })?;
        Ok(Self { thread: Some(thread), stop })
    }

    /// Writes what is to be written and ends the thread.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the recorder panicked: see above");
            }
        }
    }
}

struct Body {
    core: Arc<Core>,
    from: Waiting,
    settings: params::Recorder,
    shelf: Shelf,
    messages: Messages,
    ring: Ring,
    /// Ticks whose window is still on its way to be published.
    open: VecDeque<TickRecord>,
    /// Of each camera: the frame last recorded.
    frames: Vec<(u64, Monotonic)>,
    prompt: Option<u64>,
    next_status: Monotonic,
    mode: Mode,
    pending: Option<Pending>,
    asked: VecDeque<Sender<Result<PathBuf, String>>>,
    writing: Option<Writing>,
    /// When a stop was last written.
    written: Option<Monotonic>,
    /// In force: it changes only while nothing is published.
    deadline_ms: f64,
}

impl Body {
    fn new(core: Arc<Core>, from: Waiting) -> Self {
        let (settings, messages) = {
            let s = lock(&core.settings);
            (s.recorder.clone(), Messages::new(&s, &from.identity.name))
        };
        let folder = settings.folder.clone().unwrap_or_else(default_folder);
        let keep = vec![messages.prompt.clone(), messages.parameters.clone()];
        let (ros, now) = (core.clock.ros(), core.clock.monotonic());
        let mut ring = Ring::new(settings.seconds, MOST_BYTES, keep);
        ring.push(now, Record::new(&messages.parameters, ros, &Text(from.identity.parameters.clone())));
        let cameras = core.inputs.cameras();
        Self {
            shelf: Shelf { folder, keep: settings.keep },
            settings,
            messages,
            ring,
            open: VecDeque::new(),
            frames: vec![(0, Monotonic(0)); cameras],
            prompt: None,
            next_status: now,
            mode: Mode::default(),
            pending: None,
            asked: VecDeque::new(),
            writing: None,
            written: None,
            deadline_ms: f64::NAN,
            core,
            from,
        }
    }

    /// Empties the rings, and writes when it is time.
    fn round(&mut self) {
        let now = self.core.clock.monotonic();
        self.collect(now);
        self.asked.extend(self.from.requests.try_iter());
        self.write_when_due(now, false);
        let mut report = lock(&self.from.handle.report);
        (report.seconds, report.bytes) = (self.ring.seconds(), self.ring.bytes());
    }

    /// The last round: a stop that waits for its rest is written as it is.
    fn end(&mut self) {
        if self.settings.on_shutdown {
            let since = self.core.clock.monotonic();
            self.pending.get_or_insert(Pending { reason: "shutdown".into(), since, resting: None });
        }
        self.round();
        let now = self.core.clock.monotonic();
        while self.pending.is_some() || !self.asked.is_empty() || self.writing.is_some() {
            self.write_when_due(now, true);
            std::thread::park_timeout(LOOK);
        }
    }

    fn collect(&mut self, now: Monotonic) {
        let clock: &dyn Clock = &*self.core.clock;
        let ros_now = clock.ros();
        let ros_at = |at: Monotonic| ros_now.plus_seconds(-now.seconds_since(at));
        while let Ok((at, ros, message)) = self.from.joints.try_recv() {
            self.ring.push(at, Record::new(&self.messages.joint_states, ros, &message));
        }
        let prompt = self.core.inputs.prompt();
        if self.prompt != Some(prompt.generation) && !prompt.text.is_empty() {
            self.prompt = Some(prompt.generation);
            self.ring.push(now, Record::new(&self.messages.prompt, ros_now, &Text(prompt.text)));
        }
        if self.settings.image_rate_hz > 0.0 {
            for camera in 0..self.frames.len() {
                self.camera(camera, ros_at);
            }
        }
        while let Ok(chunk) = self.from.chunks.try_recv() {
            let at = chunk.timing.decode_end;
            self.messages.chunk(ros_at(at), &chunk).into_iter().for_each(|r| self.ring.push(at, r));
        }
        self.deadline_ms = lock(&self.core.settings).timing.deadline.as_secs_f64() * 1e3;
        while let Ok(tick) = self.from.ticks.pop() {
            self.look_at(&tick);
            self.open.push_back(tick);
        }
        while let Ok(sent) = self.from.sent.pop() {
            self.published(sent, ros_at);
        }
        // A window that is not published within this time never is.
        while self.open.front().is_some_and(|t| !t.report.published || now >= t.times.woke + Duration::from_millis(200))
        {
            let Some(tick) = self.open.pop_front() else { break };
            self.tick(&tick, None);
        }
        if now >= self.next_status {
            self.next_status = now + STATUS;
            let status = self.core.status();
            self.messages.status(ros_now, &status).into_iter().for_each(|r| self.ring.push(now, r));
        }
    }

    /// The newest frame of a camera, if it is time for one.
    fn camera(&mut self, camera: usize, ros_at: impl Fn(Monotonic) -> RosTime) {
        let (count, at) = self.frames[camera];
        let Some(sample) = self.core.inputs.frame(camera) else { return };
        // Nine tenths of a period: frames come a little early and a little late.
        let apart = 0.9 / self.settings.image_rate_hz;
        if sample.count == count || (count > 0 && sample.arrived.seconds_since(at) < apart) {
            return;
        }
        self.frames[camera] = (sample.count, sample.arrived);
        let width = self.settings.image_width;
        if let Some(record) = self.messages.frame(camera, ros_at(sample.arrived), sample.stamp, &sample.frame, width) {
            self.ring.push(sample.arrived, record);
        }
    }

    /// A window went out: ticks before it that were published and did not go out never will.
    fn published(&mut self, sent: Sent, ros_at: impl Fn(Monotonic) -> RosTime) {
        while let Some(tick) = self.open.pop_front() {
            let this = tick.times.scheduled == sent.times.scheduled;
            self.tick(&tick, sent.times.published.filter(|_| this));
            if this {
                break;
            }
        }
        if let Some(window) = sent.window {
            let at = sent.times.published.unwrap_or(sent.times.computed);
            self.messages.window(ros_at(at), &window).for_each(|r| self.ring.push(at, r));
            // It came from there: there is room.
            let _ = self.from.spare.push(window);
        }
    }

    fn tick(&mut self, t: &TickRecord, published: Option<Monotonic>) {
        let ms = |to: Option<Monotonic>| to.map_or(f64::NAN, |to| to.ms_since(t.times.scheduled));
        let message = Tick {
            stamp: t.ros,
            mode: (t.report.mode as u8, t.report.mode.to_string()),
            epoch: t.epoch,
            chunk: t.plan.unwrap_or(0),
            published: t.report.published,
            skipped: t.skipped,
            interventions: t.interventions,
            times: [
                t.times.woke.ms_since(t.times.scheduled),
                t.times.computed.ms_since(t.times.woke),
                ms(published),
                self.deadline_ms - ms(published),
            ],
            plan_age: match (t.times.plan, published) {
                (Some(plan), Some(published)) => published.ms_since(plan.observed),
                _ => f64::NAN,
            },
            tracking_error: t.tracking_error,
            seam_jump: if t.report.adoption.is_some() { t.seam_jump } else { f64::NAN },
            measured: t.measured.to_vec(),
            command: t.command.to_vec(),
        };
        self.ring.push(t.times.woke, Record::new(&self.messages.ticks, t.ros, &message));
    }

    /// Modes, refusals and stops of a tick; a stop that nobody ordered, and `~/stop`, will be written.
    fn look_at(&mut self, t: &TickRecord) {
        for record in self.messages.events(t.ros, &t.report, t.given, &self.core.names()).0 {
            self.ring.push(t.times.woke, record);
        }
        self.mode = t.report.mode;
        let reason = match t.report.stop {
            Some(Reason::Disabled | Reason::Deactivated) => None,
            // Coasting is not yet a stop.
            Some(_) if t.report.mode == Mode::Coast => None,
            Some(reason) => Some(reason.text(&self.core.names())),
            None => (t.report.mode == Mode::Fault && t.report.previous != Mode::Fault).then(|| "fault".to_owned()),
        };
        if let Some(reason) = reason {
            let since = t.times.woke;
            self.pending.get_or_insert(Pending { reason, since, resting: None });
        }
    }

    fn write_when_due(&mut self, now: Monotonic, at_once: bool) {
        if let Some(done) = self.writing.take_if(|w| w.thread.is_finished()) {
            self.written(done);
        }
        if self.writing.is_some() {
            return;
        }
        if let Some(reply) = self.asked.pop_front() {
            return self.write("saved", Some(reply));
        }
        let Some(pending) = &mut self.pending else { return };
        if !self.mode.publishes() {
            pending.resting.get_or_insert(now);
        }
        let rested = pending.resting.is_some_and(|t| now >= t + AFTER) || now >= pending.since + LONGEST_STOP;
        // Stops that follow one another stand in one file, while the ring still holds the first.
        let apart = self.written.is_none_or(|t| now.seconds_since(t) > 0.5 * self.settings.seconds);
        if at_once || (rested && apart) {
            let reason = self.pending.take().map(|p| p.reason).unwrap_or_default();
            self.written = Some(now);
            self.write(&reason, None);
        }
    }

    /// Begins to write; the file is made on a thread of its own, so that the rings are emptied meanwhile.
    fn write(&mut self, reason: &str, asked: Option<Sender<Result<PathBuf, String>>>) {
        let records = self.ring.snapshot();
        let (shelf, seconds) = (self.shelf.clone(), SystemSeconds::now());
        // The remedy after the colon is for people, not for names.
        let reason = reason.split(':').next().unwrap_or_default().to_owned();
        let facts = [
            ("reason", reason.clone()),
            ("node", self.from.identity.name.clone()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("device", lock(&self.core.device).clone()),
        ];
        let body = move || shelf.write(seconds, &reason, &facts, &records);
        match std::thread::Builder::new().name("pi0_recording".into()).spawn(body) {
            Ok(thread) => self.writing = Some(Writing { thread, asked }),
            Err(e) => self.say(Err(format!("recording not written: no thread for it: {e}")), asked),
        }
    }

    fn written(&self, done: Writing) {
        let result = done.thread.join().unwrap_or_else(|_| Err("recording not written: its thread panicked".into()));
        self.say(result, done.asked);
    }

    fn say(&self, result: Result<PathBuf, String>, asked: Option<Sender<Result<PathBuf, String>>>) {
        let mut report = lock(&self.from.handle.report);
        match &result {
            Ok(path) => {
                tracing::info!("recording written: {}", path.display());
                report.written += 1;
                (report.last, report.failure) = (Some(path.clone()), None);
            }
            Err(why) => {
                tracing::error!("{why}");
                report.failure = Some(why.clone());
            }
        }
        if let Some(asked) = asked {
            let _ = asked.send(result);
        }
    }
}

/// Wall-clock seconds, for names of files: people look for them by their own clock, also when time is simulated.
struct SystemSeconds;

impl SystemSeconds {
    fn now() -> i64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.ok().and_then(|d| i64::try_from(d.as_secs()).ok()).unwrap_or(0)
    }
}
