//! The safety filter: one step of one joint, from what it was told towards where it should be, inside its limits.
//!
//! A command is a curve of one cubic per period `h` between knots of position and velocity. On all of it, not only at
//! the knots, |velocity| ≤ `velocity` and |acceleration| ≤ `acceleration` (linear within a cubic, so its ends decide).
//! What keeps a joint off its position limits is one invariant at the knots:
//!
//! > position + braking distance in whole periods, `v²/2a + |v|·h/2`, is inside the limits.
//!
//! It can always be kept: slow down by `a·h`, or to zero if v is less. With `v ≥ a·h` the step covers `v·h − a·h²/2` and
//! the distance still needed is `v²/2a − v·h/2`: together `a·h²/2` less than before. With less, the step covers `v·h/2`
//! and nothing more is needed. And it suffices between the knots: a step with constant acceleration that turns inside
//! goes `v²/2α` further with `α ≥ v/h`, which is at most `v·h/2`; for other cubics the turning point is checked.

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
    /// The given limits, with the velocity below what stops in `stop_time` with one period to spare.
    pub fn new(limits: &JointLimits, period: f64, stop_time: f64) -> Self {
        Self {
            min: limits.min_position,
            max: limits.max_position,
            velocity: limits.max_velocity.min(limits.max_acceleration * (stop_time - period)),
            acceleration: limits.max_acceleration,
        }
    }

    /// Whether the cubic from `(q, v)` to `(q1, v1)` in `h` seconds keeps every rule, and which it breaks.
    pub(crate) fn allows(&self, q: f64, v: f64, q1: f64, v1: f64, h: f64) -> Result<(), Breach> {
        // Divisions are what this costs: there is one by `h`, and the rarer questions are asked last.
        let per_h = 1.0 / h;
        let slope = (q1 - q) * per_h;
        let a0 = (6.0 * slope - 4.0 * v - 2.0 * v1) * per_h;
        let a1 = (-6.0 * slope + 2.0 * v + 4.0 * v1) * per_h;
        let a_max = self.acceleration * (1.0 + EPS);
        let v_max = self.velocity * (1.0 + EPS);
        if !(a0.abs() <= a_max && a1.abs() <= a_max) {
            // Far more acceleration than a velocity at its limit could need is a question of velocity.
            return Err(if slope.abs() > v_max { Breach::Velocity } else { Breach::Acceleration });
        }
        if v1.abs() > v_max {
            return Err(Breach::Velocity);
        }
        let jerk = (a1 - a0) * per_h;
        let monotone = a0 * a1 >= 0.0;
        if !monotone {
            let t = -a0 / jerk;
            if (v + 0.5 * a0 * t).abs() > v_max {
                return Err(Breach::Velocity);
            }
        }
        let brake = self.grid_brake(v1.abs(), h);
        let (lowest, highest) = if v1 < 0.0 { (q1 - brake, q1) } else { (q1, q1 + brake) };
        if highest > self.max || lowest < self.min {
            return Err(Breach::Position);
        }
        // Where the velocity passes zero the position turns: it must turn inside the limits.
        if monotone && v * v1 >= 0.0 {
            return Ok(());
        }
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

    /// One step with the least time to rest. From a state that keeps the invariant no limit is in the way.
    pub(crate) fn brake(&self, q: f64, v: f64, h: f64) -> (f64, f64) {
        let v1 = (v.abs() - self.acceleration * h).max(0.0).copysign(v);
        (self.travel(q, v, v1, h), v1)
    }

    /// One step towards being at `target` with velocity `pace` after `h`: no overshoot, as fast as the rules allow.
    pub(crate) fn approach(&self, q: f64, v: f64, target: f64, pace: f64, h: f64) -> (f64, f64) {
        let inside = target.max(self.min).min(self.max);
        let pace = if inside == target { pace.max(-self.velocity).min(self.velocity) } else { 0.0 };
        // In the frame that moves with the target: land on it at rest.
        let wanted = pace + land(inside - pace * h - q, v - pace, APPROACH * self.acceleration, h);
        self.reach(q, v, wanted, h)
    }

    /// Constant acceleration from `v` to the velocity nearest to `wanted` that breaks no rule.
    fn reach(&self, q: f64, v: f64, wanted: f64, h: f64) -> (f64, f64) {
        let a = self.acceleration;
        let (slowest, fastest) = ((v - a * h).max(-self.velocity), (v + a * h).min(self.velocity));
        // NaN leads to rest.
        let wanted = if wanted.is_finite() { wanted } else { 0.0 };
        let mut v1 = wanted.min(fastest).max(slowest);
        // Whether braking from there fits is known without a root; what just fits is not.
        let ahead = if v1 < 0.0 { self.min - q } else { self.max - q };
        let needed = 0.5 * (v + v1) * h + self.grid_brake(v1.abs(), h).copysign(v1);
        if (ahead - needed) * v1 < 0.0 {
            v1 = land(ahead, v, a, h).min(fastest).max(slowest);
        }
        (self.travel(q, v, v1, h), v1)
    }

    /// Position after `h` at constant acceleration from `v` to `v1`; rounding alone can leave the limits.
    fn travel(&self, q: f64, v: f64, v1: f64, h: f64) -> f64 {
        (q + 0.5 * (v + v1) * h).max(self.min).min(self.max)
    }
}

/// Velocity after a step of `h` at constant acceleration, such that braking with `a` in whole periods lands `distance`
/// away: solves `(v + u)·h/2 + u²/2a + u·h/2 = distance` for u, mirrored for targets behind.
fn land(distance: f64, v: f64, a: f64, h: f64) -> f64 {
    let left = distance - 0.5 * v * h;
    ((a * h * (a * h) + 2.0 * a * left.abs()).sqrt() - a * h).copysign(left)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const BOUND: Bound = Bound { min: -1.0, max: 1.0, velocity: 2.0, acceleration: 10.0 };
    const H: f64 = 0.02;

    /// The invariant at a knot, with room for rounding.
    fn safe(b: &Bound, q: f64, v: f64) -> bool {
        let brake = 0.5 * v.abs() * (v.abs() / b.acceleration + H);
        let ahead = if v > 0.0 { b.max - q } else { q - b.min };
        q >= b.min && q <= b.max && v.abs() <= b.velocity + 1e-12 && brake <= ahead + 1e-12
    }

    #[test]
    fn what_a_step_would_break_is_named() {
        let cases = [
            ((0.0, 0.0, 0.0, 0.0), Ok(())),
            ((0.0, 1.0, 0.02, 1.0), Ok(())),
            // Constant acceleration at the limit, and a little more.
            ((0.0, 0.0, 0.002, 0.2), Ok(())),
            ((0.0, 0.0, 0.00201, 0.201), Err(Breach::Acceleration)),
            ((0.0, 0.0, 0.002, 0.0), Err(Breach::Acceleration)),
            ((0.0, 0.0, 0.5, 0.0), Err(Breach::Velocity)),
            ((0.0, 1.95, 0.0395, 2.0), Ok(())),
            ((0.0, 1.95, 0.0398, 2.03), Err(Breach::Velocity)),
            // Above the limit only inside: 1.99 at both ends, faster in between.
            ((0.0, 1.99, 0.0402, 1.99), Err(Breach::Velocity)),
            // At 1 rad/s braking in whole periods takes 0.06.
            ((0.919, 1.0, 0.939, 1.0), Ok(())),
            ((0.921, 1.0, 0.941, 1.0), Err(Breach::Position)),
            ((-0.921, -1.0, -0.941, -1.0), Err(Breach::Position)),
            // At rest outside, or turning outside.
            ((1.0, 0.0, 1.0001, 0.0), Err(Breach::Position)),
            ((1.0, 0.0, 1.0, 0.0), Ok(())),
            ((-1.0, 0.0, -1.0, 0.0), Ok(())),
            ((0.9999, 0.05, 0.9999, -0.05), Err(Breach::Position)),
            ((0.9995, 0.05, 0.9995, -0.05), Ok(())),
            ((-0.9999, -0.05, -0.9999, 0.05), Err(Breach::Position)),
            // Braking that eases off (-9 to -1 rad/s²) turns 0.000226 further on.
            ((0.9998, 0.06, 0.999_733_333, -0.04), Err(Breach::Position)),
            ((0.9997, 0.06, 0.999_633_333, -0.04), Ok(())),
            // The same cubic would turn again below -1, but only after this step.
            ((-0.99944, 0.06, -0.999_506_666_667, -0.04), Ok(())),
            ((0.0, 0.0, f64::NAN, 0.0), Err(Breach::Acceleration)),
            ((0.0, 0.0, 0.0, f64::NAN), Err(Breach::Acceleration)),
        ];
        for ((q, v, q1, v1), verdict) in cases {
            assert_eq!(BOUND.allows(q, v, q1, v1, H), verdict, "({q}, {v}) to ({q1}, {v1})");
        }
    }

    #[test]
    fn from_every_safe_state_every_step_is_safe_whatever_is_asked() {
        let rng = &mut ChaCha8Rng::seed_from_u64(9);
        let mut checked = 0;
        while checked < 200_000 {
            let b = Bound {
                min: -rng.random_range(0.0..0.2),
                max: rng.random_range(0.0..0.2),
                velocity: rng.random_range(0.1..3.0),
                acceleration: rng.random_range(1.0..40.0),
            };
            let q = rng.random_range(b.min..=b.max);
            let v = rng.random_range(-b.velocity..=b.velocity) * [1.0, 0.1, 0.0][rng.random_range(0..3)];
            if !safe(&b, q, v) {
                continue;
            }
            checked += 1;
            let wild = [0.0, 0.05, -0.3, 1e6, -1e300, f64::INFINITY, f64::NAN];
            let target = wild[rng.random_range(0..7)] * rng.random_range(0.0..1.0);
            let pace = wild[rng.random_range(0..7)] * rng.random_range(0.0..1.0);
            for (q1, v1) in [b.brake(q, v, H), b.approach(q, v, target, pace, H)] {
                assert!(safe(&b, q1, v1), "({q}, {v}) to ({q1}, {v1}) in {b:?}");
                assert!((v1 - v).abs() <= b.acceleration * H * (1.0 + 1e-12) + 1e-15);
                assert!((q1 - q - 0.5 * (v + v1) * H).abs() < 1e-12, "constant acceleration");
            }
        }
    }

    #[test]
    fn braking_takes_the_least_number_of_periods() {
        let (mut q, mut v) = (0.0, 1.9);
        for i in 1..=10 {
            (q, v) = BOUND.brake(q, v, H);
            assert!((v - (1.9 - 0.2 * f64::from(i)).max(0.0)).abs() < 1e-12);
        }
        assert_eq!(v, 0.0);
        assert!((q - 0.19).abs() < 2e-2);
    }

    #[test]
    fn an_approach_lands_on_a_resting_or_moving_target_without_overshoot() {
        for (start, pace) in [(-0.9, 0.0), (0.6, 0.0), (-0.9, 0.3), (0.1, -0.3)] {
            let (mut q, mut v) = (start, 0.0);
            let target = |i: i32| 0.2 + pace * f64::from(i) * H * f64::from(i < 100);
            let side = (0.2f64 - start).signum();
            for i in 1..100 {
                let before = v;
                (q, v) = BOUND.approach(q, v, target(i), pace, H);
                assert!((target(i) - q) * side > -1e-9, "overshoot at {i}: {q} past {}", target(i));
                let eased = (before - v) * side;
                assert!(pace != 0.0 || eased <= APPROACH * BOUND.acceleration * H + 1e-9, "brakes with {}", eased / H);
            }
            assert!((q - target(99)).abs() < 1e-9 && (v - pace).abs() < 1e-9, "{q} {v}");
        }
    }

    #[test]
    fn the_velocity_in_use_is_one_that_stops_in_time() {
        let l = JointLimits { min_position: -1.0, max_position: 1.0, max_velocity: 2.0, max_acceleration: 4.0 };
        assert_eq!(Bound::new(&l, 0.02, 0.5).velocity, 4.0 * 0.48);
        assert_eq!(Bound::new(&l, 0.02, 1.0).velocity, 2.0);
    }
}
