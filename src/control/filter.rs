//! The safety filter: one step of one joint, from what it was told towards where it should be, inside its limits.
//!
//! A command is a curve with continuous velocity, made of one cubic per period between `(position, velocity)` knots.
//! Three rules hold on all of it, not only at the knots:
//!
//! - |velocity| ≤ `velocity`; |acceleration| ≤ `acceleration` (linear within a cubic, so its ends decide);
//! - the place where full braking would end, `q + v·|v| / 2a`, is within the position limits.
//!
//! The third is what keeps a joint off its limits, and it survives sampling at any moment: while v > 0 and
//! acceleration ≥ −a, that place moves by v·(1 + q̈/a) ≥ 0 per second, so it is nowhere further than at the end of the
//! step, and full braking keeps it where it is. So from any moment of an allowed curve there is an allowed way on.

use super::config::JointLimits;

/// Relative tolerance of the comparisons: rounding, not licence.
const EPS: f64 = 1e-9;
/// Share of the acceleration used to approach a target, so that one that moves can still be followed.
const APPROACH: f64 = 0.8;

/// The limits of one joint as they are used.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Bound {
    /// Lowest position, rad or m.
    pub min: f64,
    /// Highest position.
    pub max: f64,
    /// Largest speed, per second.
    pub velocity: f64,
    /// Largest acceleration, per second squared.
    pub acceleration: f64,
}

/// What a step that should have been taken would have broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Breach {
    Velocity,
    Acceleration,
    Position,
}

impl Bound {
    /// The given limits, with the acceleration below a quarter of the range per period squared (a joint can then
    /// always be braked inside its range) and the velocity below what stops in `stop_time` with one period to spare.
    pub fn new(limits: &JointLimits, period: f64, stop_time: f64) -> Self {
        let range = limits.max_position - limits.min_position;
        let acceleration = limits.max_acceleration.min(range / (4.0 * period * period));
        Self {
            min: limits.min_position,
            max: limits.max_position,
            velocity: limits.max_velocity.min(acceleration * (stop_time - period)),
            acceleration,
        }
    }

    /// Whether the cubic from `(q, v)` to `(q1, v1)` in `h` seconds keeps every rule, and which it breaks.
    pub(crate) fn allows(&self, q: f64, v: f64, q1: f64, v1: f64, h: f64) -> Result<(), Breach> {
        let slope = (q1 - q) / h;
        let a0 = (6.0 * slope - 4.0 * v - 2.0 * v1) / h;
        let a1 = (-6.0 * slope + 2.0 * v + 4.0 * v1) / h;
        let a_max = self.acceleration * (1.0 + EPS);
        let v_max = self.velocity * (1.0 + EPS);
        if !(a0.abs() <= a_max && a1.abs() <= a_max) {
            // Far more acceleration than a velocity at its limit could need is a question of velocity.
            return Err(if slope.abs() > v_max { Breach::Velocity } else { Breach::Acceleration });
        }
        if !(v1.abs() <= v_max) {
            return Err(Breach::Velocity);
        }
        let jerk = (a1 - a0) / h;
        if a0 * a1 < 0.0 {
            let t = -a0 / jerk;
            if (v + 0.5 * a0 * t).abs() > v_max {
                return Err(Breach::Velocity);
            }
        }
        if q1 + self.grid_brake(v1.max(0.0), h) > self.max || q1 - self.grid_brake((-v1).max(0.0), h) < self.min {
            return Err(Breach::Position);
        }
        // Where the velocity passes zero the position turns: it must turn inside the limits.
        let disc = a0 * a0 - 2.0 * jerk * v;
        if disc >= 0.0 {
            let root = -a0 - disc.sqrt().copysign(a0);
            for t in [root / jerk, 2.0 * v / root] {
                if t > 0.0 && t < h {
                    let turn = q + t * (v + t * (0.5 * a0 + t * jerk / 6.0));
                    if turn > self.max || turn < self.min {
                        return Err(Breach::Position);
                    }
                }
            }
        }
        Ok(())
    }

    /// Braking distance from speed `v` ≥ 0 in whole periods: `v²/2a + v·h/2` bounds `n·h·v/2` for `n = ⌈v/ah⌉`.
    fn grid_brake(&self, v: f64, h: f64) -> f64 {
        0.5 * v * (v / self.acceleration + h)
    }

    /// Velocities that constant acceleration may reach in `h` without breaking a rule, lowest and highest.
    fn reachable(&self, q: f64, v: f64, h: f64) -> (f64, f64) {
        let a = self.acceleration;
        let lo = (v - a * h).max(-self.velocity).max(-highest(q - self.min, -v, a, h));
        let hi = (v + a * h).min(self.velocity).min(highest(self.max - q, v, a, h));
        if lo <= hi {
            return (lo, hi);
        }
        // Only rounding leads here: full braking is always allowed.
        let brake = v.clamp(-a * h, a * h);
        (v - brake, v - brake)
    }

    /// One step with the least time to rest.
    pub(crate) fn brake(&self, q: f64, v: f64, h: f64) -> (f64, f64) {
        let slowed = v - v.clamp(-self.acceleration * h, self.acceleration * h);
        self.reach(q, v, slowed, h)
    }

    /// One step towards being at `target` with velocity `pace` after `h`: no overshoot, as fast as the rules allow.
    pub(crate) fn approach(&self, q: f64, v: f64, target: f64, pace: f64, h: f64) -> (f64, f64) {
        let inside = target.clamp(self.min, self.max);
        let pace = if inside == target { pace.clamp(-self.velocity, self.velocity) } else { 0.0 };
        let a = APPROACH * self.acceleration;
        // In the frame that moves with the target: land on it at rest.
        let wanted = pace + land(inside - pace * h - q, v - pace, a, h);
        // Towards a position limit in whole periods, so that it is met at rest and not bounced off.
        let above = land(self.max - q, v, self.acceleration, h);
        let below = land(self.min - q, v, self.acceleration, h);
        self.reach(q, v, wanted.max(below).min(above), h)
    }

    /// Constant acceleration from `v` to the reachable velocity nearest to `wanted`.
    fn reach(&self, q: f64, v: f64, wanted: f64, h: f64) -> (f64, f64) {
        let (lo, hi) = self.reachable(q, v, h);
        let v1 = if wanted.is_finite() { wanted.max(lo).min(hi) } else { 0f64.max(lo).min(hi) };
        ((q + 0.5 * (v + v1) * h).clamp(self.min, self.max), v1)
    }
}

/// Velocity after a step of `h` at constant acceleration, such that braking with `a` in whole periods lands `distance`
/// away: solves `(v + u)·h/2 + u²/2a + u·h/2 = distance` for u, mirrored for targets behind.
fn land(distance: f64, v: f64, a: f64, h: f64) -> f64 {
    let left = distance - 0.5 * v * h;
    (a * ((h * h + 2.0 * left.abs() / a).sqrt() - h)).copysign(left)
}

/// Highest velocity after `h` at constant acceleration from which full braking still ends within `distance`.
fn highest(distance: f64, v: f64, a: f64, h: f64) -> f64 {
    let left = distance - 0.5 * v * h;
    if left >= 0.0 {
        // (v + u)·h/2 + u²/2a = distance
        return a * ((0.25 * h * h + 2.0 * left / a).sqrt() - 0.5 * h);
    }
    if distance <= 0.0 {
        return f64::NEG_INFINITY;
    }
    // It has to turn within the step, at v²h / 2(v − u).
    v - 0.5 * v * v * h / distance
}
