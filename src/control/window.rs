//! The published window: where the robot will be over the next fraction of a second, ending at rest.

use std::time::Duration;

use super::config::ControlConfig;
use super::joints::{JointVector, MAX_JOINTS};
use crate::clock::RosTime;

/// Points due within this many seconds are behind: rounding of times, far below the nanosecond of the clocks.
const RESOLUTION: f64 = 1e-13;

/// Points one period apart, the last at rest. The first is one period after `start`; on a tick that is early or late it
/// is the next one that the robot was promised already, so less than a period. All memory is reserved when the window
/// is made by [`Controller::window`](super::Controller::window).
///
/// The robot is meant to be at [`now`](Self::now) at `start` and to play the cubics between the points.
#[derive(Debug, PartialEq)]
pub struct Window {
    start: RosTime,
    first: f64,
    period: f64,
    driven: usize,
    now_q: JointVector,
    now_v: JointVector,
    /// How often each joint began elsewhere than where the window before led.
    begun: [u32; MAX_JOINTS],
    /// The furthest that each joint may go in a period.
    steps: JointVector,
    command: JointVector,
    positions: Vec<f64>,
    velocities: Vec<f64>,
    /// Most values of each of the two.
    room: usize,
}

impl Clone for Window {
    /// A clone has the same room: slots between threads are filled with clones, and must not allocate later.
    fn clone(&self) -> Self {
        let mut window =
            Self { positions: Vec::with_capacity(self.room), velocities: Vec::with_capacity(self.room), ..*self };
        window.copy_from(self);
        window
    }
}

/// What was sent last, for [`Window::follow`].
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    begun: [u32; MAX_JOINTS],
    command: JointVector,
}

/// A moment of a window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) q: JointVector,
    pub(crate) v: JointVector,
    /// The first point that is still ahead, and the seconds to it; `None` when the window is over.
    pub(crate) ahead: Option<(usize, f64)>,
    /// Share of the way from the point before (or the start) to the point ahead.
    pub(crate) part: f64,
}

impl Window {
    /// An empty window with room for everything `config` can produce.
    pub(crate) fn for_config(config: &ControlConfig) -> Self {
        let joints = config.joints.len();
        let room = Self::most_points(config) * joints;
        let mut steps = JointVector::zeros(joints);
        for (j, step) in steps.iter_mut().enumerate() {
            *step = config.bound(j).map_or(0.0, |b| b.velocity * config.period);
        }
        Self {
            start: RosTime::default(),
            first: config.period,
            period: config.period,
            driven: 0,
            now_q: JointVector::zeros(joints),
            now_v: JointVector::zeros(joints),
            begun: [0; MAX_JOINTS],
            steps,
            command: JointVector::zeros(joints),
            positions: Vec::with_capacity(room),
            velocities: Vec::with_capacity(room),
            room,
        }
    }

    /// The promised point, the plan, the tail.
    pub(crate) fn most_points(config: &ControlConfig) -> usize {
        1 + config.window_points() + config.tail_points()
    }

    /// Number of points; 0 when nothing is to be published.
    pub fn points(&self) -> usize {
        self.positions.len() / self.joints().max(1)
    }

    /// Points before the braking tail begins.
    pub fn driven_points(&self) -> usize {
        self.driven
    }

    /// Joints of a point, in the controller's order.
    pub fn joints(&self) -> usize {
        self.now_q.len()
    }

    /// ROS time from which `time_from_start` counts.
    pub fn start(&self) -> RosTime {
        self.start
    }

    /// Seconds between points.
    pub fn period(&self) -> f64 {
        self.period
    }

    /// Positions and velocities that the robot was told to have at `start`.
    pub fn now(&self) -> (&[f64], &[f64]) {
        (&self.now_q, &self.now_v)
    }

    /// Seconds from `start` to point `i`; strictly increasing, the first above zero.
    pub fn seconds_from_start(&self, i: usize) -> f64 {
        self.first + i as f64 * self.period
    }

    /// As [`seconds_from_start`](Self::seconds_from_start), in whole nanoseconds.
    pub fn time_from_start(&self, i: usize) -> Duration {
        Duration::from_nanos(((self.seconds_from_start(i) * 1e9).round() as u64).max(1))
    }

    /// Positions of point `i`, which must be below [`points`](Self::points); rad or m.
    pub fn positions(&self, i: usize) -> &[f64] {
        let n = self.joints();
        &self.positions[i * n..(i + 1) * n]
    }

    /// Velocities of point `i`, which must be below [`points`](Self::points); per second.
    pub fn velocities(&self, i: usize) -> &[f64] {
        let n = self.joints();
        &self.velocities[i * n..(i + 1) * n]
    }

    /// Positions and velocities `seconds` after `start`: for outputs that take a command instead of a trajectory.
    pub fn sample(&self, seconds: f64) -> (JointVector, JointVector) {
        let at = self.moment(seconds);
        (at.q, at.v)
    }

    /// Positions for drivers that take one command at a time and hold it.
    pub fn command(&self) -> &[f64] {
        &self.command
    }

    /// Makes its command go on from the last one that was sent. When commands were missed, a driver has stood still
    /// meanwhile: a joint catches up no faster than it may move, unless it began anew since.
    #[must_use]
    pub fn follow(&mut self, sent: Option<&Sent>) -> Sent {
        if let Some(sent) = sent {
            for (j, q) in self.command.iter_mut().enumerate() {
                if let (Some(last), Some(step), true) =
                    (sent.command.get(j), self.steps.get(j), sent.begun[j] == self.begun[j])
                {
                    *q = q.max(last - step).min(last + step);
                }
            }
        }
        Sent { begun: self.begun, command: self.command }
    }

    /// Empties it. `q` and `v` are what the robot was told to have at `start`; `anew` are joints for which that is not
    /// where the window before led.
    pub(crate) fn begin(&mut self, start: RosTime, q: &[f64], v: &[f64], anew: &[bool; MAX_JOINTS]) {
        self.start = start;
        for (begun, anew) in self.begun.iter_mut().zip(anew) {
            *begun = begun.wrapping_add(u32::from(*anew));
        }
        self.first = self.period;
        self.driven = 0;
        self.now_q.copy_from_slice(q);
        self.now_v.copy_from_slice(v);
        self.positions.clear();
        self.velocities.clear();
    }

    /// All its points are there.
    pub(crate) fn complete(&mut self) {
        self.command = self.sample(self.period).0;
    }

    /// Takes over, for a window under other settings, how often joints began anew.
    pub(crate) fn succeed(&mut self, old: &Window) {
        self.begun = old.begun;
    }

    /// Empties it for a tick with nothing to publish.
    pub(crate) fn clear(&mut self, start: RosTime) {
        self.start = start;
        self.driven = 0;
        self.positions.clear();
        self.velocities.clear();
    }

    /// Adds the point that was promised before, `seconds` after `start`.
    pub(crate) fn promised(&mut self, seconds: f64, q: &[f64], v: &[f64]) {
        self.first = seconds;
        self.push(q, v);
    }

    /// Adds a point. Beyond the reserved room nothing is added, which [`room`](Self::room) tells beforehand.
    pub(crate) fn push(&mut self, q: &[f64], v: &[f64]) {
        if self.room() {
            self.positions.extend_from_slice(q);
            self.velocities.extend_from_slice(v);
        }
    }

    /// Whether another point fits without allocating.
    pub(crate) fn room(&self) -> bool {
        self.positions.len() + self.joints() <= self.room
    }

    /// Marks all points so far as driven.
    pub(crate) fn mark_driven(&mut self) {
        self.driven = self.points();
    }

    /// Takes over the content of `other` without allocating when both are made for the same configuration.
    pub(crate) fn copy_from(&mut self, other: &Window) {
        (self.start, self.first, self.period, self.driven) = (other.start, other.first, other.period, other.driven);
        (self.now_q, self.now_v) = (other.now_q, other.now_v);
        (self.begun, self.steps, self.command) = (other.begun, other.steps, other.command);
        self.positions.clear();
        self.positions.extend_from_slice(&other.positions);
        self.velocities.clear();
        self.velocities.extend_from_slice(&other.velocities);
    }

    /// The moment `elapsed` seconds after `start`; after the last point it holds for ever.
    pub(crate) fn moment(&self, elapsed: f64) -> Moment {
        let n = self.points();
        let mut moment = Moment { q: self.now_q, v: self.now_v, ahead: None, part: 0.0 };
        if n == 0 {
            return moment;
        }
        let elapsed = if elapsed > 0.0 { elapsed } else { 0.0 };
        let to_first = self.first - elapsed;
        let next = if to_first >= RESOLUTION { 0 } else { 1 + ((RESOLUTION - to_first) / self.period) as usize };
        if next >= n {
            moment.q.copy_from_slice(self.positions(n - 1));
            moment.v.copy_from_slice(self.velocities(n - 1));
            return moment;
        }
        let left = self.seconds_from_start(next) - elapsed;
        let h = if next == 0 { self.first } else { self.period };
        let (q0, v0) = match next {
            0 => (&self.now_q[..], &self.now_v[..]),
            _ => (self.positions(next - 1), self.velocities(next - 1)),
        };
        let basis = Hermite::at((h - left).max(0.0), h);
        let (q1, v1) = (self.positions(next), self.velocities(next));
        for j in 0..self.joints() {
            (moment.q[j], moment.v[j]) = basis.eval(q0[j], v0[j], q1[j], v1[j]);
        }
        moment.ahead = Some((next, left));
        moment.part = (1.0 - left / h).max(0.0);
        moment
    }
}

/// Weights of the cubic Hermite polynomial at one time of a segment, for position and velocity.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hermite {
    rise: f64,
    q_v0: f64,
    q_v1: f64,
    slope: f64,
    v_v0: f64,
    v_v1: f64,
}

impl Hermite {
    /// At `t` seconds of a segment `h` seconds long.
    pub(crate) fn at(t: f64, h: f64) -> Self {
        let x = t / h;
        Self {
            rise: x * x * (3.0 - 2.0 * x),
            q_v0: t * (1.0 - x) * (1.0 - x),
            q_v1: -t * x * (1.0 - x),
            slope: 6.0 * x * (1.0 - x) / h,
            v_v0: (1.0 - x) * (1.0 - 3.0 * x),
            v_v1: x * (3.0 * x - 2.0),
        }
    }

    /// Position and velocity between `(q0, v0)` and `(q1, v1)`.
    pub(crate) fn eval(&self, q0: f64, v0: f64, q1: f64, v1: f64) -> (f64, f64) {
        let d = q1 - q0;
        (q0 + self.rise * d + self.q_v0 * v0 + self.q_v1 * v1, self.slope * d + self.v_v0 * v0 + self.v_v1 * v1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_that_is_full_takes_no_more_and_allocates_nothing() {
        let mut window = Window::for_config(&ControlConfig::new(["a".to_string(), "b".to_string()], 0.02, 0.05, 20));
        window.begin(RosTime(1), &[0.0; 2], &[0.0; 2], &[true; MAX_JOINTS]);
        let memory = (window.positions.as_ptr(), window.velocities.as_ptr());
        let mut points = 0;
        while window.room() && points < 1_000_000 {
            window.push(&[0.5; 2], &[0.1; 2]);
            points += 1;
            assert_eq!(window.points(), points);
        }
        window.push(&[0.5; 2], &[0.1; 2]);
        assert_eq!(window.points(), points, "full");
        assert_eq!((window.positions.as_ptr(), window.velocities.as_ptr()), memory, "moved");
    }
}
