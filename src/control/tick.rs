//! The controller: one pure `tick` per period. It reads no clock, allocates nothing, takes no lock and logs nothing;
//! what it does is a function of its state and its input.

use super::adopt::{Plan, Ramp};
use super::chunk::ActionChunk;
use super::config::{ConfigError, ControlConfig};
use super::curve::Curve;
use super::filter::Bound;
use super::io::{ChunkVerdict, Lifecycle, Measured, TickInput, TickReport};
use super::joints::{JointVector, MAX_JOINTS};
use super::mode::{Level, Mode};
use super::pace::State;
use super::reason::{ChunkRefusal, InputFault, InputHealth, Reason, Refusal};
use super::status::{ControlStatus, Counters, Interventions, PlanView};
use super::timeline::{Consumption, Gate, Pending};
use super::window::Window;
use crate::clock::{Monotonic, RosTime};

/// Share of one period's braking below which a joint counts as at rest.
const REST: f64 = 0.01;
/// Where the robot is on what it was told, and the next point that it is promised.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Motion {
    pub(crate) here: State,
    pub(crate) base: State,
    /// Seconds from here to base.
    pub(crate) ahead: f64,
    /// Joints that are not where they were told to be.
    pub(crate) anew: [bool; MAX_JOINTS],
}

impl Motion {
    fn rest(q: JointVector) -> Self {
        Self { here: State::rest(q), base: State::rest(q), ahead: 0.0, anew: [false; MAX_JOINTS] }
    }
}

/// The control core. See [`tick`](Self::tick).
#[derive(Debug)]
pub struct Controller {
    pub(crate) config: ControlConfig,
    pub(crate) bounds: Vec<Bound>,
    pub(crate) mode: Mode,
    pub(crate) reason: Option<Reason>,
    latched: bool,
    fault: bool,
    epoch: u64,
    last: Option<RosTime>,
    /// What the robot was told at the last published tick.
    window: Window,
    /// Plan time and pace at the start of the window and at each of its points.
    progress: Vec<(f64, f64)>,
    pub(crate) curve: Curve,
    pub(crate) spare: Curve,
    pub(crate) plan: Option<Plan>,
    pub(crate) ramp: Option<Ramp>,
    pub(crate) gate: Gate,
    pub(crate) pending: Pending,
    pub(crate) consumption: Consumption,
    pub(crate) velocities: Vec<f64>,
    pub(crate) coasting_since: Option<Monotonic>,
    pub(crate) starved_long: bool,
    pub(crate) counters: Counters,
    pub(crate) interventions: Interventions,
    /// Start of the last step whose interventions were counted.
    counted: RosTime,
    pub(crate) seam_jump: f64,
    pub(crate) seam_jump_max: f64,
    tracking_error: f64,
    tracking_error_max: f64,
    /// Of each joint that was measured too far from its command: when that came. One measurement may be garbage; another
    /// one says that the joint is there.
    doubted: Vec<Option<Monotonic>>,
}

impl Controller {
    /// A controller in mode `unconfigured`; all memory it will need is reserved here.
    pub fn new(config: ControlConfig) -> Result<Self, ConfigError> {
        config.check()?;
        let joints = config.joints.len();
        let window = Window::for_config(&config);
        Ok(Self {
            // Without limits there is no arming, and nothing that would use these.
            bounds: (0..joints).map(|j| config.bound(j).unwrap_or_default()).collect(),
            mode: Mode::Unconfigured,
            reason: None,
            latched: false,
            fault: false,
            epoch: 0,
            last: None,
            progress: Vec::with_capacity(1 + Window::most_points(&config)),
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
            counted: RosTime(i64::MIN),
            seam_jump: 0.0,
            seam_jump_max: 0.0,
            tracking_error: 0.0,
            tracking_error_max: 0.0,
            doubted: vec![None; joints],
            config,
        })
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

    /// Takes over what must survive a change of settings: epoch, counters, a latched stop or fault, and what was
    /// executed last. For a controller that stands in for `old`, whose settings stay while something is published:
    /// then this does nothing and is false. Allocates nothing.
    #[must_use]
    pub fn succeed(&mut self, old: &Controller) -> bool {
        if old.mode.publishes() {
            return false;
        }
        self.mode = old.mode;
        self.reason = old.reason;
        (self.latched, self.fault) = (old.latched, old.fault);
        self.epoch = old.epoch;
        self.last = old.last;
        self.counters = old.counters;
        self.interventions = old.interventions;
        (self.seam_jump, self.seam_jump_max) = (old.seam_jump, old.seam_jump_max);
        (self.tracking_error, self.tracking_error_max) = (old.tracking_error, old.tracking_error_max);
        self.gate.succeed(&old.gate);
        self.window.succeed(&old.window);
        // Chunks cut for the old settings are not executed under the new ones.
        self.counters.discarded += u64::from(old.pending.present);
        self.new_epoch();
        true
    }

    /// How old a chunk and its images may be to be adopted, in seconds; at any time, since it only decides what is
    /// taken next. Allocates nothing.
    pub fn set_ages(&mut self, max_chunk_age: f64, max_image_age: f64) {
        (self.config.max_chunk_age, self.config.max_image_age) = (max_chunk_age, max_image_age);
        self.gate.set_ages(max_chunk_age, max_image_age);
    }

    /// A snapshot of everything that can be asked, as of the last tick.
    pub fn status(&self) -> ControlStatus {
        let now = self.last.unwrap_or_default();
        let starved = if self.starved_long { Level::Error } else { Level::Ok };
        // While it follows the policy there is no reason not to.
        let own = self.mode.row().level;
        let level = match self.reason {
            Some(reason) => {
                (if self.mode == Mode::Unconfigured { Level::Ok } else { own }).max(reason.level()).max(starved)
            }
            None => own,
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
                lag: now.seconds_since(p.view.adopted_at) - self.progress.first().map_or(0.0, |(x, _)| *x),
                pace: self.progress.first().map_or(0.0, |(_, pace)| *pace),
                ..p.view
            }),
            // Before the first window nothing was told.
            command: match self.window.points() {
                0 => JointVector::NONE,
                _ => JointVector::from_slice(self.window.now().0).unwrap_or_default(),
            },
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
            restarted: false,
        };
        self.counters.ticks = self.counters.ticks.saturating_add(input.skipped).saturating_add(1);
        self.counters.skipped = self.counters.skipped.saturating_add(input.skipped);

        let (mut motion, paused) = self.advance(now, input.skipped, &mut report);
        if input.requests.stop {
            self.latched = true;
            self.new_epoch();
            self.halt(Reason::StopRequested, &mut report);
        }
        if let Some(chunk) = input.chunk {
            report.chunk = Some(self.receive(chunk, now));
        }
        self.watch(input, paused, &mut motion, &mut report);
        self.obey(input, &mut motion, &mut report);
        if self.mode.armed() {
            self.follow(input, &mut motion, &mut report);
        }
        let settled = self.mode.publishes() && self.publish(now, &motion, out, &mut report);
        if settled || !self.mode.publishes() {
            self.enter(self.resting_mode(input.lifecycle));
        }
        if report.published {
            self.counters.published += 1;
        } else {
            self.counters.unarmed += 1;
            out.clear(now);
        }
        self.last = Some(now);
        report.mode = self.mode;
        report
    }

    /// From the last tick to now: where the robot is on what it was told, and what of the plan it consumed. Also
    /// whether ROS time stands still.
    fn advance(&mut self, now: RosTime, skipped: u64, report: &mut TickReport) -> (Motion, bool) {
        let elapsed_ns = self.last.map_or(0, |last| now.0.saturating_sub(last.0));
        let paused = self.last.is_some() && elapsed_ns == 0;
        self.counters.paused += u64::from(paused);
        if elapsed_ns < 0 {
            // The old dates mean nothing now; the robot went on for the periods that passed.
            self.counters.clock_jumps += 1;
            self.consumption.restart(now);
            self.counted = RosTime(i64::MIN);
            self.new_epoch();
            let motion = self.told_after(self.config.period * skipped.saturating_add(1) as f64);
            self.halt(Reason::ClockJumpedBack { seconds: elapsed_ns as f64 * -1e-9 }, report);
            return (motion, false);
        }
        let motion = self.told_after(elapsed_ns as f64 * 1e-9);
        let before = self.progress.first().map_or(0.0, |(x, _)| *x);
        let used = if self.plan.is_some() { ((motion.here.x - before) * 1e9).round() as i64 } else { 0 };
        self.consumption.advance(now, (elapsed_ns - used).max(0));
        (motion, paused)
    }

    /// Where the robot is `elapsed` seconds after the last window began, and what it is promised next.
    fn told_after(&self, elapsed: f64) -> Motion {
        let moment = self.window.moment(elapsed);
        let mut motion = Motion::rest(moment.q);
        motion.here.v = moment.v;
        for (q, b) in motion.here.q.iter_mut().zip(&self.bounds) {
            *q = q.max(b.min).min(b.max);
        }
        let at = |i: usize| self.progress.get(i).or(self.progress.last()).copied().unwrap_or_default();
        let Some((next, left)) = moment.ahead else {
            (motion.here.x, motion.here.pace) = at(usize::MAX);
            motion.base = motion.here;
            return motion;
        };
        let ((x0, pace0), (x1, pace1)) = (at(next), at(next + 1));
        (motion.here.x, motion.here.pace) = (x0 + (x1 - x0) * moment.part, pace0 + (pace1 - pace0) * moment.part);
        motion.base.q.copy_from_slice(self.window.positions(next));
        motion.base.v.copy_from_slice(self.window.velocities(next));
        (motion.base.x, motion.base.pace, motion.ahead) = (x1, pace1, left);
        motion
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
    fn watch(&mut self, input: &TickInput<'_>, paused: bool, motion: &mut Motion, report: &mut TickReport) {
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
            self.doubted.fill(None);
            return;
        }
        let measured = &input.measured;
        let n = self.bounds.len();
        let usable = |j: usize| {
            let (q, age) = (measured.positions.get(j).copied(), measured.ages.get(j).copied());
            q.filter(|q| q.is_finite()).zip(age.filter(|age| !age.is_nan()))
        };
        // Nothing was sent for so long that where it was measured is the better word for each joint that can be there.
        let adrift = input.inputs == InputHealth::Bad(InputFault::OutputBlocked);
        let (mut worst, mut sure) = (0.0f64, false);
        let mut there = [false; MAX_JOINTS];
        for (j, there) in there.iter_mut().enumerate().take(n) {
            let fresh = usable(j).filter(|(_, age)| *age <= self.config.max_joint_state_age);
            let doubted = self.doubted[j].take();
            let Some((q, _)) = fresh else {
                let reason = match usable(j) {
                    None => Reason::StateMissing { joint: j },
                    Some((_, age)) => Reason::StateStale { joint: j, age, max: self.config.max_joint_state_age },
                };
                self.halt(reason, report);
                continue;
            };
            let (command, max, b) = (motion.here.q[j], self.config.joints[j].max_tracking_error, self.bounds[j]);
            let error = (q - command).abs();
            worst = worst.max(error);
            *there = error <= max;
            if error > max {
                let arrived = measured.arrived[j];
                // Past a limit by more than that is no pose of this robot.
                if q >= b.min - max && q <= b.max + max {
                    *there = adrift || doubted.is_some_and(|first| arrived > first);
                    self.doubted[j] = Some(doubted.unwrap_or(arrived)).filter(|_| !*there);
                }
                sure |= *there;
                self.halt(Reason::TrackingError { joint: j, command, measured: q, max }, report);
            }
        }
        self.tracking_error = worst;
        self.tracking_error_max = self.tracking_error_max.max(worst);
        if sure || adrift {
            // The robot is not on the curve: hold where it is, not where it should be.
            let mut pose = motion.here.q;
            for j in (0..n).filter(|j| there[*j]) {
                pose[j] = measured.positions[j].max(self.bounds[j].min).min(self.bounds[j].max);
            }
            *motion = Motion { anew: there, ..Motion::rest(pose) };
            report.restarted = true;
            self.new_epoch();
        }
        if let InputHealth::Bad(fault) = input.inputs {
            self.halt(Reason::Input(fault), report);
        }
    }

    /// The operator's wishes.
    fn obey(&mut self, input: &TickInput<'_>, motion: &mut Motion, report: &mut TickReport) {
        let r = input.requests;
        if r.disable {
            self.halt(Reason::Disabled, report);
        }
        // Not while it still brakes: whoever is told that it is not released must find it latched.
        if r.reset && !r.stop && !self.mode.publishes() {
            self.latched = false;
            if input.lifecycle != Lifecycle::Failed {
                self.fault = false;
            }
            self.reason = None;
        }
        if !self.mode.publishes() {
            self.enter(self.resting_mode(input.lifecycle));
        }
        if r.enable && (r.disable || r.stop) {
            report.refusal = Some(Refusal::Mode(self.mode));
        } else if r.enable && !self.mode.armed() {
            match self.may_arm(input) {
                Err(refusal) => report.refusal = Some(refusal),
                Ok(()) => {
                    *motion = self.measured_rest(&input.measured);
                    self.doubted.fill(None);
                    (self.tracking_error, self.tracking_error_max) = (0.0, 0.0);
                    match self.adopt(input.ros_now, motion) {
                        Ok(adoption) => {
                            self.reason = None;
                            report.adoption = Some(adoption);
                            report.restarted = true;
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

    /// At rest where it was measured; within the limits.
    fn measured_rest(&self, measured: &Measured) -> Motion {
        let mut pose = measured.positions;
        for (q, b) in pose.iter_mut().zip(&self.bounds) {
            *q = q.max(b.min).min(b.max);
        }
        Motion { anew: [true; MAX_JOINTS], ..Motion::rest(pose) }
    }

    /// Whether arming is possible now; the first thing in the way.
    fn may_arm(&self, input: &TickInput<'_>) -> Result<(), Refusal> {
        if self.mode != Mode::Active {
            return Err(Refusal::Mode(self.mode));
        }
        if input.ros_now.0 <= 0 {
            return Err(Refusal::NoClock);
        }
        let joints = self.config.joints.len();
        if input.measured.positions.len() != joints {
            return Err(Refusal::StateMissing { joint: input.measured.positions.len().min(joints - 1) });
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
            // A joint at its stop is measured a little past it: by no more than one command may be away.
            let noise = self.bounds[j].velocity * self.config.period;
            if position < limits.min_position - noise || position > limits.max_position + noise {
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
        self.pending.age(&self.gate, input.ros_now).map_err(Refusal::Chunk)
    }

    /// Simulates the filter over the window, lets it brake to rest, checks it, and hands it out. True if that was
    /// the last window of a stop.
    fn publish(&mut self, now: RosTime, motion: &Motion, out: &mut Window, report: &mut TickReport) -> bool {
        let h = self.config.period;
        let Motion { here, base, ahead, anew } = motion;
        let still = |v: &[f64]| self.bounds.iter().zip(v).all(|(b, v)| v.abs() <= REST * b.acceleration * h);
        let at_rest = still(&here.v) && still(&base.v);
        self.window.begin(now, &here.q, &here.v, anew);
        self.progress.clear();
        self.progress.push((here.x, here.pace));
        let mut points = self.config.window_points();
        if *ahead > 0.0 {
            self.window.promised(*ahead, &base.q, &base.v);
            self.progress.push((base.x, base.pace));
            // A whole period ahead it is the first point of the window, otherwise it comes before.
            points -= usize::from(*ahead > 0.999 * h);
        }
        let begins = now.plus_seconds(*ahead);
        let fresh = begins.seconds_since(self.counted) > 0.5 * h;
        let mut s = *base;
        for i in 0..points {
            if self.exhausted(&s) {
                s.brake(&self.bounds, h);
            } else {
                let tally = (i == 0 && fresh).then_some(&mut self.interventions);
                s.follow(&self.curve, &self.bounds, h, tally);
            }
            self.window.push(&s.q, &s.v);
            self.progress.push((s.x, s.pace));
        }
        if fresh {
            self.counted = begins;
        }
        self.window.mark_driven();
        while s.v.iter().any(|v| *v != 0.0) && self.window.room() {
            s.brake(&self.bounds, h);
            self.window.push(&s.q, &s.v);
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
        self.window.complete();
        out.copy_from(&self.window);
        report.published = true;
        // What is in doubt is settled first: the pose that is held last should be the robot's.
        self.mode == Mode::Stopping && at_rest && self.doubted.iter().all(Option::is_none)
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
    pub(crate) fn halt(&mut self, reason: Reason, report: &mut TickReport) {
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

    pub(crate) fn drop_pending(&mut self, refusal: ChunkRefusal, report: &mut TickReport) {
        self.pending.present = false;
        self.counters.refused[refusal.kind()] += 1;
        report.dropped = Some((self.pending.sequence, refusal));
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

    pub(crate) fn enter(&mut self, mode: Mode) {
        if mode != self.mode {
            debug_assert!(self.mode.row().next.contains(&mode), "{} to {mode} is not in the table", self.mode);
            self.mode = mode;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ChunkTiming, JointLimits, Measured, Requests, Seam};
    use super::*;

    /// Never needed so far: what the controller fills a window with keeps every rule.
    #[test]
    fn the_last_check_finds_what_must_not_leave() {
        let limits = JointLimits { min_position: -1.5, max_position: 1.5, max_velocity: 2.0, max_acceleration: 8.0 };
        let mut config = ControlConfig::new(["a".to_string(), "b".to_string()], 0.02, 0.05, 20);
        config.joints.iter_mut().for_each(|j| j.limits = Some(limits));
        let mut controller = Controller::new(config).unwrap();
        let rest = ([0.0, 0.0], [0.0, 0.0]);
        for (q, v, last, breach) in [
            ([0.0, 0.0], [0.0, 0.0], rest, None),
            ([1.5, -1.5], [2.0, -2.0], rest, None),
            ([0.0, 1.5001], [0.0, 0.0], rest, Some(1)),
            ([-1.5001, 0.0], [0.0, 0.0], rest, Some(0)),
            ([0.0, 0.0], [0.0, 2.001], rest, Some(1)),
            ([0.0, 0.0], [-2.001, 0.0], rest, Some(0)),
            ([f64::NAN, 0.0], [0.0, 0.0], rest, Some(0)),
            ([0.0, 0.0], [0.0, f64::NAN], rest, Some(1)),
            ([0.0, 0.0], [0.0, 0.0], ([0.0, 0.0], [0.0, 1e-9]), Some(1)),
            ([0.0, 0.0], [0.0, 0.0], ([2.0, 0.0], [0.0, 0.0]), Some(0)),
        ] {
            controller.window.begin(RosTime(1), &[0.0, 0.0], &[0.0, 0.0], &[true; MAX_JOINTS]);
            controller.window.push(&q, &v);
            controller.window.push(&last.0, &last.1);
            assert_eq!(controller.breach(), breach, "{q:?} {v:?}, then {last:?}");
        }
        controller.window.clear(RosTime(1));
        assert_eq!(controller.breach(), None, "nothing leaves");
    }

    /// Whatever the phase of the seam on either grid, however late, slowed or blended: no jump, no kink.
    #[test]
    fn a_new_reference_goes_on_where_the_old_one_was_and_as_fast() {
        let limits = JointLimits { min_position: -1.5, max_position: 1.5, max_velocity: 2.0, max_acceleration: 8.0 };
        for seam in [Seam::None, Seam::Crossfade] {
            let mut config = ControlConfig::new(["a".to_string(), "b".to_string()], 0.02, 0.05, 20);
            config.joints.iter_mut().for_each(|j| (j.limits, j.max_tracking_error) = (Some(limits), 10.0));
            (config.seam, config.replan_steps) = (seam, 5);
            let mut controller = Controller::new(config).unwrap();
            let mut out = controller.window();
            let (mut now, mut last) = (RosTime(1_000_000_000_000), RosTime(1_000_000_000_000));
            let mut pose = JointVector::zeros(2);
            let (mut adopted, mut between) = (0, 0);
            for tick in 0..2000u64 {
                // Ticks are early and late: the seam is at any phase of the grid of the chunks.
                now = now.plus_seconds([0.02, 0.017, 0.0237, 0.0191][tick as usize % 4]);
                let wave = |k: usize| 0.4 * (2.0 * (now.seconds_since(RosTime(0)) + (k / 2) as f64 * 0.05)).sin();
                // Of two chunks one leads elsewhere: there is a jump to be blended, and a pace to be lowered.
                let aside = if tick / 50 % 2 == 0 { 0.2 } else { 0.0 };
                let chunk = ActionChunk {
                    sequence: tick + 1,
                    epoch: controller.epoch(),
                    prompt_generation: 0,
                    state_stamp: now,
                    oldest_image_stamp: now,
                    dt: 0.05,
                    horizon: 20,
                    joints: 2,
                    positions: (0..40).map(|k| wave(k) + aside).collect(),
                    timing: ChunkTiming::default(),
                };
                let input = TickInput {
                    ros_now: now,
                    mono_now: Monotonic(now.0),
                    skipped: 0,
                    measured: Measured {
                        positions: pose,
                        ages: JointVector::zeros(2),
                        arrived: [Monotonic(now.0); MAX_JOINTS],
                    },
                    inputs: InputHealth::Ok,
                    lifecycle: Lifecycle::Ready,
                    chunk: (tick % 3 == 0).then_some(&chunk),
                    requests: Requests { enable: tick == 5, ..Requests::default() },
                };
                let old = controller.curve.clone();
                let base = controller.told_after(now.seconds_since(last)).base;
                last = now;
                let report = controller.tick(&input, &mut out);
                if report.published {
                    pose = out.sample(0.02).0;
                }
                let Some(adoption) = report.adoption.filter(|a| !a.from_rest) else { continue };
                adopted += 1;
                let mut was = (JointVector::zeros(2), JointVector::zeros(2));
                let mut is = was;
                old.sample(base.x, &controller.bounds, &mut was.0, &mut was.1);
                controller.curve.sample(0.0, &controller.bounds, &mut is.0, &mut is.1);
                for j in 0..2 {
                    let near = (is.0[j] - was.0[j]).abs() < 1e-9 && (is.1[j] - was.1[j] * base.pace).abs() < 1e-9;
                    assert!(near, "tick {tick}: the reference was at {was:?} and is at {is:?} ({adoption:?})");
                }
                let plan = controller.plan.unwrap().view;
                let used = plan.adopted_at.seconds_since(plan.origin) / 0.05;
                between += i32::from(used.fract() > 0.05 && used.fract() < 0.25);
                assert!((controller.curve.end() - (19.0 - used) * 0.05).abs() < 1e-6, "its end is the last action");
            }
            assert!(adopted > 100 && between > 10, "{adopted}, {between}");
        }
    }
}
