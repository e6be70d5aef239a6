//! A virtual robot and an observer that knows nothing of how the controller works: it plays the published windows as a
//! trajectory controller does and checks every moment of what the robot is told.
#![allow(dead_code)]

use pi0_mps::clock::{Monotonic, RosTime};
use pi0_mps::control::*;

/// Checks are exact up to rounding: these are the allowances.
const REL: f64 = 1e-6;
const ABS: f64 = 1e-9;

/// Whether a value is past a limit; NaN is.
fn past(value: f64, limit: f64) -> bool {
    value.is_nan() || value > limit
}

pub fn limits(max_velocity: f64, max_acceleration: f64) -> Option<JointLimits> {
    Some(JointLimits { min_position: -1.5, max_position: 1.5, max_velocity, max_acceleration })
}

/// Two joints, 50 Hz, policy at 20 Hz, 20 actions, 2 rad/s, 8 rad/s².
pub fn config() -> ControlConfig {
    let mut c = ControlConfig::new(["shoulder".to_string(), "elbow".to_string()], 0.02, 0.05, 20);
    for joint in &mut c.joints {
        joint.limits = limits(2.0, 8.0);
        joint.max_tracking_error = 0.1;
    }
    c.ramp_time = 0.5;
    c.replan_steps = 6;
    c.crossfade_steps = 3;
    c
}

pub fn chunk(config: &ControlConfig, sequence: u64, stamp: RosTime, f: impl Fn(f64, usize) -> f64) -> ActionChunk {
    let joints = config.joints.len();
    let positions = (0..config.horizon * joints).map(|k| f((k / joints) as f64 * config.dt, k % joints)).collect();
    ActionChunk {
        sequence,
        epoch: 0,
        prompt_generation: 0,
        state_stamp: stamp,
        oldest_image_stamp: stamp,
        dt: config.dt,
        horizon: config.horizon,
        joints,
        positions,
        timing: ChunkTiming::default(),
    }
}

/// What the robot is playing: knots from `start` on, the first being where it was.
#[derive(Clone)]
pub struct Played {
    pub start: RosTime,
    /// Seconds to the second knot; further ones are `period` apart.
    pub first: f64,
    pub period: f64,
    pub q: Vec<Vec<f64>>,
    pub v: Vec<Vec<f64>>,
}

impl Played {
    pub fn hold(at: RosTime, q: &[f64], period: f64) -> Self {
        Self { start: at, first: period, period, q: vec![q.to_vec()], v: vec![vec![0.0; q.len()]] }
    }

    /// Position, velocity by cubic interpolation; the last knot for ever after.
    pub fn at(&self, t: RosTime) -> (Vec<f64>, Vec<f64>) {
        self.after(t.seconds_since(self.start).max(0.0))
    }

    /// As `at`, `x` seconds after its start.
    pub fn after(&self, x: f64) -> (Vec<f64>, Vec<f64>) {
        let (i, u) = if x < self.first {
            (0, x)
        } else {
            let i = ((x - self.first) / self.period).floor();
            (1 + i as usize, x - self.first - i * self.period)
        };
        if i + 1 >= self.q.len() {
            return (self.q.last().unwrap().clone(), self.v.last().unwrap().clone());
        }
        let mut q = Vec::new();
        let mut v = Vec::new();
        for j in 0..self.q[0].len() {
            let (c0, c1, c2, c3) = self.cubic(i, j);
            let s = u;
            q.push(c0 + s * (c1 + s * (c2 + s * c3)));
            v.push(c1 + s * (2.0 * c2 + 3.0 * s * c3));
        }
        (q, v)
    }

    fn length(&self, i: usize) -> f64 {
        if i == 0 { self.first } else { self.period }
    }

    fn cubic(&self, i: usize, j: usize) -> (f64, f64, f64, f64) {
        let (q0, q1, v0, v1, h) = (self.q[i][j], self.q[i + 1][j], self.v[i][j], self.v[i + 1][j], self.length(i));
        let d = (q1 - q0) / h;
        (q0, v0, (3.0 * d - 2.0 * v0 - v1) / h, (v0 + v1 - 2.0 * d) / (h * h))
    }

    /// The first thing on this curve that is past a limit, up to `until` knots.
    pub fn violation(&self, config: &ControlConfig) -> Option<String> {
        for j in 0..self.q[0].len() {
            let l = config.joints[j].limits.unwrap();
            let say = |what: &str, i: usize, value: f64, limit: f64| {
                Some(format!("joint {j}, segment {i} of {} s: {what} {value} past {limit}", self.length(i)))
            };
            for (i, q) in self.q.iter().enumerate() {
                // Published points are exactly inside; the first knot is where the robot is, by this file's arithmetic.
                let slack = if i == 0 { ABS } else { 0.0 };
                if !(q[j] >= l.min_position - slack && q[j] <= l.max_position + slack) {
                    return say("position", i, q[j], if q[j] > 0.0 { l.max_position } else { l.min_position });
                }
                if past(self.v[i][j].abs(), l.max_velocity * (1.0 + REL)) {
                    return say("velocity", i, self.v[i][j], l.max_velocity);
                }
            }
            for i in 0..self.q.len() - 1 {
                let (c0, c1, c2, c3) = self.cubic(i, j);
                let h = self.length(i);
                // Rounding of positions counts 1/h² in the acceleration.
                let slack = l.max_acceleration * REL + 1e-15 * (1.0 + c0.abs()) * 24.0 / (h * h);
                for s in [0.0, h] {
                    let a = 2.0 * c2 + 6.0 * s * c3;
                    if past(a.abs(), l.max_acceleration + slack) {
                        return say("acceleration", i, a, l.max_acceleration);
                    }
                }
                for k in 1..4 {
                    let s = h * f64::from(k) / 4.0;
                    let (q, v) = (c0 + s * (c1 + s * (c2 + s * c3)), c1 + s * (2.0 * c2 + 3.0 * s * c3));
                    if !(q >= l.min_position - ABS && q <= l.max_position + ABS) {
                        return say("position inside", i, q, l.max_position);
                    }
                    if past(v.abs(), l.max_velocity * (1.0 + REL)) {
                        return say("velocity inside", i, v, l.max_velocity);
                    }
                }
            }
        }
        None
    }
}

/// A controller, a robot that does what it is told, and the time.
pub struct World {
    pub controller: Controller,
    pub window: Window,
    pub robot: Played,
    pub now: RosTime,
    pub mono: Monotonic,
    pub sequence: u64,
    pub health: InputHealth,
    pub lifecycle: Lifecycle,
    /// Added to what is measured.
    pub disturbance: Vec<f64>,
    pub age: f64,
    pub skipped: u64,
    pub requests: Requests,
    last: RosTime,
    /// Sequence and epoch of the last chunk accepted.
    accepted: Option<(u64, u64)>,
}

impl World {
    pub fn new(config: ControlConfig) -> Self {
        let joints = config.joints.len();
        let controller = Controller::new(config).unwrap();
        let now = RosTime(1_000_000_000_000);
        Self {
            window: controller.window(),
            robot: Played::hold(now, &vec![0.0; joints], controller.config().period),
            controller,
            now,
            mono: Monotonic(5_000_000_000),
            sequence: 0,
            health: InputHealth::Ok,
            lifecycle: Lifecycle::Ready,
            disturbance: vec![0.0; joints],
            age: 0.005,
            skipped: 0,
            requests: Requests::default(),
            last: RosTime(0),
            accepted: None,
        }
    }

    pub fn config(&self) -> ControlConfig {
        self.controller.config().clone()
    }

    /// Other settings, as a parameter change brings them: a new controller that succeeds the old one. False if refused.
    pub fn change(&mut self, change: impl FnOnce(&mut ControlConfig)) -> bool {
        let mut config = self.config();
        change(&mut config);
        let mut next = Controller::new(config).unwrap();
        let taken = next.succeed(&self.controller);
        if taken {
            self.controller = next;
            self.account();
        }
        taken
    }

    /// A chunk of this epoch, observed now.
    pub fn observe(&mut self, f: impl Fn(f64, usize) -> f64) -> ActionChunk {
        self.sequence += 1;
        let mut c = chunk(self.controller.config(), self.sequence, self.now, f);
        c.epoch = self.controller.epoch();
        c
    }

    pub fn told(&self) -> (Vec<f64>, Vec<f64>) {
        self.robot.at(self.now)
    }

    /// Moves time by one period and ticks.
    pub fn step(&mut self, chunk: Option<&ActionChunk>) -> TickReport {
        self.wait(self.controller.config().period);
        self.tick(chunk)
    }

    pub fn wait(&mut self, seconds: f64) {
        self.now = self.now.plus_seconds(seconds);
        self.mono = self.mono.plus_seconds(seconds.max(0.0));
    }

    /// Ticks at the present time; requests last for one tick. Panics on any command past a limit.
    pub fn tick(&mut self, chunk: Option<&ActionChunk>) -> TickReport {
        // A clock that jumps back says nothing about the robot: it went on for the periods that passed.
        let jumped = self.now < self.last;
        let periods = self.controller.config().period * (1 + self.skipped) as f64;
        let (q, v) = if jumped { self.robot.after(periods) } else { self.told() };
        if jumped {
            self.robot = Played::hold(self.now, &q, self.robot.period);
        }
        self.last = self.now;
        let mut measured = Measured::missing(q.len());
        for (j, q) in q.iter().enumerate() {
            measured.positions[j] = q + self.disturbance[j];
            measured.ages[j] = self.age;
            // What is not a number of seconds has come at no time.
            measured.arrived[j] = Monotonic(self.mono.0 - (self.age.min(1e6) * 1e9).round() as i64);
        }
        let input = TickInput {
            ros_now: self.now,
            mono_now: self.mono,
            skipped: self.skipped,
            measured,
            inputs: self.health,
            lifecycle: self.lifecycle,
            chunk,
            requests: self.requests,
        };
        let epoch = self.controller.epoch();
        let before = self.controller.status().interventions;
        let report = self.controller.tick(&input, &mut self.window);
        self.requests = Requests::default();
        let after = self.controller.status().interventions;
        for j in 0..q.len() {
            for (rule, name) in Rule::ALL {
                // An adoption counts the joints whose actions it had to move inside, beside the step itself.
                let most = 1 + u64::from(rule == Rule::Position && report.adoption.is_some());
                assert!(after.of(j, rule) - before.of(j, rule) <= most, "{name} counted more than once");
            }
        }
        self.skipped = 0;
        self.account();
        if let (Some(c), Some(ChunkVerdict::Accepted)) = (chunk, report.chunk) {
            assert!(c.epoch >= epoch, "a chunk of an old epoch was accepted");
            self.accepted = Some((c.sequence, c.epoch));
        }
        if let Some(a) = report.adoption {
            assert_eq!(Some((a.sequence, self.controller.epoch())), self.accepted, "executed: sequence and epoch");
        }
        assert_eq!(report.published, self.window.points() > 0);
        assert_eq!(report.mode, self.controller.mode());
        if report.published {
            let config = self.controller.config();
            let w = &self.window;
            assert_eq!(w.start(), self.now);
            let mut played = Played::hold(self.now, &q, config.period);
            played.first = w.seconds_from_start(0);
            assert!(played.first > 0.0 && played.first <= config.period * (1.0 + 1e-6));
            played.v[0] = v.clone();
            if report.restarted {
                played.q[0] = self.controller.status().command.to_vec();
                played.v[0].fill(0.0);
            } else {
                // It continues what the robot was told, from where that is now.
                for j in 0..q.len() {
                    let (is, says) = ((q[j], v[j]), (w.now().0[j], w.now().1[j]));
                    let near =
                        !past((is.0 - says.0).abs(), ABS) && !past((is.1 - says.1).abs(), REL * (1.0 + is.1.abs()));
                    assert!(near, "joint {j} is at {is:?}, the window begins at {says:?} ({report:?})");
                }
            }
            for i in 0..w.points() {
                if i > 0 {
                    assert!(w.time_from_start(i) > w.time_from_start(i - 1));
                }
                played.q.push(w.positions(i).to_vec());
                played.v.push(w.velocities(i).to_vec());
            }
            if let Some(what) = played.violation(config) {
                panic!("at {:?} in mode {} ({report:?}): {what}", self.now, report.mode);
            }
            assert!(w.velocities(w.points() - 1).iter().all(|v| *v == 0.0), "a window ends at rest");
            self.robot = played;
        }
        report
    }

    /// Everything that came is counted exactly once.
    pub fn account(&self) {
        let c = self.controller.status().counters;
        assert_eq!(c.ticks, c.published + c.skipped + c.unarmed, "{c:?}");
        let settled = c.adopted + c.superseded + c.refused_total() + c.discarded;
        assert!(c.chunks == settled || c.chunks == settled + 1, "{c:?}");
    }

    /// Arms with a chunk that follows `f`; panics if refused.
    pub fn arm(&mut self, f: impl Fn(f64, usize) -> f64) -> TickReport {
        self.step(None);
        let c = self.observe(f);
        self.step(Some(&c));
        self.requests.enable = true;
        let report = self.step(None);
        assert_eq!(report.refusal, None);
        assert_eq!(report.mode, Mode::Ramp);
        report
    }

    /// Gives this chunk and ticks until one is adopted, at most 200 times.
    pub fn until_adopted(&mut self, chunk: &ActionChunk) -> Adoption {
        let mut adoption = self.step(Some(chunk)).adoption;
        for _ in 0..200 {
            adoption = adoption.or_else(|| self.step(None).adoption);
            if let Some(adoption) = adoption {
                return adoption;
            }
        }
        panic!("not adopted: {:?}", self.controller.status());
    }

    /// Ticks until the mode is reached, at most `ticks` times; returns the ticks taken.
    pub fn until(&mut self, mode: Mode, ticks: usize) -> usize {
        for i in 0..ticks {
            if self.controller.mode() == mode {
                return i;
            }
            self.step(None);
        }
        panic!("not in mode {mode} after {ticks} ticks but in {}", self.controller.mode());
    }
}
