//! The fault matrix: every part the control side depends on × every way it can fail, in virtual time through the real
//! slots, freshness rules, control loop, publisher and status ([`SteppedNode`]); and what must happen at the robot at
//! night. One table ([`table`]); in every row the rig checks each window for limits, each stop for its time and each
//! period for its account, and afterwards that nothing arms itself again.

mod control_common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use control_common::Played;
use pi0_mps::clock::{Clock, RosTime, VirtualClock};
use pi0_mps::control::*;
use pi0_mps::model::{Dims, Family, Frame, StackDims, VisionDims};
use pi0_mps::node::{Inputs, Outputs, Status, SteppedNode};
use pi0_mps::params::{Params, Settings, Value, yaml};

const PERIOD: f64 = 0.02;
const JOINTS: usize = 7;
/// Periods between frames of a camera, and between chunks.
const FRAMES: usize = 3;
const CHUNKS: usize = 5;
/// A pose inside the limits of config/robots/sim_arm.yaml, and how far the policy swings around it at 2 rad/s.
const HOME: [f64; JOINTS] = [0.0, -0.17, 1.45, 1.0, 0.0, 0.0, 0.0175];
const SWING: [f64; JOINTS] = [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.01];
/// Seconds before the fault, of the fault unless its row says otherwise, and after it.
const BEFORE: f64 = 4.0;
const DURING: f64 = 3.0;
const AFTER: f64 = 2.0;

fn settings(prompt: &str) -> Settings {
    let file = std::fs::read_to_string("config/robots/sim_arm.yaml").unwrap();
    let mut given = yaml::overrides(&file, "pi0_mps").unwrap();
    given.push(("checkpoint".into(), Value::String("/nowhere".into())));
    given.push(("prompt".into(), Value::String(prompt.into())));
    Params::from_overrides(given).unwrap().settings()
}

fn dims() -> Dims {
    let stack = StackDims { layers: 1, width: 8, mlp: 8, heads: 1, head_dim: 8 };
    Dims {
        family: Family::Pi0,
        vision: VisionDims { layers: 1, width: 8, mlp: 8, heads: 1, patch: 14, image: 224 },
        trunk: stack,
        expert: stack,
        vocab: 8,
        state_dim: 32,
        action_dim: 32,
        horizon: 50,
        max_tokens: 8,
        min_period: 0.004,
        max_period: 4.0,
    }
}

/// What is wrong in one period; the default is nothing.
#[derive(Clone)]
struct Faults {
    cameras: [CameraFault; 2],
    joints: JointFault,
    policy: PolicyFault,
    /// Published on ~/prompt in this period.
    prompt: Option<String>,
    /// The publisher thread does not return.
    blocked: bool,
    /// What is seen of the topics.
    output: Option<InputFault>,
    /// Seconds of ROS time in one period.
    elapsed: f64,
    /// Periods before this one in which the process did not run at all.
    stood_still: u64,
    /// The robot does not follow: a hardware stop.
    seized: bool,
    /// The policy's process has died.
    dead: bool,
}

#[derive(Clone, Default)]
struct CameraFault {
    silent: bool,
    same_picture: bool,
    unusable: bool,
    size: Option<usize>,
    zero_stamp: bool,
    /// Seconds added to its stamps.
    shift: f64,
}

#[derive(Clone, Default)]
struct JointFault {
    silent: bool,
    /// Arm and gripper come from publishers of their own.
    split: bool,
    /// Left out of the message.
    without: Option<usize>,
    same_values: bool,
    same_message: bool,
    /// Added to joint 2.
    error: f64,
    renamed: bool,
    zero_stamp: bool,
    shift: f64,
    /// Measured so long ago.
    delay: f64,
}

#[derive(Clone)]
struct PolicyFault {
    /// Periods between chunks, and from observation to hand-over.
    every: usize,
    latency: usize,
    lost: bool,
    /// The prompt it still follows is the one of so many generations ago.
    prompts_behind: u64,
    /// Its images do not change any more.
    same_images: bool,
    /// The last chunk again.
    again: bool,
    spoil: fn(&mut ActionChunk),
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            cameras: Default::default(),
            joints: JointFault::default(),
            policy: PolicyFault {
                every: CHUNKS,
                latency: 3,
                lost: false,
                prompts_behind: 0,
                same_images: false,
                again: false,
                spoil: |_| {},
            },
            prompt: None,
            blocked: false,
            output: None,
            elapsed: PERIOD,
            stood_still: 0,
            seized: false,
            dead: false,
        }
    }
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Window>>>);

impl Outputs for Recorder {
    fn trajectory(&mut self, window: &Window) {
        self.0.lock().unwrap().push(window.clone());
    }

    fn chunk(&mut self, _: &ActionChunk) {}
}

/// The node and the world around it, period by period.
struct Rig {
    clock: VirtualClock,
    node: SteppedNode,
    inputs: Inputs,
    config: ControlConfig,
    names: Vec<String>,
    out: Recorder,
    robot: Played,
    flying: Vec<(usize, ActionChunk)>,
    last_chunk: Option<ActionChunk>,
    sequence: u64,
    prompts: u64,
    prompt: String,
    images: RosTime,
    pictures: u8,
    joints: ([f64; JOINTS], RosTime),
    /// Windows computed and not yet taken by the publisher.
    queued: u64,
    /// Whether the newest window starts at the measured pose.
    restarted: bool,
    sent: u64,
    tick: usize,
    stopping: Option<RosTime>,
    late: bool,
    /// Since it was last cleared.
    seen: Seen,
}

#[derive(Default)]
struct Seen {
    modes: Vec<Mode>,
    statuses: Vec<Status>,
    windows: Vec<Window>,
}

impl Rig {
    fn new(prompt: &str) -> Self {
        let s = settings(prompt);
        let clock = VirtualClock::default();
        clock.advance(Duration::from_secs(1000));
        let out = Recorder::default();
        let node = SteppedNode::new(s.clone(), dims(), Arc::new(clock.clone()), Box::new(out.clone())).unwrap();
        node.set_lifecycle(Lifecycle::Ready);
        let names: Vec<String> = s.joints.iter().map(|j| j.name.clone()).collect();
        let mut config = ControlConfig::new(names.clone(), PERIOD, s.timing.dt(), 50);
        for (to, from) in config.joints.iter_mut().zip(&s.joints) {
            to.limits = from.limits;
        }
        config.stop_time = s.safety.stop_time.as_secs_f64();
        Self {
            robot: Played::hold(clock.ros(), &HOME, PERIOD),
            inputs: node.inputs(),
            node,
            clock,
            config,
            names,
            out,
            flying: Vec::new(),
            last_chunk: None,
            sequence: 0,
            prompts: 0,
            prompt: prompt.into(),
            images: RosTime(0),
            pictures: 0,
            joints: (HOME, RosTime(0)),
            queued: 0,
            restarted: false,
            sent: 0,
            tick: 0,
            stopping: None,
            late: false,
            seen: Seen::default(),
        }
    }

    fn mode(&self) -> Mode {
        self.node.control_status().mode
    }

    /// One period of everything.
    fn step(&mut self, f: &Faults) -> Option<TickReport> {
        self.tick += 1 + f.stood_still as usize;
        let before = self.clock.ros().plus_seconds(f.stood_still as f64 * PERIOD);
        self.clock.advance(Duration::from_secs_f64(PERIOD * (1 + f.stood_still) as f64));
        self.clock.set_ros(before.plus_seconds(f.elapsed));
        let now = self.clock.ros();
        if f.elapsed < 0.0 || f.seized {
            // The clock says nothing about the robot: it went on for a period; or a hardware stop has hold of it.
            let (q, _) = if f.seized {
                self.robot.at(before)
            } else {
                self.robot.after(before.seconds_since(self.robot.start) + PERIOD)
            };
            self.robot = Played::hold(now, &q, PERIOD);
        }
        self.inputs.outputs(f.output);
        self.hear_joints(f, now);
        for i in 0..2 {
            self.hear_camera(i, &f.cameras[i], now, f.elapsed);
        }
        if let Some(text) = &f.prompt {
            let taken = self.inputs.prompt(text).is_ok();
            assert_eq!(taken, !text.trim().is_empty());
            if taken && *text != self.prompt {
                self.prompts += 1;
                self.prompt.clone_from(text);
            }
        }
        if f.dead {
            self.node.fail_inference("the pi0_decoder thread panicked: see the log; restart the node");
        }
        self.think(&f.policy, now);
        let report = self.node.control(f.stood_still);
        if let Some(report) = report {
            self.queued += u64::from(report.published);
            self.restarted |= report.restarted;
            self.check_stop(&report, now, f.elapsed);
        }
        if f.blocked {
            self.late = true;
        } else {
            self.node.publish();
            self.take_windows(now, f.seized);
            self.late = false;
        }
        self.check_account();
        self.seen.modes.push(self.mode());
        report
    }

    fn hear_joints(&mut self, f: &Faults, now: RosTime) {
        let j = &f.joints;
        if j.silent || (f.elapsed == 0.0) {
            return;
        }
        let stamp = now.plus_seconds(-j.delay);
        if !j.same_values {
            let (q, _) = if j.delay > 0.0 { self.robot.at(stamp) } else { self.robot.at(now) };
            self.joints.0.copy_from_slice(&q);
        }
        if !j.same_message {
            self.joints.1 = if j.zero_stamp { RosTime(0) } else { stamp.plus_seconds(j.shift) };
        }
        let mut names = self.names.clone();
        let mut positions = self.joints.0.to_vec();
        positions[2] += j.error;
        if j.renamed {
            names[2] = "elbow_joint".into();
        }
        if let Some(i) = j.without {
            names.remove(i);
            positions.remove(i);
        }
        let arm = if j.split { 6 } else { names.len() };
        self.inputs.joints(self.joints.1, &names[..arm], &positions[..arm]);
        if names.len() > arm {
            self.inputs.joints(self.joints.1, &names[arm..], &positions[arm..]);
        }
    }

    fn hear_camera(&mut self, i: usize, f: &CameraFault, now: RosTime, elapsed: f64) {
        if f.silent || elapsed == 0.0 || !self.tick.is_multiple_of(FRAMES) {
            return;
        }
        let stamp = if f.zero_stamp { RosTime(0) } else { now.plus_seconds(f.shift) };
        if !f.same_picture {
            self.pictures = self.pictures.wrapping_add(1);
        }
        let picture = if f.same_picture { 0 } else { self.pictures };
        let side = f.size.unwrap_or(8);
        let encoding = if f.unusable { "32FC1" } else { "rgb8" };
        let frame = Frame::new(side, side, 3 * side, encoding, vec![picture; 3 * side * side]);
        assert_eq!(frame.is_err(), f.unusable);
        self.inputs.frame(i, stamp, frame);
    }

    /// What the stages would hand over.
    fn think(&mut self, f: &PolicyFault, now: RosTime) {
        if !f.same_images {
            self.images = now;
        }
        if self.tick.is_multiple_of(f.every) && !f.lost && now.0 > 0 {
            self.sequence += 1;
            let t0 = now.seconds_since(RosTime(0));
            let swing = |i: usize, j: usize| HOME[j] + SWING[j] * (2.0 * (t0 + i as f64 * self.config.dt)).sin();
            let mut chunk = ActionChunk {
                sequence: self.sequence,
                epoch: self.node.epoch(),
                prompt_generation: self.prompts.saturating_sub(f.prompts_behind),
                state_stamp: now,
                oldest_image_stamp: self.images,
                dt: self.config.dt,
                horizon: 50,
                joints: JOINTS,
                positions: (0..50 * JOINTS).map(|k| swing(k / JOINTS, k % JOINTS)).collect(),
                timing: ChunkTiming::default(),
            };
            (f.spoil)(&mut chunk);
            if let (true, Some(last)) = (f.again, &self.last_chunk) {
                chunk = last.clone();
            }
            self.flying.push((self.tick + f.latency, chunk));
        }
        while let Some(i) = self.flying.iter().position(|(due, _)| *due <= self.tick) {
            let (_, chunk) = self.flying.remove(i);
            self.last_chunk = Some(chunk.clone());
            // The stages count what finds no room.
            let _ = self.node.put_chunk(chunk);
        }
    }

    /// The robot plays what was sent, as a trajectory controller does, and every window is checked.
    fn take_windows(&mut self, now: RosTime, seized: bool) {
        let windows = std::mem::take(&mut *self.out.0.lock().unwrap());
        self.queued = 0;
        assert!(windows.len() <= 1, "a burst of {} windows", windows.len());
        let Some(w) = windows.into_iter().next() else { return };
        self.sent += 1;
        let (told, _) = w.now();
        let mut curve = Played::hold(w.start(), told, PERIOD);
        curve.v[0].copy_from_slice(w.now().1);
        curve.first = w.seconds_from_start(0);
        for i in 0..w.points() {
            curve.q.push(w.positions(i).to_vec());
            curve.v.push(w.velocities(i).to_vec());
        }
        assert!(curve.q.iter().chain(&curve.v).flatten().all(|x| x.is_finite()), "not finite");
        if let Some(what) = curve.violation(&self.config) {
            panic!("period {}: {what}", self.tick);
        }
        assert!(w.velocities(w.points() - 1).iter().all(|v| *v == 0.0), "a window ends at rest");
        // The robot is where this window says it is, unless it was just told of another place, or a few periods late.
        if !self.restarted && !seized {
            let (is, says) = (self.robot.at(now).0, curve.at(now).0);
            let most = if self.late { 0.02 } else { 1e-6 };
            for (j, (a, b)) in is.iter().zip(&says).enumerate() {
                assert!((a - b).abs() <= most, "period {}: joint {j} is at {a}, the window begins at {b}", self.tick);
            }
        }
        self.restarted = false;
        if !seized {
            self.robot = curve;
        }
        self.seen.windows.push(w);
    }

    /// A stop is complete within its time and one tick, by ROS time going forward.
    fn check_stop(&mut self, report: &TickReport, now: RosTime, elapsed: f64) {
        if report.mode != Mode::Stopping || elapsed < 0.0 {
            self.stopping = (report.mode == Mode::Stopping).then_some(now);
            return;
        }
        let since = *self.stopping.get_or_insert(now);
        let took = now.seconds_since(since) - elapsed;
        assert!(took <= self.config.stop_time + PERIOD + 1e-9, "stopping for {took} s");
    }

    /// Every period has exactly one outcome, and what is called published was sent or is on its way.
    fn check_account(&mut self) {
        let status = self.node.status();
        let value = |key: &str| -> u64 {
            status.values.iter().find(|(k, _)| k == key).unwrap_or_else(|| panic!("no '{key}'")).1.parse().unwrap()
        };
        let (published, skipped, unarmed) = (value("published"), value("skipped"), value("unarmed"));
        assert_eq!(value("ticks"), published + skipped + unarmed);
        assert_eq!(value("ticks"), self.tick as u64);
        assert_eq!(published, self.sent + self.queued, "published and not sent");
        let c = self.node.control_status().counters;
        let settled = c.adopted + c.superseded + c.refused_total() + c.discarded;
        assert!(c.chunks == settled || c.chunks == settled + 1, "{c:?}");
        self.seen.statuses.push(status);
    }

    /// So many seconds with what `inject` makes of the n-th period.
    fn run(&mut self, seconds: f64, inject: impl Fn(&mut Faults, usize)) {
        for n in 0..(seconds / PERIOD).round() as usize {
            let mut f = Faults::default();
            inject(&mut f, n);
            self.step(&f);
        }
    }

    /// Asks to arm; the reason if refused.
    fn enable(&mut self, f: &Faults) -> Result<TickReport, String> {
        self.node.ask(Requests { enable: true, ..Requests::default() });
        let report = self.step(f).expect("a tick");
        let topic = "~/arm/joint_trajectory".into();
        let names = Names {
            joints: self.names.clone(),
            cameras: vec!["base".into(), "wrist".into()],
            outputs: vec![OutputNames { name: "arm".into(), topic, others: Vec::new() }],
        };
        report.refusal.map_or(Ok(report), |r| Err(r.text(&names)))
    }

    /// Asks to arm as the service does; its answer.
    fn call_enable(&mut self, f: &Faults) -> Result<String, String> {
        let commands = self.node.commands();
        let answer = std::thread::spawn(move || commands.enable(true));
        while !answer.is_finished() {
            self.step(f);
            std::thread::sleep(Duration::from_micros(200));
        }
        answer.join().unwrap()
    }

    /// Armed and following the policy.
    fn moving() -> Self {
        let mut rig = Self::new("pick");
        rig.run(1.0, |_, _| {});
        rig.enable(&Faults::default()).unwrap();
        rig.run(BEFORE - 1.0, |_, _| {});
        assert_eq!(rig.mode(), Mode::Run);
        rig.seen = Seen::default();
        rig
    }

    fn at_rest(&self) -> bool {
        self.robot.at(self.clock.ros()).1.iter().all(|v| *v == 0.0)
    }

    /// The highest level of a diagnostic since the last clearing, and everything it said.
    fn said(&self, group: &str) -> (Level, String) {
        let mut level = Level::Ok;
        let mut words = String::new();
        for d in self.seen.statuses.iter().flat_map(|s| &s.diagnostics).filter(|d| d.name == group) {
            level = level.max(d.level);
            words += &d.message;
            words += "\n";
            d.values.iter().for_each(|(k, v)| words += &format!("{k} {v}\n"));
        }
        (level, words)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thing {
    Camera(usize),
    JointStates,
    Prompt,
    Encoder,
    Decoder,
    Clock,
    Publisher,
}

const THINGS: [Thing; 8] = [
    Thing::Camera(0),
    Thing::Camera(1),
    Thing::JointStates,
    Thing::Prompt,
    Thing::Encoder,
    Thing::Decoder,
    Thing::Clock,
    Thing::Publisher,
];

/// The kinds of faults, in PX4's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Off,
    Stuck,
    Garbage,
    Wrong,
    Slow,
    Delayed,
    Intermittent,
}

const KINDS: [Kind; 7] =
    [Kind::Off, Kind::Stuck, Kind::Garbage, Kind::Wrong, Kind::Slow, Kind::Delayed, Kind::Intermittent];

/// What the robot does during the fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Motion {
    /// It never moves: there is no arming.
    Never,
    /// It goes on.
    Continues,
    /// It decelerates to a hold, still armed, and goes on by itself after the fault.
    Coasts,
    /// It halts for want of a plan and goes on, more than once.
    Pauses,
    /// It decelerates to a stop and is disarmed.
    Stops,
    /// It gets the last command again; time stands still.
    Repeats,
    /// It brakes by itself at the end of the last window it got; disarmed as soon as the node can say so.
    Brakes,
}

use Kind::*;
use Level::{Error, Ok as Fine, Warn};
use Motion::*;
use Thing::*;

struct Row {
    thing: Thing,
    kind: Kind,
    /// What happens.
    what: &'static str,
    seconds: f64,
    inject: fn(&mut Faults, usize, usize),
    mode: Mode,
    motion: Motion,
    /// In the text of the status, or of the refusal to arm.
    says: &'static str,
    /// Diagnostic and the highest level it reaches.
    group: &'static str,
    level: Level,
    /// In its text or values.
    shows: &'static str,
}

/// `inject(faults of this period, camera, periods since the fault began)`.
type Inject = fn(&mut Faults, usize, usize);

/// Cells that no fault can fill.
const IMPOSSIBLE: [(Thing, Kind, &str); 1] =
    [(Publisher, Garbage, "a window is a value that only the controller can fill; its last check is a unit test")];

const OLD_CAMERA: &str = "ms old (limit 500 ms)";
const OLD_JOINT: &str = "ms old (limit 200 ms)";
const FOLLOWING: &str = "armed: following the policy";
const NOBODY: &str = "nobody listens to ~/arm/joint_trajectory, the topic of output 'arm'";
const CONTESTED: &str = "somebody else publishes on ~/arm/joint_trajectory, the topic of output 'arm': stop";
const STARVED: &str = "no action chunk in time";
const UNSENT: &str = "commands could not be sent in time and the robot braked by itself";

#[rustfmt::skip]
/// Every fault: what it is, and the mode, motion, text and diagnostic it must lead to.
fn table() -> Vec<Row> {
    let row = |thing, kind, what, seconds, inject: Inject, (mode, motion, says), (group, level, shows)| Row {
        thing, kind, what, seconds, inject, mode, motion, says, group, level, shows,
    };
    use Mode::{Active, Coast, Fault, Run};
    let mut rows = Vec::new();
    for c in [Camera(0), Camera(1)] {
        rows.extend([
            row(c, Off, "no frames", DURING, |f, c, _| f.cameras[c].silent = true,
                (Active, Stops, OLD_CAMERA), ("inputs", Error, OLD_CAMERA)),
            row(c, Stuck, "the same picture with fresh stamps", DURING, |f, c, _| f.cameras[c].same_picture = true,
                (Run, Continues, FOLLOWING), ("inputs", Warn, "frames are identical: frozen?")),
            row(c, Garbage, "an encoding that cannot be used", DURING, |f, c, _| f.cameras[c].unusable = true,
                (Active, Stops, "cannot be used"), ("inputs", Error, "encoding '32FC1' is not supported")),
            row(c, Wrong, "stamps of zero", DURING, |f, c, _| f.cameras[c].zero_stamp = true,
                (Run, Continues, FOLLOWING), ("inputs", Warn, "zero or in the future: judged by arrival")),
            row(c, Wrong, "a clock 3 s ahead", DURING, |f, c, _| f.cameras[c].shift = 3.0,
                (Run, Continues, FOLLOWING), ("inputs", Warn, "zero or in the future: judged by arrival")),
            row(c, Wrong, "a clock 3 s behind", DURING, |f, c, _| f.cameras[c].shift = -3.0,
                (Active, Stops, OLD_CAMERA), ("inputs", Error, OLD_CAMERA)),
            row(c, Wrong, "another camera's pictures: only their size tells", DURING, |f, c, _| f.cameras[c].size = Some(16),
                (Run, Continues, FOLLOWING), ("inputs", Fine, "16x16")),
            row(c, Slow, "3 Hz, within its age", DURING, |f, c, n| f.cameras[c].silent = n % 18 > 2,
                (Run, Continues, FOLLOWING), ("inputs", Fine, "all inputs fresh")),
            row(c, Slow, "1 Hz", DURING, |f, c, n| f.cameras[c].silent = n % 50 < 47,
                (Active, Stops, OLD_CAMERA), ("inputs", Error, OLD_CAMERA)),
            row(c, Delayed, "by 300 ms, within its age", DURING, |f, c, _| f.cameras[c].shift = -0.3,
                (Run, Continues, FOLLOWING), ("inputs", Fine, "all inputs fresh")),
            row(c, Delayed, "by 700 ms", DURING, |f, c, _| f.cameras[c].shift = -0.7,
                (Active, Stops, OLD_CAMERA), ("inputs", Error, OLD_CAMERA)),
            row(c, Intermittent, "gaps of 400 ms", DURING, |f, c, n| f.cameras[c].silent = n % 30 < 20,
                (Run, Continues, FOLLOWING), ("inputs", Fine, "all inputs fresh")),
            row(c, Intermittent, "every other frame unusable", DURING, |f, c, n| f.cameras[c].unusable = n / 3 % 2 == 0,
                (Run, Continues, FOLLOWING), ("inputs", Fine, "refused")),
        ]);
    }
    rows.extend([
        row(JointStates, Off, "no messages", DURING, |f, _, _| f.joints.silent = true,
            (Active, Stops, OLD_JOINT), ("inputs", Error, "position of joint 'shoulder_pan'")),
        row(JointStates, Stuck, "the same positions with fresh stamps", DURING, |f, _, _| f.joints.same_values = true,
            (Active, Stops, "was told"), ("control", Error, "apart")),
        row(JointStates, Stuck, "the same message again and again", DURING,
            |f, _, _| (f.joints.same_values, f.joints.same_message) = (true, true),
            (Active, Stops, OLD_JOINT), ("inputs", Error, OLD_JOINT)),
        row(JointStates, Garbage, "a NaN", DURING, |f, _, _| f.joints.error = f64::NAN,
            (Active, Stops, "no usable position of joint 'elbow'"), ("inputs", Error, "its position is NaN")),
        row(JointStates, Garbage, "an impossible position", DURING, |f, _, _| f.joints.error = 1e300,
            (Active, Stops, "joint 'elbow' was told"), ("control", Error, "apart")),
        row(JointStates, Wrong, "half a radian off", DURING, |f, _, _| f.joints.error = -0.5,
            (Active, Stops, "joint 'elbow' was told"), ("control", Error, "apart")),
        row(JointStates, Wrong, "another name", DURING, |f, _, _| f.joints.renamed = true,
            (Active, Stops, "position of joint 'elbow'"), ("inputs", Error, OLD_JOINT)),
        row(JointStates, Wrong, "stamps of zero", DURING, |f, _, _| f.joints.zero_stamp = true,
            (Run, Continues, FOLLOWING), ("inputs", Warn, "zero or in the future: judged by arrival")),
        row(JointStates, Wrong, "a clock 3 s ahead", DURING, |f, _, _| f.joints.shift = 3.0,
            (Run, Continues, FOLLOWING), ("inputs", Warn, "zero or in the future: judged by arrival")),
        row(JointStates, Slow, "10 Hz, within their age", DURING, |f, _, n| f.joints.silent = n % 5 != 0,
            (Run, Continues, FOLLOWING), ("inputs", Fine, "all inputs fresh")),
        row(JointStates, Slow, "4 Hz", DURING, |f, _, n| f.joints.silent = n % 13 != 0,
            (Active, Stops, OLD_JOINT), ("inputs", Error, OLD_JOINT)),
        row(JointStates, Delayed, "by 100 ms, within their age", DURING, |f, _, _| f.joints.delay = 0.1,
            (Run, Continues, FOLLOWING), ("inputs", Fine, "all inputs fresh")),
        row(JointStates, Delayed, "by 300 ms", DURING, |f, _, _| f.joints.delay = 0.3,
            (Active, Stops, OLD_JOINT), ("inputs", Error, OLD_JOINT)),
        row(JointStates, Intermittent, "one joint is missing for 160 ms at a time", DURING,
            |f, _, n| f.joints.without = (n % 10 < 8).then_some(3),
            (Run, Continues, FOLLOWING), ("inputs", Fine, "all inputs fresh")),
        row(JointStates, Intermittent, "one joint is missing for 400 ms at a time", DURING,
            |f, _, n| f.joints.without = (n % 25 < 20).then_some(3),
            (Active, Stops, "position of joint 'wrist_pitch'"), ("inputs", Error, OLD_JOINT)),

        row(Prompt, Off, "none from the start", DURING, |_, _, _| {},
            (Active, Motion::Never, "no prompt: set the parameter"), ("inputs", Warn, "no prompt")),
        row(Prompt, Stuck, "the same one again and again", DURING, |f, _, _| f.prompt = Some("pick".into()),
            (Run, Continues, FOLLOWING), ("inputs", Fine, "prompt pick")),
        row(Prompt, Garbage, "emptied: the old one stays", DURING, |f, _, _| f.prompt = Some(" \n".into()),
            (Run, Continues, FOLLOWING), ("inputs", Fine, "prompt pick")),
        row(Prompt, Wrong, "another task", DURING, |f, _, _| f.prompt = Some("fold the towel".into()),
            (Run, Continues, FOLLOWING), ("inputs", Fine, "prompt fold the towel")),
        row(Prompt, Slow, "chunks follow the old one for two seconds", DURING,
            |f, _, n| (f.prompt, f.policy.prompts_behind) = (Some("fold".into()), u64::from(n < 100)),
            (Run, Continues, FOLLOWING), ("inputs", Fine, "prompt fold")),
        row(Prompt, Delayed, "chunks of the old one after those of the new one", DURING,
            |f, _, n| (f.prompt, f.policy.prompts_behind) = (Some("fold".into()), u64::from(n % 10 < 5)),
            (Run, Continues, FOLLOWING), ("inference", Fine, "chunks_refused_old_prompt")),
        row(Prompt, Intermittent, "another one five times a second", DURING,
            |f, _, n| f.prompt = (n % 10 == 0).then(|| format!("task {n}")),
            (Run, Continues, FOLLOWING), ("inputs", Fine, "prompt task 140")),

        row(Encoder, Off, "hangs: no chunks", DURING, |f, _, _| f.policy.lost = true,
            (Coast, Coasts, STARVED), ("control", Warn, STARVED)),
        row(Encoder, Off, "hangs for longer than starvation may last", 6.0, |f, _, _| f.policy.lost = true,
            (Coast, Coasts, STARVED), ("control", Error, STARVED)),
        row(Encoder, Stuck, "the decoder goes on with its last images", 5.0, |f, _, _| f.policy.same_images = true,
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_images_too_old")),
        row(Encoder, Garbage, "NaN everywhere", DURING, |f, _, _| f.policy.spoil = |c| c.positions.fill(f64::NAN),
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_non_finite")),
        row(Encoder, Wrong, "plans far outside the limits", DURING,
            |f, _, _| f.policy.spoil = |c| c.positions.iter_mut().enumerate().for_each(|(k, q)| *q = if (k / JOINTS).is_multiple_of(2) { 1e3 } else { -1e3 }),
            (Run, Continues, FOLLOWING), ("safety", Fine, "elbow.position")),
        row(Encoder, Slow, "a chunk every 800 ms, 600 ms old", DURING, |f, _, _| (f.policy.every, f.policy.latency) = (40, 30),
            (Run, Continues, FOLLOWING), ("control", Fine, "mode run")),
        row(Encoder, Delayed, "chunks 2.4 s old", 5.0, |f, _, _| f.policy.latency = 120,
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_too_old")),
        row(Encoder, Intermittent, "two of three observations fail", DURING, |f, _, n| f.policy.lost = n / 5 % 3 != 0,
            (Run, Continues, FOLLOWING), ("control", Fine, "mode run")),

        row(Decoder, Off, "its thread has died", DURING, |f, _, _| f.dead = true,
            (Fault, Stops, "the pi0_decoder thread panicked"), ("control", Error, "panicked")),
        row(Decoder, Stuck, "the same chunk again and again", DURING, |f, _, _| f.policy.again = true,
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_sequence")),
        row(Decoder, Garbage, "infinite actions", DURING, |f, _, _| f.policy.spoil = |c| c.positions[80] = f64::INFINITY,
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_non_finite")),
        row(Decoder, Wrong, "another time step", DURING, |f, _, _| f.policy.spoil = |c| c.dt = 0.02,
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_time_step")),
        row(Decoder, Wrong, "another joint set", DURING, |f, _, _| f.policy.spoil = |c| c.joints = 8,
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_joints")),
        row(Decoder, Wrong, "fewer actions", DURING, |f, _, _| f.policy.spoil = |c| c.positions.truncate(7 * 30),
            (Coast, Coasts, STARVED), ("inference", Fine, "chunks_refused_horizon")),
        row(Decoder, Slow, "a chunk every 2.4 s", 9.6, |f, _, n| f.policy.lost = n % 120 > 4,
            (Coast, Pauses, STARVED), ("control", Warn, STARVED)),
        row(Decoder, Delayed, "chunks out of order", DURING,
            |f, _, n| f.policy.spoil = if n / 5 % 2 == 0 { |c| c.sequence -= 2 } else { |_| {} },
            (Run, Continues, FOLLOWING), ("inference", Fine, "chunks_refused_sequence")),
        row(Decoder, Intermittent, "a NaN now and then", DURING,
            |f, _, n| f.policy.spoil = if n / 5 % 3 == 0 { |c| c.positions[33] = f64::NAN } else { |_| {} },
            (Run, Continues, FOLLOWING), ("inference", Fine, "chunks_refused_non_finite")),

        row(Clock, Off, "/clock was never heard", DURING, |f, _, _| f.elapsed = 0.0,
            (Active, Motion::Never, "ROS time is not set"), ("control", Fine, "mode active")),
        row(Clock, Stuck, "paused", 1.0, |f, _, _| f.elapsed = 0.0,
            (Run, Repeats, FOLLOWING), ("control", Fine, "mode run")),
        row(Clock, Garbage, "to and fro", DURING, |f, _, n| if n % 25 == 0 { f.elapsed = -0.1 },
            (Active, Stops, "ROS time jumped back by 0.100 s"), ("control", Warn, "jumped back")),
        row(Clock, Wrong, "jumped back by 10 s", DURING, |f, _, n| if n == 0 { f.elapsed = -10.0 },
            (Active, Stops, "ROS time jumped back by 10.000 s"), ("control", Warn, "clock_jumps 1")),
        row(Clock, Wrong, "jumped forward by 10 s", DURING, |f, _, n| if n == 0 { f.elapsed = 10.0 },
            (Active, Stops, OLD_CAMERA), ("inputs", Error, OLD_CAMERA)),
        row(Clock, Wrong, "three times too fast", DURING, |f, _, _| f.elapsed = 3.0 * PERIOD,
            (Run, Continues, FOLLOWING), ("control", Fine, "mode run")),
        row(Clock, Slow, "at half its rate", DURING, |f, _, _| f.elapsed = 0.5 * PERIOD,
            (Run, Continues, FOLLOWING), ("control", Fine, "mode run")),
        row(Clock, Delayed, "300 ms behind all stamps", DURING,
            |f, _, _| (f.joints.shift, f.cameras[0].shift, f.cameras[1].shift) = (0.3, 0.3, 0.3),
            (Run, Continues, FOLLOWING), ("inputs", Warn, "zero or in the future")),
        row(Clock, Intermittent, "ticks ten times a second", DURING,
            |f, _, n| f.elapsed = if n % 5 == 4 { 5.0 * PERIOD } else { 0.0 },
            (Run, Continues, FOLLOWING), ("control", Fine, "mode run")),

        row(Publisher, Off, "does not return", DURING, |f, _, _| f.blocked = true,
            (Run, Brakes, "no command leaves the node"), ("control", Error, "publisher_blocked_ms 2920")),
        row(Publisher, Stuck, "blocked for 1 s", 2.0, |f, _, n| f.blocked = n < 50,
            (Active, Stops, UNSENT), ("control", Error, UNSENT)),
        row(Publisher, Wrong, "nobody listens", DURING,
            |f, _, _| f.output = Some(InputFault::OutputUnconnected { output: 0 }),
            (Active, Stops, NOBODY), ("safety", Warn, NOBODY)),
        row(Publisher, Wrong, "somebody else publishes on its topic", DURING,
            |f, _, _| f.output = Some(InputFault::OutputContested { output: 0 }),
            (Active, Stops, CONTESTED), ("safety", Warn, CONTESTED)),
        row(Publisher, Slow, "one window in three periods", DURING, |f, _, n| f.blocked = n % 3 != 2,
            (Run, Continues, FOLLOWING), ("control", Fine, "windows_not_sent 100")),
        row(Publisher, Delayed, "blocked for 100 ms", 1.0, |f, _, n| f.blocked = n < 5,
            (Run, Continues, FOLLOWING), ("control", Fine, "windows_not_sent 3")),
        row(Publisher, Intermittent, "blocked for 100 ms of 300 ms", DURING, |f, _, n| f.blocked = n % 15 < 5,
            (Run, Continues, FOLLOWING), ("control", Fine, "windows_not_sent 30")),
    ]);
    rows
}

/// One row; panics with what is wrong.
fn check(row: &Row) {
    let camera = if let Camera(i) = row.thing { i } else { 0 };
    if row.motion == Motion::Never {
        return check_no_start(row);
    }
    let mut rig = Rig::moving();
    rig.run(row.seconds, |f, n| (row.inject)(f, camera, n));
    check_texts(&rig, row);
    let modes = &rig.seen.modes;
    assert_eq!(rig.mode(), row.mode, "after {modes:?}");
    let armed = |m: &Mode| matches!(m, Mode::Ramp | Mode::Run);
    match row.motion {
        Motion::Never => unreachable!(),
        Continues => {
            assert!(modes.iter().all(armed), "{modes:?}");
            // It still swings: the robot is elsewhere at one time of the last second than at another.
            let windows = &rig.seen.windows;
            let pose = |w: &Window| w.now().0[2];
            let last = &windows[windows.len() - windows.len().min(15)..];
            let (low, high) = last.iter().map(pose).fold((f64::MAX, f64::MIN), |(l, h), q| (l.min(q), h.max(q)));
            assert!(high - low > 1e-3, "it stands still");
        }
        Coasts => {
            assert!(modes.iter().all(|m| armed(m) || *m == Mode::Coast), "{modes:?}");
            assert!(rig.at_rest());
        }
        Pauses => {
            let halts = modes.windows(2).filter(|w| w[0] != Mode::Coast && w[1] == Mode::Coast).count();
            assert!(halts > 1 && modes.iter().all(|m| armed(m) || *m == Mode::Coast), "{modes:?}");
        }
        Stops => {
            assert!(rig.at_rest());
            // Decelerated, not cut off: but where it is held in place, or has braked already.
            let held =
                ["was told", UNSENT].iter().any(|t| row.says.contains(t)) || row.what == "jumped forward by 10 s";
            assert!(held || modes.contains(&Mode::Stopping), "{modes:?}");
            let before = modes.iter().position(|m| !armed(m)).unwrap();
            assert!(modes[before..].iter().all(|m| !m.armed()), "armed itself again: {modes:?}");
        }
        Repeats => {
            let last = rig.seen.windows.first().unwrap();
            assert!(rig.seen.windows.iter().all(|w| w == last) && rig.seen.windows.len() == modes.len());
        }
        Brakes => assert!(rig.at_rest() && rig.seen.windows.is_empty()),
    }
    check_recovery(&mut rig, row);
}

fn check_texts(rig: &Rig, row: &Row) {
    let texts: Vec<&str> = rig.seen.statuses.iter().map(|s| s.message.as_str()).collect();
    if row.motion != Motion::Never {
        assert!(texts.iter().any(|t| t.contains(row.says)), "no status says '{}' but {:?}", row.says, texts.last());
    }
    let (level, words) = rig.said(row.group);
    assert!(words.contains(row.shows), "diagnostic '{}' never shows '{}':\n{}", row.group, row.shows, words);
    assert_eq!(level, row.level, "level of diagnostic '{}':\n{}", row.group, rig.seen.statuses.last().unwrap().message);
    if let Camera(i) = row.thing
        && row.motion == Stops
    {
        let name = ["camera 'base'", "camera 'wrist'"][i];
        assert!(texts.iter().any(|t| t.contains(name)), "no status names {name}");
    }
}

/// When the fault is over: what was coasting goes on, what was disarmed stays so until it is asked to arm.
fn check_recovery(rig: &mut Rig, row: &Row) {
    let disarmed = matches!(row.motion, Stops | Brakes);
    rig.run(AFTER, |_, _| {});
    if !disarmed {
        return assert_eq!(rig.mode(), Mode::Run);
    }
    assert!(!rig.mode().publishes(), "armed itself again");
    assert!(rig.at_rest());
    let answer = rig.enable(&Faults::default());
    if row.mode == Mode::Fault {
        return assert!(answer.is_err());
    }
    answer.unwrap();
    rig.run(AFTER, |_, _| {});
    assert_eq!(rig.mode(), Mode::Run);
}

/// Faults that are there from the start: no arming, with the reason; and arming once they are over.
fn check_no_start(row: &Row) {
    let mut rig = Rig::new(if row.thing == Prompt { "" } else { "pick" });
    if row.thing == Clock {
        rig.clock.set_ros(RosTime(0));
    }
    // Until everything else is there.
    rig.run(0.2, |f, n| (row.inject)(f, 0, n));
    rig.seen = Seen::default();
    rig.run(row.seconds, |f, n| (row.inject)(f, 0, n));
    assert_eq!(rig.mode(), row.mode);
    let mut f = Faults::default();
    (row.inject)(&mut f, 0, 0);
    let refusal = rig.enable(&f).unwrap_err();
    assert!(refusal.contains(row.says), "{refusal}");
    check_texts(&rig, row);
    assert_eq!(rig.sent, 0);
    let healthy = Faults { prompt: Some("pick".into()), ..Faults::default() };
    rig.run(AFTER, |f, n| {
        if n == 0 {
            *f = healthy.clone()
        }
    });
    rig.enable(&Faults::default()).unwrap();
}

#[test]
fn every_fault_leads_to_its_mode_motion_and_diagnostic() {
    let mut failed = Vec::new();
    for row in table() {
        if std::panic::catch_unwind(|| check(&row)).is_err() {
            failed.push(format!("{:?} {:?}: {}", row.thing, row.kind, row.what));
        }
    }
    assert!(failed.is_empty(), "{} rows failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn every_cell_of_the_matrix_has_a_row_or_a_reason() {
    let rows = table();
    for thing in THINGS {
        for kind in KINDS {
            let filled = rows.iter().any(|r| r.thing == thing && r.kind == kind);
            let impossible = IMPOSSIBLE.iter().any(|(t, k, _)| (*t, *k) == (thing, kind));
            assert!(filled != impossible, "{thing:?} {kind:?}");
        }
    }
}

// At the robot at 2 a.m.

#[test]
fn a_hardware_stop_disarms_and_arming_again_ramps_from_the_measured_pose() {
    let mut rig = Rig::moving();
    rig.run(1.5, |f, _| f.seized = true);
    assert_eq!(rig.mode(), Mode::Active, "stopped and disarmed long before the hardware stop is released");
    assert!(rig.seen.statuses.last().unwrap().message.contains("look for a hardware stop"));
    let stuck = rig.robot.at(rig.clock.ros()).0;
    rig.run(1.0, |_, _| {});
    assert_eq!(rig.robot.at(rig.clock.ros()).0, stuck, "the release moves nothing");
    let report = rig.enable(&Faults::default()).unwrap();
    assert!(report.restarted && report.mode == Mode::Ramp);
    let first = rig.seen.windows.last().unwrap();
    assert!(first.now().0.iter().zip(&stuck).all(|(a, b)| (a - b).abs() < 1e-12));
    rig.run(AFTER, |_, _| {});
    assert_eq!(rig.mode(), Mode::Run);
}

#[test]
fn a_controller_that_does_not_listen_or_a_second_publisher_forbids_arming_by_name() {
    let (nobody, contested) = (InputFault::OutputUnconnected { output: 0 }, InputFault::OutputContested { output: 0 });
    let alone = "nobody listens to /left/arm, the topic of output 'arm': activate its controller, or set outputs.arm.topic \
                 to the one it listens to";
    for (fault, others, says) in [
        (nobody, vec![], alone),
        (contested, vec![], "somebody else publishes on /left/arm, the topic of output 'arm': stop the other node"),
        (contested, vec!["/a", "/b"], "somebody else publishes on /left/arm, the topic of output 'arm': stop /a, /b"),
    ] {
        let mut rig = Rig::moving();
        rig.inputs.output_topic(0, "/left/arm", others.into_iter().map(String::from).collect());
        let wrong = Faults { output: Some(fault), ..Faults::default() };
        rig.run(1.0, |f, _| *f = wrong.clone());
        assert_eq!(rig.call_enable(&wrong).unwrap_err(), says);
        rig.run(1.0, |_, _| {});
        assert_eq!(rig.node.status().message, says, "once it is over, it still says why it stopped");
        assert!(rig.call_enable(&Faults::default()).unwrap().starts_with("armed: "));
    }
}

#[test]
fn the_summary_at_arming_lists_each_camera_with_size_rate_and_age() {
    let mut rig = Rig::new("pick");
    rig.run(1.0, |f, _| f.cameras[1].size = Some(16));
    let cameras = [CameraFault::default(), CameraFault { size: Some(16), ..Default::default() }];
    let summary = rig.call_enable(&Faults { cameras, ..Default::default() }).unwrap();
    assert!(summary.contains("base 8x8 at 16.7 Hz, "), "{summary}");
    assert!(summary.contains("wrist 16x16 at 16.7 Hz, ") && summary.contains(" ms old"), "{summary}");
    assert!(summary.contains("prompt 'pick'"), "{summary}");
}

#[test]
fn arming_outside_the_limits_is_refused_with_joint_value_and_limits() {
    let mut rig = Rig::new("pick");
    rig.run(1.0, |f, _| f.joints.error = 0.6);
    let wrong = Faults { joints: JointFault { error: 0.6, ..JointFault::default() }, ..Faults::default() };
    let refusal = rig.enable(&wrong).unwrap_err();
    assert!(refusal.contains("joint 'elbow' is at 2.0500, outside its limits 1.1000 to 1.8000"), "{refusal}");
    assert_eq!(rig.sent, 0);
}

#[test]
fn split_joint_states_are_merged_and_each_joint_has_its_age() {
    let mut rig = Rig::moving();
    rig.run(1.0, |f, _| f.joints.split = true);
    assert_eq!(rig.mode(), Mode::Run);
    rig.run(1.0, |f, _| (f.joints.split, f.joints.without) = (true, Some(6)));
    assert_eq!(rig.mode(), Mode::Active);
    let (_, words) = rig.said("inputs");
    assert!(words.contains("position of joint 'gripper' is"), "{words}");
    assert!(!words.contains("position of joint 'elbow'"), "{words}");
}

#[test]
fn a_whole_number_in_the_yaml_is_a_limit() {
    let file = std::fs::read_to_string("config/robots/sim_arm.yaml").unwrap();
    let (given, whole) = ("limits.elbow.max_velocity: 1.5", "limits.elbow.max_velocity: 2");
    assert!(file.contains(given));
    let mut values = yaml::overrides(&file.replace(given, whole), "pi0_mps").unwrap();
    values.push(("checkpoint".into(), Value::String("/nowhere".into())));
    let settings = Params::from_overrides(values).unwrap().settings();
    assert_eq!(settings.joints[2].limits.unwrap().max_velocity, 2.0);
}

#[test]
fn a_new_prompt_is_taken_while_moving_without_a_pause() {
    let mut rig = Rig::moving();
    let epoch = rig.node.epoch();
    rig.run(2.0, |f, n| {
        f.prompt = (n == 0).then(|| "fold the towel".into());
        // Prepared aside: for half a second the chunks still follow the old one.
        f.policy.prompts_behind = u64::from(n < 25);
    });
    assert!(rig.seen.modes.iter().all(|m| *m == Mode::Run), "{:?}", rig.seen.modes);
    assert_eq!(rig.seen.windows.len(), 100, "a window in every period");
    assert_eq!(rig.node.control_status().plan.unwrap().prompt_generation, 1);
    assert_eq!((rig.node.epoch(), rig.node.control_status().counters.refused_total()), (epoch, 0));
}

#[test]
fn a_process_that_stood_still_goes_on_from_where_the_robot_has_braked() {
    // What it hears first decides whether its own inputs are too old; a window that jumps fails either way.
    for (heard_first, mode) in [(true, Mode::Run), (false, Mode::Active)] {
        let mut rig = Rig::moving();
        let told = rig.robot.clone();
        let woken = Faults {
            stood_still: 74,
            joints: JointFault { silent: !heard_first, ..JointFault::default() },
            cameras: [(); 2].map(|()| CameraFault { silent: !heard_first, ..CameraFault::default() }),
            ..Faults::default()
        };
        let skipped = rig.node.control_status().counters.skipped;
        rig.step(&woken);
        assert_eq!(rig.node.control_status().counters.skipped, skipped + 74, "nothing is made up for");
        let first = rig.seen.windows.last().unwrap();
        let rest = told.after(60.0).0;
        assert!(first.now().0.iter().zip(&rest).all(|(a, b)| (a - b).abs() < 1e-9), "it begins where the robot is");
        assert!(first.now().1.iter().all(|v| *v == 0.0), "at rest");
        rig.run(AFTER, |_, _| {});
        assert_eq!(rig.mode(), mode, "heard first: {heard_first}; {:?}", rig.seen.modes);
    }
}

#[test]
fn when_the_process_is_killed_the_controller_brakes_at_the_end_of_the_window() {
    let rig = Rig::moving();
    // Nothing comes any more: the last window was checked for limits and an end at rest when it was sent.
    let killed = rig.clock.ros();
    assert!(rig.robot.at(killed).1.iter().any(|v| v.abs() > 0.05), "it moves");
    let last = rig.robot.after(60.0).0;
    let braked = killed.plus_seconds(0.2 + rig.config.stop_time + PERIOD);
    let (q, v) = rig.robot.at(braked);
    assert!(v.iter().all(|v| *v == 0.0) && q == last, "{v:?}");
    // The respawned node knows nothing of having been armed.
    let mut again = Rig::new("pick");
    again.run(3.0, |_, _| {});
    assert_eq!((again.mode(), again.sent), (Mode::Active, 0));
}
