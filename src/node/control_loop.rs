//! The control thread: a thin real-time shell round the pure [`Controller::tick`]. It allocates nothing, takes no
//! lock, logs nothing and never waits for the device; whatever it has to say goes out through slots and rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::Thread;

use crate::clock::{Clock, Monotonic, RosTime};
use crate::control::chunk::ActionChunk;
use crate::control::{
    ChunkVerdict, ControlStatus, Controller, InputFault, InputHealth, JointVector, Lifecycle, MAX_JOINTS, Measured,
    Mode, PlanTimes, PlanView, Refusal, Requests, TickInput, TickReport, TickTimes, Window,
};
use crate::pipeline::Retired;
use crate::pipeline::inputs::{InputSlots, JointSample};
use crate::rt::latest::{Reader, Writer};
use crate::rt::period::{Periodic, Wake};
use crate::rt::signals::{Epoch, RequestBits};

use super::publisher::Job;
use super::recorder::{TickRecord, TickTap};

/// What is wrong with an output, as one number that the control thread can read.
#[derive(Debug, Default)]
pub(super) struct OutputFault(AtomicU64);

impl OutputFault {
    /// Other faults than those of outputs count as none.
    pub fn set(&self, fault: Option<InputFault>) {
        let code = match fault {
            Some(InputFault::OutputUnconnected { output }) => 2 * output as u64 + 1,
            Some(InputFault::OutputContested { output }) => 2 * output as u64 + 2,
            _ => 0,
        };
        self.0.store(code, Ordering::Release);
    }

    pub fn get(&self) -> Option<InputFault> {
        let code = self.0.load(Ordering::Acquire).checked_sub(1)?;
        let output = usize::try_from(code / 2).ok()?;
        Some(if code % 2 == 0 {
            InputFault::OutputUnconnected { output }
        } else {
            InputFault::OutputContested { output }
        })
    }
}

/// What the rest of the node tells the control thread through plain atomics.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pub requests: RequestBits,
    pub lifecycle: AtomicU8,
    pub has_prompt: AtomicBool,
    pub inference_failed: AtomicBool,
    pub epoch: Arc<Epoch>,
    pub stopping: AtomicBool,
    /// Windows that counted as published when they were computed and were never sent.
    pub unsent: AtomicU64,
    pub outputs: OutputFault,
    /// The publisher let windows lapse: the robot has braked by itself and is not where it was to be told to be.
    pub adrift: AtomicBool,
}

impl Signals {
    pub fn set_lifecycle(&self, l: Lifecycle) {
        let code = match l {
            Lifecycle::Unconfigured => 0,
            Lifecycle::Warmup => 1,
            Lifecycle::Ready => 2,
            Lifecycle::Failed => 3,
        };
        self.lifecycle.store(code, Ordering::Release);
    }

    pub fn lifecycle(&self) -> Lifecycle {
        match self.lifecycle.load(Ordering::Acquire) {
            0 => Lifecycle::Unconfigured,
            1 => Lifecycle::Warmup,
            2 => Lifecycle::Ready,
            _ => Lifecycle::Failed,
        }
    }
}

/// What the control thread says after every tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Snapshot {
    pub status: ControlStatus,
    /// Ticks of the loop so far, skipped periods not counted: tells that a request was seen.
    pub turns: u64,
    /// Seconds since the loop began.
    pub seconds: f64,
    /// What became of the newest request to arm, and in which turn.
    pub answer: Option<(u64, Option<Refusal>)>,
    /// Periods since the publisher gave the last window back, while there is none: nothing leaves the node.
    pub blocked: u64,
}

/// Something that happened in a tick and that a person may want to read in the log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub report: TickReport,
    /// Sequence of the chunk concerned, if one was.
    pub chunk: Option<u64>,
}

/// A controller for other settings, on its way in; or the old one, on its way out to be freed.
pub(super) type ControllerBox = Box<Controller>;

/// Limits of freshness; they may change at any time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct InputRules {
    pub camera_max_age_ms: Vec<f64>,
    pub drop_lost_views: bool,
    /// Of a chunk to be adopted and of its images, seconds.
    pub max_chunk_age: f64,
    pub max_image_age: f64,
}

/// Everything the control thread owns.
pub(super) struct ControlLoop {
    pub controller: ControllerBox,
    pub clock: Arc<dyn Clock>,
    pub joints: Reader<JointSample>,
    pub inputs: Arc<InputSlots>,
    pub rules: Box<InputRules>,
    pub signals: Arc<Signals>,
    pub chunks: rtrb::Consumer<Arc<ActionChunk>>,
    pub retired: rtrb::Producer<Retired>,
    pub free: rtrb::Consumer<Box<Window>>,
    pub jobs: rtrb::Producer<Job>,
    /// Woken when there is something to publish.
    pub publisher: Option<Thread>,
    pub snapshot: Writer<Snapshot>,
    pub plan: Writer<Option<PlanView>>,
    pub events: rtrb::Producer<Event>,
    pub changes: rtrb::Consumer<Change>,
    pub discarded: rtrb::Producer<Change>,
    pub recorder: Option<TickTap>,
}

/// A change of settings, prepared elsewhere so that taking it over allocates and frees nothing.
pub(super) enum Change {
    /// Other control settings (only while nothing is published).
    Controller(ControllerBox),
    /// Other freshness rules.
    Rules(Box<InputRules>),
}

impl ControlLoop {
    /// Ticks until the node stops.
    pub fn run(mut self, mut periodic: Periodic) {
        let mut state = Turn::new(self.clock.monotonic());
        while !self.signals.stopping.load(Ordering::Acquire) {
            let wake = periodic.wait();
            self.period(&wake, &mut state);
        }
    }

    /// One period: a tick, if there is a window to write to. What it did, or `None`.
    pub fn period(&mut self, wake: &Wake, state: &mut Turn) -> Option<TickReport> {
        let Some(mut free) = state.window.take().or_else(|| self.free.pop().ok()) else {
            // Nowhere to write: this period is skipped, and said so.
            state.blocked += 1 + wake.skipped;
            self.tell(None, state);
            return None;
        };
        let report = self.turn(wake, &mut free, state);
        let skipped = wake.skipped + std::mem::take(&mut state.blocked);
        let times = TickTimes {
            scheduled: wake.scheduled,
            woke: wake.woke,
            computed: self.clock.monotonic(),
            published: None,
            plan: state.source.of(&report),
        };
        if report.published {
            // As many places as windows: this cannot fail.
            let _ = self.jobs.push(Job { window: free, times });
            if let Some(publisher) = &self.publisher {
                publisher.unpark();
            }
        } else {
            state.window = Some(free);
        }
        self.tell(Some((&report, &times, skipped)), state);
        Some(report)
    }

    fn turn(&mut self, wake: &Wake, window: &mut Window, state: &mut Turn) -> TickReport {
        let (ros_now, now) = (self.clock.ros(), wake.woke);
        state.ros = ros_now;
        let asked = self.signals.requests.take();
        // After the requests: limits that were set before the robot was armed are in force when it is.
        self.take_changes();
        let has = |bit| asked & bit != 0;
        state.turns += 1;
        // The newest chunk is given to the tick, the others are superseded before anybody saw them; all are freed
        // by the thread that made them.
        let mut chunk: Option<Arc<ActionChunk>> = None;
        let mut taken = now;
        while let Ok(newer) = self.chunks.pop() {
            taken = self.clock.monotonic();
            let older = chunk.replace(newer);
            state.superseded += u64::from(older.is_some());
            self.retire(older, taken);
        }
        let measured = self.measured(ros_now, now);
        state.measured = measured.positions;
        let inputs = self.health(ros_now, now);
        let report = self.controller.tick(
            &TickInput {
                ros_now,
                mono_now: now,
                skipped: wake.skipped + state.blocked,
                measured,
                inputs,
                lifecycle: self.signals.lifecycle(),
                chunk: chunk.as_deref(),
                requests: Requests {
                    enable: has(RequestBits::ENABLE),
                    disable: has(RequestBits::DISABLE),
                    stop: has(RequestBits::STOP),
                    reset: has(RequestBits::RESET),
                },
            },
            window,
        );
        if has(RequestBits::ENABLE) {
            state.answer = Some((state.turns, report.refusal));
        }
        state.chunk = chunk.as_ref().map(|c| c.sequence);
        state.source.follow(&report, chunk.as_deref());
        self.retire(chunk, taken);
        self.signals.epoch.set(self.controller.epoch());
        report
    }

    fn retire(&mut self, chunk: Option<Arc<ActionChunk>>, taken: Monotonic) {
        if let Some(Err(rtrb::PushError::Full(chunk))) = chunk.map(|chunk| self.retired.push(Retired { chunk, taken }))
        {
            // The decoder stands still; better a leak of one chunk than a free on this thread.
            std::mem::forget(chunk);
        }
    }

    fn measured(&mut self, ros_now: RosTime, now: Monotonic) -> Measured {
        let joints = self.joints.newest();
        let n = self.controller.config().joints.len().min(MAX_JOINTS);
        let mut ages = [f64::INFINITY; MAX_JOINTS];
        for (i, age) in ages[..n].iter_mut().enumerate() {
            *age = joints.age_ms(i, ros_now, now) * 1e-3;
        }
        match (JointVector::from_slice(&joints.positions[..n]), JointVector::from_slice(&ages[..n])) {
            (Some(positions), Some(ages)) => Measured { positions, ages, arrived: joints.arrived },
            _ => Measured::missing(n),
        }
    }

    /// The first thing that is wrong with publisher, outputs, inference, cameras or prompt.
    fn health(&self, ros_now: RosTime, now: Monotonic) -> InputHealth {
        if self.signals.adrift.swap(false, Ordering::AcqRel) {
            return InputHealth::Bad(InputFault::OutputBlocked);
        }
        if let Some(fault) = self.signals.outputs.get() {
            return InputHealth::Bad(fault);
        }
        if self.signals.inference_failed.load(Ordering::Acquire) {
            return InputHealth::Bad(InputFault::InferenceFailed);
        }
        let mut fresh = 0;
        let mut bad = None;
        for (camera, max) in self.rules.camera_max_age_ms.iter().enumerate() {
            let fault = self.inputs.freshness(camera).fault(camera, *max, ros_now, now);
            fresh += usize::from(fault.is_none());
            bad = bad.or(fault);
        }
        match bad {
            Some(fault) if fresh == 0 || !self.rules.drop_lost_views => InputHealth::Bad(fault),
            _ if !self.signals.has_prompt.load(Ordering::Acquire) => InputHealth::Bad(InputFault::PromptMissing),
            _ => InputHealth::Ok,
        }
    }

    fn take_changes(&mut self) {
        while let Ok(change) = self.changes.pop() {
            let old = match change {
                Change::Controller(mut next) => {
                    // Armed meanwhile: settings that need an unarmed node were checked before, so this is a lost race.
                    if next.succeed(&self.controller) {
                        std::mem::swap(&mut self.controller, &mut next);
                    }
                    Change::Controller(next)
                }
                Change::Rules(next) => {
                    self.controller.set_ages(next.max_chunk_age, next.max_image_age);
                    Change::Rules(std::mem::replace(&mut self.rules, next))
                }
            };
            if let Err(rtrb::PushError::Full(old)) = self.discarded.push(old) {
                std::mem::forget(old);
            }
        }
    }

    /// Says what a tick did, or that there was none.
    fn tell(&mut self, tick: Option<(&TickReport, &TickTimes, u64)>, state: &Turn) {
        let mut status = self.controller.status();
        status.counters.chunks += state.superseded;
        status.counters.superseded += state.superseded;
        status.counters.ticks += state.blocked;
        status.counters.skipped += state.blocked;
        self.plan.put(status.plan);
        self.snapshot.put(Snapshot {
            status,
            turns: state.turns,
            seconds: self.clock.monotonic().seconds_since(state.began),
            answer: state.answer,
            blocked: state.blocked,
        });
        let Some((report, times, skipped)) = tick else { return };
        if let Some(recorder) = &mut self.recorder {
            recorder.push(&status, |s| TickRecord {
                ros: state.ros,
                times: *times,
                skipped,
                report: *report,
                given: state.chunk,
                measured: state.measured,
                epoch: s.epoch,
                plan: s.plan.map(|p| p.sequence),
                interventions: s.interventions.total(),
                tracking_error: s.tracking_error,
                seam_jump: s.seam_jump,
                command: s.command,
            });
        }
        let news = report.mode != report.previous
            || report.refusal.is_some()
            || report.stop.is_some()
            || report.dropped.is_some()
            || matches!(report.chunk, Some(ChunkVerdict::Refused(_)));
        if news {
            // A full ring means that nobody reads the log.
            let _ = self.events.push(Event { report: *report, chunk: state.chunk });
        }
    }
}

/// What one turn of the loop leaves for the next.
#[derive(Debug)]
pub(super) struct Turn {
    began: Monotonic,
    turns: u64,
    /// A window that was not published: for the next tick.
    window: Option<Box<Window>>,
    /// Periods without a window since the last tick.
    blocked: u64,
    superseded: u64,
    answer: Option<(u64, Option<Refusal>)>,
    chunk: Option<u64>,
    source: Source,
    /// ROS time and measured positions of the last tick.
    ros: RosTime,
    measured: JointVector,
}

/// Which observation the commands are made from.
#[derive(Debug, Default)]
struct Source {
    /// Sequence and observation of the chunk that was accepted last.
    accepted: Option<(u64, Monotonic)>,
    /// Observation of the plan in execution.
    followed: Option<Monotonic>,
}

impl Source {
    /// Takes note of a tick and of the chunk it was given.
    fn follow(&mut self, report: &TickReport, chunk: Option<&ActionChunk>) {
        if let (Some(chunk), Some(ChunkVerdict::Accepted)) = (chunk, report.chunk) {
            self.accepted = Some((chunk.sequence, chunk.timing.observed));
        }
        if let Some(adoption) = report.adoption {
            // A chunk adopted was the last one accepted.
            self.followed = self.accepted.filter(|(s, _)| *s == adoption.sequence).map(|(_, observed)| observed);
        }
        if !matches!(report.mode, Mode::Ramp | Mode::Run) {
            self.followed = None;
        }
    }

    /// What the command of that tick was made from.
    fn of(&self, report: &TickReport) -> Option<PlanTimes> {
        self.followed.map(|observed| PlanTimes { observed, adopted: report.adoption.is_some() })
    }
}

impl Turn {
    /// Before the first one of a loop that begins at `began`.
    pub fn new(began: Monotonic) -> Self {
        Self {
            began,
            turns: 0,
            window: None,
            blocked: 0,
            superseded: 0,
            answer: None,
            chunk: None,
            source: Source::default(),
            ros: RosTime::default(),
            measured: JointVector::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Adoption, ChunkRefusal, ChunkTiming};

    /// A tick in `mode`: what came of the chunk it was given, and which one it adopted.
    fn tick(mode: Mode, verdict: Option<ChunkVerdict>, adopted: Option<u64>) -> TickReport {
        TickReport {
            published: mode.publishes(),
            previous: mode,
            mode,
            refusal: None,
            chunk: verdict,
            dropped: None,
            adoption: adopted.map(|sequence| Adoption {
                sequence,
                actions_skipped: 0,
                jump: 0.0,
                joint: 0,
                from_rest: false,
            }),
            stop: None,
            restarted: false,
        }
    }

    fn chunk(sequence: u64, observed: i64) -> ActionChunk {
        ActionChunk {
            sequence,
            epoch: 0,
            prompt_generation: 0,
            state_stamp: RosTime(1),
            oldest_image_stamp: RosTime(1),
            dt: 0.02,
            horizon: 0,
            joints: 0,
            positions: Vec::new(),
            timing: ChunkTiming { observed: Monotonic(observed), ..ChunkTiming::default() },
        }
    }

    #[test]
    fn a_command_is_dated_by_the_chunk_adopted_not_by_the_one_that_waits() {
        let mut source = Source::default();
        let mut of = |report: TickReport, chunk: Option<&ActionChunk>| {
            source.follow(&report, chunk);
            source.of(&report).map(|p| (p.observed.0, p.adopted))
        };
        let accepted = Some(ChunkVerdict::Accepted);
        let refused = Some(ChunkVerdict::Refused(ChunkRefusal::NoStamp));
        assert_eq!(of(tick(Mode::Active, accepted, None), Some(&chunk(1, 100))), None);
        assert_eq!(of(tick(Mode::Ramp, None, Some(1)), None), Some((100, true)));
        assert_eq!(of(tick(Mode::Run, accepted, None), Some(&chunk(2, 200))), Some((100, false)));
        assert_eq!(of(tick(Mode::Run, refused, Some(2)), Some(&chunk(3, 300))), Some((200, true)));
        assert_eq!(of(tick(Mode::Run, accepted, Some(4)), Some(&chunk(4, 400))), Some((400, true)));
        // Coasting and stopping follow no plan, and nothing of it comes back by itself.
        assert_eq!(of(tick(Mode::Coast, None, None), None), None);
        assert_eq!(of(tick(Mode::Run, None, None), None), None);
        // A chunk that is not known is not dated by guess.
        assert_eq!(of(tick(Mode::Run, None, Some(9)), None), None);
    }
}
