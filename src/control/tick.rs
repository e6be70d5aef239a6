//! The controller: one pure `tick` per period. It reads no clock, allocates nothing, takes no lock and logs nothing;
//! what it does is a function of its state and its input.

use super::chunk::ActionChunk;
use super::config::{ConfigError, ControlConfig, JointLimits, MissPolicy, Seam};
use super::curve::{Curve, coast, smooth, tangents};
use super::filter::{Bound, Breach};
use super::joints::{JointVector, MAX_JOINTS};
use super::mode::{Level, Mode};
use super::reason::{ChunkRefusal, InputHealth, Reason, Refusal};
use super::status::{ControlStatus, Counters, Interventions, PlanView, Rule};
use super::timeline::{Consumption, Gate, Pending};
use super::window::{Hermite, Window};
use crate::clock::{Monotonic, RosTime};

/// Share of one period's braking below which a joint counts as at rest.
const REST: f64 = 0.01;
/// Part of `dt` that the first segment of an adopted plan has at least.
const FIRST_SEGMENT: f64 = 0.25;

/// What the rest of the node can do for the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lifecycle {
    /// No policy.
    #[default]
    Unconfigured,
    /// A policy that is warming up, or a node that is inactive.
    Warmup,
    /// Inference runs.
    Ready,
    /// Inference, or another part that is needed, has failed.
    Failed,
}

/// What the operator asked for since the last tick. Stop wins over reset, disable over enable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Requests {
    /// Arm.
    pub enable: bool,
    /// Disarm.
    pub disable: bool,
    /// Stop, latched.
    pub stop: bool,
    /// Release a stop or a fault.
    pub reset: bool,
}

/// The newest joint state, merged from all its publishers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Positions in the controller's joint order, rad or m; NaN where none came.
    pub positions: JointVector,
    /// Age of each, in seconds: the larger of stamp age and arrival age; infinite where none came.
    pub ages: JointVector,
}

impl Measured {
    /// No joint state yet.
    pub fn missing(joints: usize) -> Self {
        Self { positions: JointVector::filled(joints, f64::NAN), ages: JointVector::filled(joints, f64::INFINITY) }
    }
}

/// Everything a tick depends on, beside the controller's own state.
#[derive(Debug, Clone, Copy)]
pub struct TickInput<'a> {
    /// ROS time of this tick: dates the plan and limits the rates.
    pub ros_now: RosTime,
    /// When the thread woke: only for the starvation timeout.
    pub mono_now: Monotonic,
    /// Whole periods that passed without a tick since the last one.
    pub skipped: u64,
    /// The newest joint state.
    pub measured: Measured,
    /// Cameras, prompt, outputs, inference.
    pub inputs: InputHealth,
    /// What the rest of the node can do.
    pub lifecycle: Lifecycle,
    /// A chunk that was not given before, if there is one. It is copied: nothing is freed on this thread.
    pub chunk: Option<&'a ActionChunk>,
    /// The operator's wishes.
    pub requests: Requests,
}

/// What became of the chunk given to a tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ChunkVerdict {
    /// It waits for its adoption.
    Accepted,
    /// It will not be executed.
    Refused(ChunkRefusal),
}

/// A plan that became the running one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adoption {
    /// Which chunk.
    pub sequence: u64,
    /// Its first actions that were already due.
    pub actions_skipped: usize,
    /// Largest joint difference between the new and the running plan now, before blending; rad or m.
    pub jump: f64,
    /// The joint that has it.
    pub joint: usize,
    /// Whether it started a motion from rest instead of replacing a running plan.
    pub from_rest: bool,
}

/// What one tick did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TickReport {
    /// Whether the window is to be published.
    pub published: bool,
    /// Mode before.
    pub previous: Mode,
    /// Mode after.
    pub mode: Mode,
    /// Why arming was refused, if it was asked for and refused.
    pub refusal: Option<Refusal>,
    /// What became of the chunk given.
    pub chunk: Option<ChunkVerdict>,
    /// A waiting chunk that had to be dropped at its turn.
    pub dropped: Option<ChunkRefusal>,
    /// A plan that was adopted.
    pub adoption: Option<Adoption>,
    /// A stop, disarming or starvation that began.
    pub stop: Option<Reason>,
}

/// Limits that cannot be taken over.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LimitsError {
    /// The robot may be moving.
    #[error("limits can only change while unarmed (mode is '{0}'): call ~/enable with false first")]
    Armed(Mode),
    /// A value cannot be used.
    #[error(transparent)]
    Value(#[from] ConfigError),
    /// No such joint.
    #[error("limits for {found} joints, expected {expected}")]
    Joints {
        /// Given.
        found: usize,
        /// The controller's.
        expected: usize,
    },
}

/// Position, velocity, plan time (seconds since the curve's start) and pace.
#[derive(Debug, Clone, Copy)]
struct State {
    q: [f64; MAX_JOINTS],
    v: [f64; MAX_JOINTS],
    x: f64,
    pace: f64,
}

/// The blend from where the motion began to the plan.
#[derive(Debug, Clone, Copy)]
struct Ramp {
    start: RosTime,
    span: f64,
    q: [f64; MAX_JOINTS],
    v: [f64; MAX_JOINTS],
}

#[derive(Debug, Clone, Copy)]
struct Plan {
    view: PlanView,
    oldest_image_stamp: RosTime,
}

/// The control core. See [`tick`](Self::tick).
#[derive(Debug, Clone)]
pub struct Controller {
    config: ControlConfig,
    bounds: Vec<Bound>,
    has_limits: bool,
    mode: Mode,
    reason: Option<Reason>,
    latched: bool,
    fault: bool,
    epoch: u64,
    last: Option<RosTime>,
    /// What the robot was told at the last published tick, and the window it was told.
    told: State,
    window: Window,
    /// Plan time and pace at each point of the window.
    progress: Vec<(f64, f64)>,
    curve: Curve,
    spare: Curve,
    plan: Option<Plan>,
    ramp: Option<Ramp>,
    gate: Gate,
    pending: Pending,
    consumption: Consumption,
    velocities: Vec<f64>,
    coasting_since: Option<Monotonic>,
    starved_long: bool,
    counters: Counters,
    interventions: Interventions,
    seam_jump: f64,
    seam_jump_max: f64,
    tracking_error: f64,
    tracking_error_max: f64,
}

impl Controller {
    /// A controller in mode `unconfigured`; all memory it will need is reserved here.
    pub fn new(config: ControlConfig) -> Result<Self, ConfigError> {
        config.check()?;
        let joints = config.joints.len();
        let window = Window::for_config(&config);
        let mut controller = Self {
            bounds: vec![Bound::default(); joints],
            has_limits: false,
            mode: Mode::Unconfigured,
            reason: None,
            latched: false,
            fault: false,
            epoch: 0,
            last: None,
            told: State { q: [0.0; MAX_JOINTS], v: [0.0; MAX_JOINTS], x: 0.0, pace: 0.0 },
            progress: Vec::with_capacity(config.window_points() + config.tail_points()),
            window,
            curve: Curve::with_room(joints, config.horizon + 1),
            spare: Curve::with_room(joints, config.horizon + 1),
            plan: None,
            ramp: None,
            gate: Gate::new(&config),
            pending: Pending::with_room(config.horizon * joints),
            consumption: Consumption::new(),
            velocities: vec![0.0; config.horizon * joints],
            coasting_since: None,
            starved_long: false,
            counters: Counters::default(),
            interventions: Interventions::default(),
            seam_jump: 0.0,
            seam_jump_max: 0.0,
            tracking_error: 0.0,
            tracking_error_max: 0.0,
            config,
        };
        controller.refresh_bounds();
        Ok(controller)
    }

    /// A window with room for everything this controller can publish.
    pub fn window(&self) -> Window {
        Window::for_config(&self.config)
    }

    /// The configuration in use.
    pub fn config(&self) -> &ControlConfig {
        &self.config
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Chunks of other epochs are refused.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Replaces the limits of all joints, only while nothing is published; allocates nothing.
    pub fn set_limits(&mut self, limits: &[Option<JointLimits>]) -> Result<(), LimitsError> {
        if self.mode.publishes() {
            return Err(LimitsError::Armed(self.mode));
        }
        if limits.len() != self.config.joints.len() {
            return Err(LimitsError::Joints { found: limits.len(), expected: self.config.joints.len() });
        }
        for (joint, l) in self.config.joints.iter().zip(limits) {
            if let Some(l) = l {
                l.check(&joint.name)?;
            }
        }
        for (joint, l) in self.config.joints.iter_mut().zip(limits) {
            joint.limits = *l;
        }
        self.refresh_bounds();
        Ok(())
    }

    /// Takes over what must survive a change of settings: epoch, counters, a latched stop or fault, and what was
    /// executed last. For a controller that stands in for `old` while nothing is published; allocates nothing.
    pub fn succeed(&mut self, old: &Controller) {
        self.mode = old.mode;
        self.reason = old.reason;
        (self.latched, self.fault) = (old.latched, old.fault);
        self.epoch = old.epoch;
        self.last = old.last;
        self.told = old.told;
        self.counters = old.counters;
        self.interventions = old.interventions;
        (self.seam_jump, self.seam_jump_max) = (old.seam_jump, old.seam_jump_max);
        (self.tracking_error, self.tracking_error_max) = (old.tracking_error, old.tracking_error_max);
        // Chunks cut for the old settings are not executed under the new ones.
        self.new_epoch();
    }

    fn refresh_bounds(&mut self) {
        self.has_limits = self.config.joints.iter().all(|j| j.limits.is_some());
        for j in 0..self.bounds.len() {
            self.bounds[j] = self.config.bound(j).unwrap_or_default();
        }
    }

    /// A snapshot of everything that can be asked, as of the last tick.
    pub fn status(&self) -> ControlStatus {
        let now = self.last.unwrap_or_default();
        let starved = if self.starved_long { Level::Error } else { Level::Ok };
        let level = match self.reason {
            Some(reason) if !matches!(self.mode, Mode::Ramp | Mode::Run) => {
                let own = if self.mode == Mode::Unconfigured { Level::Ok } else { self.mode.row().level };
                own.max(reason.level()).max(starved)
            }
            _ => self.mode.row().level,
        };
        ControlStatus {
            mode: self.mode,
            reason: self.reason,
            level,
            epoch: self.epoch,
            counters: self.counters,
            interventions: self.interventions,
            seam_jump_max: self.seam_jump_max,
            seam_jump: self.seam_jump,
            tracking_error_max: self.tracking_error_max,
            tracking_error: self.tracking_error,
            chunk_age: self.plan.map(|p| now.seconds_since(p.view.state_stamp)),
            image_age: self.plan.map(|p| now.seconds_since(p.oldest_image_stamp)),
            plan: self.plan.map(|p| PlanView {
                lag: now.seconds_since(p.view.adopted_at) - self.told.x,
                pace: self.told.pace,
                ..p.view
            }),
            command: JointVector::from_slice(&self.told.q[..self.bounds.len()]).unwrap_or_default(),
        }
    }

    /// One period: decides the mode, and writes into `out` what the robot is to be told, if anything. `out` comes
    /// from [`window`](Self::window); it is empty when nothing is to be published.
    pub fn tick(&mut self, input: &TickInput<'_>, out: &mut Window) -> TickReport {
        let now = input.ros_now;
        let mut report = TickReport {
            published: false,
            previous: self.mode,
            mode: self.mode,
            refusal: None,
            chunk: None,
            dropped: None,
            adoption: None,
            stop: None,
        };
        self.counters.ticks += 1 + input.skipped;
        self.counters.skipped += input.skipped;

        let (mut state, paused) = self.advance(now, input.skipped, &mut report);
        if input.requests.stop {
            self.latched = true;
            self.new_epoch();
            self.halt(Reason::StopRequested, &mut report);
        }
        if let Some(chunk) = input.chunk {
            report.chunk = Some(self.receive(chunk, now));
        }
        self.watch(input, paused, &mut state, &mut report);
        self.obey(input, &mut state, &mut report);
        if self.mode.armed() {
            self.follow(input, &mut state, &mut report);
        }
        let settled = self.mode.publishes() && self.publish(now, &state, out, &mut report);
        if settled || !self.mode.publishes() {
            self.enter(self.resting_mode(input.lifecycle));
        }
        if report.published {
            self.counters.published += 1;
        } else {
            self.counters.unarmed += 1;
            out.begin(now);
        }
        self.last = Some(now);
        report.mode = self.mode;
        report
    }

    /// From the last tick to now: where the robot is on what it was told, and what of the plan it consumed.
    fn advance(&mut self, now: RosTime, skipped: u64, report: &mut TickReport) -> (State, bool) {
        let elapsed_ns = self.last.map_or(0, |last| now.0.saturating_sub(last.0));
        let paused = self.last.is_some() && elapsed_ns == 0;
        self.counters.paused += u64::from(paused);
        if elapsed_ns < 0 {
            // The old dates mean nothing now; the robot was told at least the periods that passed.
            self.counters.clock_jumps += 1;
            self.consumption.restart(now);
            self.new_epoch();
            let state = self.told_after(self.config.period * (1 + skipped) as f64);
            self.halt(Reason::ClockJumpedBack { seconds: elapsed_ns as f64 * -1e-9 }, report);
            return (state, false);
        }
        let state = self.told_after(elapsed_ns as f64 * 1e-9);
        let used = if self.plan.is_some() { ((state.x - self.told.x) * 1e9).round() as i64 } else { 0 };
        self.consumption.advance(now, (elapsed_ns - used).max(0));
        (state, paused)
    }

    /// What the robot was told to do `elapsed` seconds after the last tick.
    fn told_after(&self, elapsed: f64) -> State {
        let n = self.bounds.len();
        let mut state = self.told;
        self.window.sample(&self.told.q[..n], &self.told.v[..n], elapsed, &mut state.q[..n], &mut state.v[..n]);
        for (q, b) in state.q.iter_mut().zip(&self.bounds) {
            *q = q.max(b.min).min(b.max);
        }
        let y = elapsed / self.config.period;
        if let Some(&last) = self.progress.last() {
            let at = |i: usize| if i == 0 { (self.told.x, self.told.pace) } else { self.progress[i - 1] };
            (state.x, state.pace) = if y >= self.progress.len() as f64 {
                last
            } else {
                let i = y.max(0.0) as usize;
                let ((x0, s0), (x1, s1), part) = (at(i), at(i + 1), y.max(0.0) - i as f64);
                (x0 + (x1 - x0) * part, s0 + (s1 - s0) * part)
            };
        }
        state
    }

    /// Takes or refuses a chunk that has just come.
    fn receive(&mut self, chunk: &ActionChunk, now: RosTime) -> ChunkVerdict {
        self.counters.chunks += 1;
        match self.gate.admit(chunk, self.epoch, now) {
            Ok(()) => {
                self.counters.superseded += u64::from(self.pending.replace(chunk));
                ChunkVerdict::Accepted
            }
            Err(refusal) => {
                self.counters.refused[refusal.kind()] += 1;
                ChunkVerdict::Refused(refusal)
            }
        }
    }

    /// Everything that ends a motion or a latch by itself.
    fn watch(&mut self, input: &TickInput<'_>, paused: bool, state: &mut State, report: &mut TickReport) {
        match input.lifecycle {
            Lifecycle::Failed if !self.fault => {
                self.fault = true;
                self.new_epoch();
                self.reason = Some(Reason::Failed);
                self.halt(Reason::Failed, report);
            }
            Lifecycle::Unconfigured | Lifecycle::Warmup => self.halt(Reason::Deactivated, report),
            _ => {}
        }
        if !self.mode.publishes() || paused {
            // While ROS time stands still nothing moves: ages mean nothing, and the last command is repeated.
            return;
        }
        let measured = &input.measured;
        let n = self.bounds.len();
        let usable = |j: usize| {
            let (q, age) = (measured.positions.get(j).copied(), measured.ages.get(j).copied());
            q.filter(|q| q.is_finite()).zip(age.filter(|age| !age.is_nan()))
        };
        let (mut worst, mut lost) = (0.0f64, None);
        for j in 0..n {
            match usable(j) {
                None => self.halt(Reason::StateMissing { joint: j }, report),
                Some((_, age)) if age > self.config.max_joint_state_age => {
                    self.halt(Reason::StateStale { joint: j, age, max: self.config.max_joint_state_age }, report);
                }
                Some((q, _)) => {
                    let error = (q - state.q[j]).abs();
                    worst = worst.max(error);
                    let max = self.config.joints[j].max_tracking_error;
                    if error > max && lost.is_none() {
                        lost = Some(Reason::TrackingError { joint: j, command: state.q[j], measured: q, max });
                    }
                }
            }
        }
        self.tracking_error = worst;
        self.tracking_error_max = self.tracking_error_max.max(worst);
        if let Some(reason) = lost {
            // The robot is not on the curve: hold where it is, not where it should be.
            for j in 0..n {
                if let Some((q, age)) = usable(j)
                    && age <= self.config.max_joint_state_age
                {
                    state.q[j] = q.max(self.bounds[j].min).min(self.bounds[j].max);
                }
            }
            state.v = [0.0; MAX_JOINTS];
            self.new_epoch();
            self.halt(reason, report);
        }
        if let InputHealth::Bad(fault) = input.inputs {
            self.halt(Reason::Input(fault), report);
        }
    }

    /// The operator's wishes.
    fn obey(&mut self, input: &TickInput<'_>, state: &mut State, report: &mut TickReport) {
        let r = input.requests;
        if r.disable {
            self.halt(Reason::Disabled, report);
        }
        if r.reset && !r.stop {
            self.latched = false;
            if input.lifecycle != Lifecycle::Failed {
                self.fault = false;
            }
            if !self.mode.publishes() {
                self.reason = None;
            }
        }
        if !self.mode.publishes() {
            self.enter(self.resting_mode(input.lifecycle));
        }
        if r.enable && !r.disable && !r.stop && !self.mode.armed() {
            match self.may_arm(input) {
                Err(refusal) => report.refusal = Some(refusal),
                Ok(()) => {
                    for (j, q) in input.measured.positions.iter().enumerate().take(self.bounds.len()) {
                        state.q[j] = *q;
                    }
                    state.v = [0.0; MAX_JOINTS];
                    (self.tracking_error, self.tracking_error_max) = (0.0, 0.0);
                    match self.adopt(input.ros_now, state) {
                        Ok(adoption) => {
                            self.reason = None;
                            report.adoption = Some(adoption);
                            self.enter(Mode::Ramp);
                        }
                        Err(refusal) => {
                            self.drop_pending(refusal, report);
                            report.refusal = Some(Refusal::Chunk(refusal));
                        }
                    }
                }
            }
        }
    }

    /// Whether arming is possible now; the first thing in the way.
    fn may_arm(&self, input: &TickInput<'_>) -> Result<(), Refusal> {
        if self.mode != Mode::Active {
            return Err(Refusal::Mode(self.mode));
        }
        if input.ros_now.0 <= 0 {
            return Err(Refusal::NoClock);
        }
        for (j, joint) in self.config.joints.iter().enumerate() {
            let Some(limits) = joint.limits else { return Err(Refusal::NoLimits { joint: j }) };
            let position = input.measured.positions.get(j).copied().unwrap_or(f64::NAN);
            let age = input.measured.ages.get(j).copied().unwrap_or(f64::NAN);
            if !position.is_finite() || age.is_nan() {
                return Err(Refusal::StateMissing { joint: j });
            }
            if age > self.config.max_joint_state_age {
                return Err(Refusal::StateStale { joint: j, age, max: self.config.max_joint_state_age });
            }
            if position < limits.min_position || position > limits.max_position {
                let (min, max) = (limits.min_position, limits.max_position);
                return Err(Refusal::OutsideLimits { joint: j, position, min, max });
            }
        }
        if let InputHealth::Bad(fault) = input.inputs {
            return Err(Refusal::Input(fault));
        }
        if !self.pending.present {
            return Err(Refusal::NoChunk);
        }
        self.gate.age(self.pending.state_stamp, input.ros_now).map_err(Refusal::Chunk)
    }

    /// Adopts what is due, and notices when the plan has run out.
    fn follow(&mut self, input: &TickInput<'_>, state: &mut State, report: &mut TickReport) {
        let now = input.ros_now;
        if self.mode == Mode::Ramp && self.ramp.is_none_or(|r| now.seconds_since(r.start) >= r.span) {
            self.ramp = None;
            self.enter(Mode::Run);
        }
        let exhausted = self.exhausted(state);
        let due = match &mut self.plan {
            Some(plan) => {
                let view = &mut plan.view;
                let late = now.seconds_since(view.next_adoption);
                let due = late >= 0.0;
                if due && !self.pending.present {
                    // It waits for the next point of the grid.
                    let steps = (late / view.dt).floor() + 1.0;
                    view.next_adoption = view.next_adoption.plus_seconds(steps * view.dt);
                }
                due || exhausted
            }
            None => true,
        };
        if due && self.pending.present {
            match self.gate.age(self.pending.state_stamp, now).and_then(|()| self.adopt(now, state)) {
                Ok(adoption) => {
                    report.adoption = Some(adoption);
                    self.coasting_since = None;
                    self.starved_long = false;
                    if self.mode == Mode::Coast {
                        self.reason = None;
                        let blend = self.crossfade();
                        let distant = self.ramp.is_some_and(|r| r.span > 1.001 * blend);
                        self.enter(if distant { Mode::Ramp } else { Mode::Run });
                    }
                    return;
                }
                Err(refusal) => self.drop_pending(refusal, report),
            }
        }
        if exhausted && self.mode != Mode::Coast {
            self.counters.starved += 1;
            match self.config.miss_policy {
                MissPolicy::Stop => self.halt(Reason::Starved, report),
                MissPolicy::Coast => {
                    self.plan = None;
                    self.ramp = None;
                    self.reason = Some(Reason::Starved);
                    report.stop = self.reason;
                    self.coasting_since = Some(input.mono_now);
                    self.enter(Mode::Coast);
                }
            }
        }
        if let Some(since) = self.coasting_since {
            self.starved_long = input.mono_now.seconds_since(since) > self.config.starvation_timeout;
        }
    }

    /// Whether less than a period of the plan is left.
    fn exhausted(&self, state: &State) -> bool {
        self.plan.is_none() || self.curve.end() - state.x < self.config.period * (1.0 - 1e-6)
    }

    fn crossfade(&self) -> f64 {
        self.config.crossfade_steps as f64 * self.config.dt
    }

    /// Makes the waiting chunk the running plan: dates it, blends it in, and plans the pace.
    fn adopt(&mut self, now: RosTime, state: &mut State) -> Result<Adoption, ChunkRefusal> {
        let (n, horizon, dt) = (self.bounds.len(), self.config.horizon, self.config.dt);
        let stamp = self.pending.state_stamp;
        let too_old = ChunkRefusal::TooOld { age: now.seconds_since(stamp), max: self.config.max_chunk_age };
        let lost = self.consumption.lost_since(stamp).ok_or(too_old)?;
        let origin = RosTime(stamp.0.saturating_add(lost));
        let used = now.seconds_since(origin);
        let late = used - (horizon - 1) as f64 * dt;
        let first_index = (used / dt + FIRST_SEGMENT).ceil().max(0.0) as usize;
        if late > -self.config.period || first_index >= horizon {
            return Err(ChunkRefusal::Past { late });
        }
        let first = first_index as f64 * dt - used;

        let crossfade = self.crossfade();
        // Past a limit there is no plan, only the limit.
        let positions = &mut self.pending.positions[..];
        for (j, b) in self.bounds.iter().enumerate() {
            let mut outside = false;
            for q in positions.iter_mut().skip(j).step_by(n) {
                outside |= *q < b.min || *q > b.max;
                *q = q.max(b.min).min(b.max);
            }
            if outside {
                self.interventions.count(j, Rule::Position);
            }
        }
        tangents(positions, n, dt, &self.bounds, &mut self.velocities);

        // Where the reference is now, and where the new plan is.
        let running = self.plan.is_some();
        let (mut q0, mut v0) = (state.q, state.v);
        if running {
            self.curve.sample(state.x, &self.bounds, &mut q0, &mut v0);
            v0.iter_mut().for_each(|v| *v *= state.pace);
        }
        let i = ((used / dt).max(0.0) as usize).min(horizon - 2);
        let basis = Hermite::at((used - i as f64 * dt).clamp(0.0, dt), dt);
        let (mut jump, mut joint, mut span) = (0.0f64, 0, 0.0f64);
        for j in 0..n {
            let (a, b) = (i * n + j, (i + 1) * n + j);
            let (q, _) = basis.eval(positions[a], self.velocities[a], positions[b], self.velocities[b]);
            let gap = (q - q0[j]).abs();
            if gap > jump {
                (jump, joint) = (gap, j);
            }
            // The blend moves by up to 1.5·gap/span and bends by up to 6·gap/span²: half of each limit at most.
            let bound = &self.bounds[j];
            span = span.max(3.0 * gap / bound.velocity).max((12.0 * gap / bound.acceleration).sqrt());
        }
        if !running {
            let least = if self.mode == Mode::Coast { crossfade } else { self.config.ramp_time };
            self.ramp = Some(Ramp { start: now, span: span.max(least).max(self.config.period), q: q0, v: v0 });
        }

        self.spare.begin(now, first, dt);
        if let Some((q, v)) = self.spare.push() {
            q.copy_from_slice(&q0[..n]);
            v.copy_from_slice(&v0[..n]);
        }
        let fade = if running && self.config.seam != Seam::None { crossfade } else { 0.0 };
        let (mut old_q, mut old_v) = (q0, v0);
        for k in first_index..horizon {
            let t = first + (k - first_index) as f64 * dt;
            let Some((q, v)) = self.spare.push() else { break };
            q.copy_from_slice(&positions[k * n..(k + 1) * n]);
            v.copy_from_slice(&self.velocities[k * n..(k + 1) * n]);
            if let Some(ramp) = &self.ramp {
                let since = t + now.seconds_since(ramp.start);
                let (w, dw) = smooth(since, ramp.span);
                if w < 1.0 {
                    for j in 0..n {
                        let (hold, drift) = coast(ramp.q[j], ramp.v[j], &self.bounds[j], since);
                        blend(&mut q[j], &mut v[j], hold, drift, w, dw);
                    }
                }
            }
            let (w, dw) = if fade > 0.0 { smooth(t, fade) } else { (1.0, 0.0) };
            if w < 1.0 {
                self.curve.sample(state.x + t, &self.bounds, &mut old_q, &mut old_v);
                for j in 0..n {
                    blend(&mut q[j], &mut v[j], old_q[j], old_v[j], w, dw);
                }
            }
            for (q, b) in q.iter_mut().zip(&self.bounds) {
                *q = q.max(b.min).min(b.max);
            }
        }
        self.spare.plan_pace(&self.bounds);
        std::mem::swap(&mut self.curve, &mut self.spare);
        (state.x, state.pace) = (0.0, 1.0);

        if running || self.mode == Mode::Coast {
            self.seam_jump = jump;
            self.seam_jump_max = self.seam_jump_max.max(jump);
        }
        self.counters.adopted += 1;
        self.pending.present = false;
        let current = (used / dt + 1e-9).floor().max(0.0);
        self.plan = Some(Plan {
            view: PlanView {
                sequence: self.pending.sequence,
                prompt_generation: self.pending.prompt_generation,
                state_stamp: stamp,
                origin,
                adopted_at: now,
                next_adoption: origin.plus_seconds((current + self.config.replan_steps as f64) * dt),
                dt,
                horizon,
                lag: 0.0,
                pace: 1.0,
            },
            oldest_image_stamp: self.pending.oldest_image_stamp,
        });
        Ok(Adoption {
            sequence: self.pending.sequence,
            actions_skipped: (used / dt - 1e-9).ceil().max(0.0) as usize,
            jump,
            joint,
            from_rest: !running,
        })
    }

    /// Simulates the filter over the window, lets it brake to rest, checks it, and hands it out. True if that was
    /// the last window of a stop.
    fn publish(&mut self, now: RosTime, state: &State, out: &mut Window, report: &mut TickReport) -> bool {
        let (n, h) = (self.bounds.len(), self.config.period);
        let at_rest = self.bounds.iter().zip(&state.v).all(|(b, v)| v.abs() <= REST * b.acceleration * h);
        self.told = *state;
        self.window.begin(now);
        self.progress.clear();
        let mut s = *state;
        for i in 0..self.config.window_points() {
            if self.exhausted(&s) {
                brake(&self.bounds, &mut s, h);
            } else {
                let tally = (i == 0).then_some(&mut self.interventions);
                step(&self.curve, &self.bounds, &mut s, h, tally);
            }
            self.window.push(&s.q[..n], &s.v[..n]);
            self.progress.push((s.x, s.pace));
        }
        self.window.mark_driven();
        while s.v[..n].iter().any(|v| *v != 0.0) && self.window.room() {
            brake(&self.bounds, &mut s, h);
            self.window.push(&s.q[..n], &s.v[..n]);
            self.progress.push((s.x, s.pace));
        }
        if let Some(joint) = self.breach() {
            // Not published: the robot brakes at the end of the window it has.
            self.fault = true;
            self.new_epoch();
            self.reason = Some(Reason::Internal { joint });
            report.stop = self.reason;
            self.plan = None;
            self.enter(Mode::Fault);
            return false;
        }
        out.copy_from(&self.window);
        report.published = true;
        self.mode == Mode::Stopping && at_rest
    }

    /// The last check, which knows nothing of how a window is made: the joint that fails it.
    fn breach(&self) -> Option<usize> {
        let last = self.window.points().checked_sub(1)?;
        for i in 0..=last {
            for (j, b) in self.bounds.iter().enumerate() {
                let (q, v) = (self.window.positions(i)[j], self.window.velocities(i)[j]);
                let inside = q >= b.min && q <= b.max && v.abs() <= b.velocity * (1.0 + 1e-6);
                // NaN is in no range.
                if !inside || (i == last && v != 0.0) {
                    return Some(j);
                }
            }
        }
        None
    }

    /// Leaves the policy: decelerate, disarmed.
    fn halt(&mut self, reason: Reason, report: &mut TickReport) {
        if !self.mode.armed() {
            // It is not moving by the policy. What is more serious than the present reason is still said.
            let heard = self.mode.publishes() || reason == Reason::StopRequested;
            let present = self.reason.map_or(Level::Ok, |r| r.level());
            let level = reason.level();
            if heard && (level > present || (reason == Reason::StopRequested && present < Level::Error)) {
                if self.reason != Some(reason) {
                    report.stop = Some(reason);
                }
                self.reason = Some(reason);
            }
            return;
        }
        self.plan = None;
        self.ramp = None;
        self.coasting_since = None;
        self.starved_long = false;
        self.reason = Some(reason);
        report.stop = Some(reason);
        self.enter(Mode::Stopping);
    }

    /// Invalidates every chunk that waits or is being computed.
    fn new_epoch(&mut self) {
        self.epoch += 1;
        self.gate.new_epoch();
        self.counters.discarded += u64::from(self.pending.present);
        self.pending.present = false;
    }

    fn drop_pending(&mut self, refusal: ChunkRefusal, report: &mut TickReport) {
        self.pending.present = false;
        self.counters.refused[refusal.kind()] += 1;
        report.dropped = Some(refusal);
    }

    /// The mode while nothing is published.
    fn resting_mode(&self, lifecycle: Lifecycle) -> Mode {
        match lifecycle {
            _ if self.fault => Mode::Fault,
            _ if self.latched => Mode::Stopped,
            Lifecycle::Unconfigured => Mode::Unconfigured,
            Lifecycle::Warmup => Mode::Warmup,
            Lifecycle::Ready => Mode::Active,
            Lifecycle::Failed => Mode::Fault,
        }
    }

    fn enter(&mut self, mode: Mode) {
        if mode != self.mode {
            debug_assert!(self.mode.row().next.contains(&mode), "{} to {mode} is not in the table", self.mode);
            self.mode = mode;
        }
    }
}

/// `(q, v)` becomes the blend from `(from, drift)` to itself with weight `w` and its derivative `dw`.
fn blend(q: &mut f64, v: &mut f64, from: f64, drift: f64, w: f64, dw: f64) {
    *v = drift + w * (*v - drift) + dw * (*q - from);
    *q = from + w * (*q - from);
}

/// One period of braking.
fn brake(bounds: &[Bound], s: &mut State, h: f64) {
    for (j, b) in bounds.iter().enumerate() {
        (s.q[j], s.v[j]) = b.brake(s.q[j], s.v[j], h);
    }
    s.pace = 0.0;
}

/// One period along the curve: at the highest pace that keeps all joints on it, else each joint on its own.
fn step(curve: &Curve, bounds: &[Bound], s: &mut State, h: f64, tally: Option<&mut Interventions>) {
    let (mut q, mut v) = ([0.0; MAX_JOINTS], [0.0; MAX_JOINTS]);
    let (cap, limiting) = curve.pace(s.x + s.pace.max(0.5) * h);
    let top = if s.pace == 1.0 && cap == 1.0 {
        curve.sample(s.x + h, bounds, &mut q, &mut v);
        if keeps(bounds, s, &q, &v, h) {
            return land(bounds, s, s.x + h, 1.0, &q, &v, h, tally, limiting);
        }
        1.0
    } else {
        cap
    };
    // The pace can change by what the joints' accelerations allow.
    curve.sample(s.x, bounds, &mut q, &mut v);
    let change = bounds.iter().zip(&v).map(|(b, v)| b.acceleration * h / v.abs().max(1e-12)).fold(1.0f64, f64::min);
    let high = top.min(s.pace + change);
    let low = (s.pace - change).max(0.0).min(high);
    for k in 0..=4 {
        let pace = high - (high - low) * 0.25 * f64::from(k);
        let x = s.x + 0.5 * (s.pace + pace) * h;
        curve.sample(x, bounds, &mut q, &mut v);
        v.iter_mut().for_each(|v| *v *= pace);
        if keeps(bounds, s, &q, &v, h) {
            return land(bounds, s, x, pace, &q, &v, h, tally, limiting);
        }
    }
    let x = s.x + 0.5 * (s.pace + high) * h;
    curve.sample(x, bounds, &mut q, &mut v);
    v.iter_mut().for_each(|v| *v *= high);
    land(bounds, s, x, high, &q, &v, h, tally, limiting);
}

/// Whether all joints can take the step within velocity and acceleration. Positions are each joint's own affair.
fn keeps(bounds: &[Bound], s: &State, q: &[f64], v: &[f64], h: f64) -> bool {
    bounds
        .iter()
        .enumerate()
        .all(|(j, b)| matches!(b.allows(s.q[j], s.v[j], q[j], v[j], h), Ok(()) | Err(Breach::Position)))
}

/// Takes the step: joints that may go to `(q, v)` do so untouched, the others approach it within their limits.
#[allow(clippy::too_many_arguments)]
fn land(
    bounds: &[Bound],
    s: &mut State,
    x: f64,
    pace: f64,
    q: &[f64],
    v: &[f64],
    h: f64,
    mut tally: Option<&mut Interventions>,
    limiting: usize,
) {
    if let Some(t) = tally.as_deref_mut().filter(|_| pace < 1.0) {
        t.count(limiting, Rule::Scaled);
    }
    for (j, b) in bounds.iter().enumerate() {
        match b.allows(s.q[j], s.v[j], q[j], v[j], h) {
            Ok(()) => (s.q[j], s.v[j]) = (q[j].max(b.min).min(b.max), v[j]),
            Err(breach) => {
                (s.q[j], s.v[j]) = b.approach(s.q[j], s.v[j], q[j], v[j], h);
                if let Some(t) = tally.as_deref_mut() {
                    t.count(
                        j,
                        match breach {
                            Breach::Velocity => Rule::Velocity,
                            Breach::Acceleration => Rule::Acceleration,
                            Breach::Position => Rule::Position,
                        },
                    );
                }
            }
        }
    }
    (s.x, s.pace) = (x, pace);
}
