//! The published window: where the robot will be over the next fraction of a second, ending at rest.

use std::time::Duration;

use super::config::ControlConfig;
use crate::clock::RosTime;

/// Points one period apart, the first one period after `start`, the last at rest. All memory is reserved when it is
/// made by [`Controller::window`](super::Controller::window).
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    start: RosTime,
    period: f64,
    joints: usize,
    driven: usize,
    positions: Vec<f64>,
    velocities: Vec<f64>,
}

impl Window {
    /// An empty window with room for everything `config` can produce.
    pub(crate) fn for_config(config: &ControlConfig) -> Self {
        let joints = config.joints.len();
        let room = (config.window_points() + config.tail_points()) * joints;
        Self {
            start: RosTime::default(),
            period: config.period,
            joints,
            driven: 0,
            positions: Vec::with_capacity(room),
            velocities: Vec::with_capacity(room),
        }
    }

    /// Number of points; 0 when nothing is to be published.
    pub fn points(&self) -> usize {
        self.positions.len() / self.joints.max(1)
    }

    /// Points before the braking tail begins.
    pub fn driven_points(&self) -> usize {
        self.driven
    }

    /// Joints of a point, in the controller's order.
    pub fn joints(&self) -> usize {
        self.joints
    }

    /// ROS time from which `time_from_start` counts.
    pub fn start(&self) -> RosTime {
        self.start
    }

    /// Seconds between points.
    pub fn period(&self) -> f64 {
        self.period
    }

    /// When point `i` is due, strictly increasing.
    pub fn time_from_start(&self, i: usize) -> Duration {
        Duration::from_nanos(((i + 1) as f64 * self.period * 1e9).round() as u64)
    }

    /// Positions of point `i`, which must be below [`points`](Self::points); rad or m.
    pub fn positions(&self, i: usize) -> &[f64] {
        &self.positions[i * self.joints..(i + 1) * self.joints]
    }

    /// Velocities of point `i`, which must be below [`points`](Self::points); per second.
    pub fn velocities(&self, i: usize) -> &[f64] {
        &self.velocities[i * self.joints..(i + 1) * self.joints]
    }

    /// Empties it; `start` is the time of the next one.
    pub(crate) fn begin(&mut self, start: RosTime) {
        self.start = start;
        self.driven = 0;
        self.positions.clear();
        self.velocities.clear();
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
        self.positions.len() + self.joints <= self.positions.capacity()
    }

    /// Marks all points so far as driven.
    pub(crate) fn mark_driven(&mut self) {
        self.driven = self.points();
    }

    /// Takes over the content of `other` without allocating when both are made for the same configuration.
    pub(crate) fn copy_from(&mut self, other: &Window) {
        self.start = other.start;
        self.period = other.period;
        self.joints = other.joints;
        self.driven = other.driven;
        self.positions.clear();
        self.positions.extend_from_slice(&other.positions);
        self.velocities.clear();
        self.velocities.extend_from_slice(&other.velocities);
    }

    /// Positions and velocities `elapsed` seconds after `start`, from the state `(q0, v0)` at `start`: the cubic
    /// between the points, the last point for ever after.
    pub(crate) fn sample(&self, q0: &[f64], v0: &[f64], elapsed: f64, q: &mut [f64], v: &mut [f64]) {
        let n = self.points();
        let x = elapsed / self.period;
        if n == 0 || !(x > 0.0) {
            q.copy_from_slice(q0);
            v.copy_from_slice(v0);
            return;
        }
        if x >= n as f64 {
            q.copy_from_slice(self.positions(n - 1));
            v.copy_from_slice(self.velocities(n - 1));
            return;
        }
        let i = x as usize;
        let (from_q, from_v) = if i == 0 { (q0, v0) } else { (self.positions(i - 1), self.velocities(i - 1)) };
        let basis = Hermite::at(elapsed - i as f64 * self.period, self.period);
        for j in 0..self.joints {
            let (to_q, to_v) = (self.positions(i)[j], self.velocities(i)[j]);
            (q[j], v[j]) = basis.eval(from_q[j], from_v[j], to_q, to_v);
        }
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
