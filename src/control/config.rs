//! What a controller is built from, checked once so that nothing after it needs to check again.

use super::filter::Bound;
use super::joints::MAX_JOINTS;
use crate::choice::choice;
use crate::error::{Blame, Fault};

/// Limits of one joint; all finite, `min_position < max_position`, the others above zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JointLimits {
    /// rad or m.
    pub min_position: f64,
    /// rad or m.
    pub max_position: f64,
    /// rad/s or m/s.
    pub max_velocity: f64,
    /// rad/s² or m/s².
    pub max_acceleration: f64,
}

/// One joint.
#[derive(Debug, Clone, PartialEq)]
pub struct JointConfig {
    /// As in `joint_states` and in the published trajectory.
    pub name: String,
    /// Without them there is no arming.
    pub limits: Option<JointLimits>,
    /// Largest distance of the measured from the commanded position before the robot is stopped, rad or m.
    pub max_tracking_error: f64,
}

choice! {
    /// How a new chunk takes over from the running one.
    #[derive(Default)]
    Seam {
        /// The decoder guides the new chunk towards the old one; what jump remains is blended as in `Crossfade`.
        Rtc = "rtc",
        /// Blended over `crossfade_steps` with continuous velocity.
        #[default]
        Crossfade = "crossfade",
        /// At the next action; only the safety filter softens the jump.
        None = "none",
    }
}

choice! {
    /// What happens when no chunk came in time.
    #[derive(Default)]
    MissPolicy {
        /// Decelerate, hold, and go on with the next chunk.
        #[default]
        Coast = "coast",
        /// Decelerate and disarm.
        Stop = "stop",
    }
}

/// Everything a [`Controller`](super::Controller) needs to know. Times are in seconds.
///
/// The velocity that is used can be lower than the one given, so that a stop always fits: it is kept below
/// `max_acceleration · (stop_time − period)`. See [`ControlConfig::bound`].
#[derive(Debug, Clone, PartialEq)]
pub struct ControlConfig {
    /// The joints of an action, in its order; 1 to [`MAX_JOINTS`].
    pub joints: Vec<JointConfig>,
    /// 1 / `control_rate_hz`.
    pub period: f64,
    /// 1 / `policy_rate_hz`.
    pub dt: f64,
    /// Actions in a chunk, at least 2.
    pub horizon: usize,
    /// A stop from any allowed velocity ends within this time plus one tick; at least two periods.
    pub stop_time: f64,
    /// Shortest time of the blend from the measured pose to the plan after arming.
    pub ramp_time: f64,
    /// Length of the published plan before its braking tail; at least one period.
    pub output_window: f64,
    /// Policy steps between adopted chunks, 1 to `horizon − 1`.
    pub replan_steps: usize,
    /// How chunks are joined.
    pub seam: Seam,
    /// Policy steps of the blend, 1 to `horizon`.
    pub crossfade_steps: usize,
    /// Oldest joint state that is still believed.
    pub max_joint_state_age: f64,
    /// Oldest observation whose chunk is still adopted, from its state stamp.
    pub max_chunk_age: f64,
    /// Oldest image whose chunk is still adopted.
    pub max_image_age: f64,
    /// How far in the future a stamp may be before it is refused.
    pub future_tolerance: f64,
    /// What starvation leads to.
    pub miss_policy: MissPolicy,
    /// Coasting longer than this is reported as an error.
    pub starvation_timeout: f64,
    /// From the scheduled wake-up to the return of publish; 0 means one period.
    pub deadline: f64,
}

/// A value that cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} = {value}: {remedy}")]
pub struct ConfigError {
    /// The parameter, or what it is derived from.
    pub name: String,
    /// As given.
    pub value: String,
    /// What would be accepted.
    pub remedy: String,
}

impl Blame for ConfigError {
    fn fault(&self) -> Fault {
        Fault::Input
    }
}

/// Most points of a window: bounds memory, not use.
const MAX_POINTS: f64 = 4096.0;
/// Longest chunk: bounds memory, not use.
const MAX_HORIZON: usize = 1024;

impl ControlConfig {
    /// A configuration for these joints without limits, with the defaults of the parameter table: stop 0.5 s, ramp
    /// 2 s, window 0.2 s, re-plan at half the horizon, cross-fade over 5 steps, joint states up to 0.1 s old.
    pub fn new(joints: impl IntoIterator<Item = String>, period: f64, dt: f64, horizon: usize) -> Self {
        Self {
            joints: joints
                .into_iter()
                .map(|name| JointConfig { name, limits: None, max_tracking_error: 0.2 })
                .collect(),
            period,
            dt,
            horizon,
            stop_time: 0.5,
            ramp_time: 2.0,
            output_window: 0.2,
            replan_steps: (horizon / 2).max(1),
            seam: Seam::default(),
            crossfade_steps: 5.min(horizon.max(1)),
            max_joint_state_age: 0.1,
            max_chunk_age: (horizon as f64 * dt).max(1.0),
            max_image_age: (horizon as f64 * dt).max(1.0) + 0.5,
            future_tolerance: 0.05,
            miss_policy: MissPolicy::default(),
            starvation_timeout: 2.0,
            deadline: 0.0,
        }
    }

    /// The limits of joint `j` as they are used: with a velocity from which a stop fits (see the type). `None` without
    /// limits.
    pub fn bound(&self, j: usize) -> Option<Bound> {
        self.joints.get(j)?.limits.map(|l| Bound::new(&l, self.period, self.stop_time))
    }

    /// Points of the published plan before its braking tail. Two at least: a tick that is a hair early is promised one
    /// already, and would follow nothing if that were all.
    pub fn window_points(&self) -> usize {
        ((self.output_window / self.period).round() as usize).max(2)
    }

    /// Most points of a braking tail: the velocity in use leaves one period of the stop time to spare.
    pub fn tail_points(&self) -> usize {
        (self.stop_time / self.period).ceil() as usize
    }

    /// Checks everything; the first thing wrong is returned.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail =
            |name: &str, value: String, remedy: String| Err(ConfigError { name: name.to_string(), value, remedy });
        if self.joints.is_empty() || self.joints.len() > MAX_JOINTS {
            return fail("joint_names", format!("{} joints", self.joints.len()), format!("give 1 to {MAX_JOINTS}"));
        }
        for (name, value, min) in [
            ("period (1 / control_rate_hz)", self.period, 1e-4),
            ("dt (1 / policy_rate_hz)", self.dt, 1e-4),
            ("stop_time", self.stop_time, 2.0 * self.period),
            ("ramp_time", self.ramp_time, 0.0),
            ("output_window", self.output_window, self.period),
            ("max_joint_state_age", self.max_joint_state_age, 1e-6),
            ("max_chunk_age", self.max_chunk_age, 1e-6),
            ("max_image_age", self.max_image_age, 1e-6),
            ("future_tolerance", self.future_tolerance, 0.0),
            ("starvation_timeout", self.starvation_timeout, 0.0),
            ("deadline", self.deadline, 0.0),
        ] {
            if !value.is_finite() || value < min || value > 3600.0 {
                return fail(name, format!("{value} s"), format!("give a finite time from {min} to 3600 s"));
            }
        }
        if (self.output_window + self.stop_time) / self.period > MAX_POINTS {
            return fail(
                "output_window + stop_time",
                format!("{} s at a period of {} s", self.output_window + self.stop_time, self.period),
                format!("shorten them: a window has at most {MAX_POINTS} points"),
            );
        }
        if !(2..=MAX_HORIZON).contains(&self.horizon) {
            return fail("horizon", self.horizon.to_string(), format!("a chunk has 2 to {MAX_HORIZON} actions"));
        }
        if !(1..self.horizon).contains(&self.replan_steps) {
            return fail(
                "replan_steps",
                self.replan_steps.to_string(),
                format!("give 1 to {} (horizon - 1)", self.horizon - 1),
            );
        }
        if !(1..=self.horizon).contains(&self.crossfade_steps) {
            return fail(
                "crossfade_steps",
                self.crossfade_steps.to_string(),
                format!("give 1 to {} (the horizon)", self.horizon),
            );
        }
        for (i, joint) in self.joints.iter().enumerate() {
            if self.joints[..i].iter().any(|other| other.name == joint.name) {
                return fail("joint_names", format!("'{}' twice", joint.name), "name each joint once".into());
            }
            let e = joint.max_tracking_error;
            if !e.is_finite() || e <= 0.0 {
                return fail(
                    &format!("max_tracking_error of joint '{}'", joint.name),
                    e.to_string(),
                    "give a finite distance above zero".into(),
                );
            }
            if let Some(limits) = &joint.limits {
                limits.check(&joint.name)?;
            }
        }
        Ok(())
    }
}

impl JointLimits {
    /// Checks the four values of joint `name`.
    pub fn check(&self, name: &str) -> Result<(), ConfigError> {
        let fail = |field: &str, value: f64, remedy: String| {
            Err(ConfigError { name: format!("limits.{name}.{field}"), value: value.to_string(), remedy })
        };
        for (field, value) in [("min_position", self.min_position), ("max_position", self.max_position)] {
            if !value.is_finite() || value.abs() > 1e6 {
                return fail(field, value, "give a finite position (a turning joint too: at most 1e6)".into());
            }
        }
        if self.max_position - self.min_position < 1e-6 {
            return fail(
                "max_position",
                self.max_position,
                format!("must be above min_position = {}", self.min_position),
            );
        }
        for (field, value) in [("max_velocity", self.max_velocity), ("max_acceleration", self.max_acceleration)] {
            if !value.is_finite() || value <= 0.0 || value > 1e6 {
                return fail(field, value, "give a finite value above zero (at most 1e6)".into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> ControlConfig {
        let mut c = ControlConfig::new(["a".to_string(), "b".to_string()], 0.02, 0.05, 10);
        for joint in &mut c.joints {
            joint.limits =
                Some(JointLimits { min_position: -1.0, max_position: 1.0, max_velocity: 2.0, max_acceleration: 8.0 });
        }
        c
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_the_remedy() {
        good().check().unwrap();
        type Spoil = fn(&mut ControlConfig);
        fn limits(c: &mut ControlConfig) -> &mut JointLimits {
            c.joints[1].limits.as_mut().unwrap()
        }
        let cases: [(&str, Spoil); 25] = [
            ("joint_names = 0 joints", |c| c.joints.clear()),
            ("joint_names = 33 joints", |c| *c = ControlConfig::new((0..33).map(|j| format!("j{j}")), 0.02, 0.05, 10)),
            ("joint_names = 'a' twice", |c| c.joints[1].name = "a".into()),
            ("control_rate_hz", |c| c.period = f64::INFINITY),
            ("policy_rate_hz", |c| c.dt = 0.0),
            ("stop_time = 0.03 s", |c| c.stop_time = 0.03),
            ("ramp_time", |c| c.ramp_time = f64::NAN),
            ("ramp_time = 3600.5 s", |c| c.ramp_time = 3600.5),
            ("deadline = -0.001 s", |c| c.deadline = -0.001),
            ("output_window = 0.01 s", |c| c.output_window = 0.01),
            ("output_window + stop_time = 82 s at a period of 0.02 s", |c| c.output_window = 81.5),
            ("horizon = 1", |c| c.horizon = 1),
            ("horizon = 1025", |c| c.horizon = 1025),
            ("replan_steps = 10", |c| c.replan_steps = 10),
            ("replan_steps = 0", |c| c.replan_steps = 0),
            ("crossfade_steps = 0", |c| c.crossfade_steps = 0),
            ("crossfade_steps = 11", |c| c.crossfade_steps = 11),
            ("limits.b.max_velocity = NaN", |c| limits(c).max_velocity = f64::NAN),
            ("limits.b.max_acceleration = 0", |c| limits(c).max_acceleration = 0.0),
            ("limits.b.max_acceleration = 1000001", |c| limits(c).max_acceleration = 1_000_001.0),
            ("limits.b.max_position = -1", |c| limits(c).max_position = -1.0),
            ("limits.b.max_position = 1000001", |c| limits(c).max_position = 1_000_001.0),
            ("limits.b.min_position", |c| limits(c).min_position = f64::NEG_INFINITY),
            ("max_tracking_error of joint 'b' = -1", |c| c.joints[1].max_tracking_error = -1.0),
            ("max_tracking_error of joint 'b' = 0", |c| c.joints[1].max_tracking_error = 0.0),
        ];
        for (says, spoil) in cases {
            let mut c = good();
            spoil(&mut c);
            let e = c.check().unwrap_err().to_string();
            assert!(e.contains(says), "{e} should say {says}");
        }
    }

    #[test]
    fn the_ends_of_every_range_are_allowed() {
        let mut c = ControlConfig::new((0..MAX_JOINTS).map(|j| format!("j{j}")), 0.125, 0.05, MAX_HORIZON);
        c.joints[0].limits =
            Some(JointLimits { min_position: -1e6, max_position: 1e6, max_velocity: 1e6, max_acceleration: 1e6 });
        (c.ramp_time, c.starvation_timeout, c.future_tolerance) = (3600.0, 0.0, 0.0);
        (c.replan_steps, c.crossfade_steps) = (MAX_HORIZON - 1, MAX_HORIZON);
        (c.stop_time, c.output_window) = (0.25, MAX_POINTS * 0.125 - 0.25);
        c.check().unwrap();
        (c.horizon, c.replan_steps, c.crossfade_steps, c.output_window) = (2, 1, 1, c.period);
        c.joints[0].limits =
            Some(JointLimits { min_position: 0.0, max_position: 1e-6, max_velocity: 1e-6, max_acceleration: 1e-6 });
        c.check().unwrap();
    }

    #[test]
    fn a_stop_always_fits_the_stop_time() {
        let mut c = good();
        c.stop_time = 0.12;
        let b = c.bound(0).unwrap();
        assert!((b.velocity - 0.8).abs() < 1e-12, "8 rad/s² for 0.1 s");
        assert_eq!(b.acceleration, 8.0);
    }
}
