//! The reference: accepted actions as one curve with continuous velocity, and the pace at which it can be followed.

use super::filter::Bound;
use super::window::Hermite;

/// Share of velocity and acceleration planned for where a plan has to be slowed down; the rest absorbs that the
/// filter samples the plan at the control rate.
const PACE_MARGIN: f64 = 0.9;

/// Knots of position and velocity, cubic in between (C1). The first knot is the moment of adoption, the others lie on
/// the grid of the chunk, `dt` apart. After the last one the curve brakes to rest. Times are seconds since the first knot.
#[derive(Debug, Clone)]
pub(crate) struct Curve {
    joints: usize,
    first: f64,
    dt: f64,
    len: usize,
    q: Vec<f64>,
    v: Vec<f64>,
    /// Square of the highest pace allowed at each knot, at most 1.
    pace2: Vec<f64>,
    /// Joint that limits the pace in the segment that ends at each knot.
    limiting: Vec<u8>,
}

impl Curve {
    /// An empty curve with room for `knots` knots.
    pub(crate) fn with_room(joints: usize, knots: usize) -> Self {
        Self {
            joints,
            first: 0.0,
            dt: 1.0,
            len: 0,
            q: vec![0.0; joints * knots],
            v: vec![0.0; joints * knots],
            pace2: vec![1.0; knots],
            limiting: vec![0; knots],
        }
    }

    /// Starts a new curve; the second knot will lie `first` seconds after the first, further ones `dt` apart.
    pub(crate) fn begin(&mut self, first: f64, dt: f64) {
        (self.first, self.dt, self.len) = (first, dt, 0);
    }

    /// Adds a knot to be filled in: its positions and velocities. `None` when there is no room.
    pub(crate) fn push(&mut self) -> Option<(&mut [f64], &mut [f64])> {
        let k = self.len;
        if k >= self.pace2.len() {
            return None;
        }
        self.len += 1;
        self.pace2[k] = 1.0;
        let range = k * self.joints..(k + 1) * self.joints;
        Some((&mut self.q[range.clone()], &mut self.v[range]))
    }

    /// Seconds from start to the last knot.
    pub(crate) fn end(&self) -> f64 {
        match self.len {
            0 | 1 => 0.0,
            n => self.first + (n - 2) as f64 * self.dt,
        }
    }

    /// Segment that holds `x`, the time since its first knot, and its length. Needs at least two knots.
    fn locate(&self, x: f64) -> (usize, f64, f64) {
        if x < self.first || self.len == 2 {
            return (0, x.clamp(0.0, self.first), self.first);
        }
        let k = (((x - self.first) / self.dt) as usize).min(self.len - 3);
        (k + 1, (x - self.first - k as f64 * self.dt).min(self.dt), self.dt)
    }

    /// Position and velocity at `x` seconds; beyond the end it brakes with `bounds`.
    pub(crate) fn sample(&self, x: f64, bounds: &[Bound], q: &mut [f64], v: &mut [f64]) {
        let n = self.joints;
        let (q, v) = (&mut q[..n], &mut v[..n]);
        let end = self.end();
        if self.len < 2 || x > end {
            let last = self.len.saturating_sub(1) * n;
            for j in 0..n {
                (q[j], v[j]) = coast(self.q[last + j], self.v[last + j], &bounds[j], x - end);
            }
            return;
        }
        let (k, t, h) = self.locate(x);
        let basis = Hermite::at(t, h);
        let (q0, q1) = (&self.q[k * n..(k + 1) * n], &self.q[(k + 1) * n..(k + 2) * n]);
        let (v0, v1) = (&self.v[k * n..(k + 1) * n], &self.v[(k + 1) * n..(k + 2) * n]);
        for j in 0..n {
            (q[j], v[j]) = basis.eval(q0[j], v0[j], q1[j], v1[j]);
        }
    }

    /// Highest pace at `x` seconds: 1 follows the plan as it is dated, less than 1 slows all joints alike. Also the
    /// joint that asks for it.
    pub(crate) fn pace(&self, x: f64) -> (f64, usize) {
        if self.len < 2 || x >= self.end() {
            return (1.0, 0);
        }
        let (k, t, h) = self.locate(x);
        let (a, b) = (self.pace2[k], self.pace2[k + 1]);
        if a == 1.0 && b == 1.0 {
            return (1.0, 0);
        }
        ((a + (b - a) * t / h).sqrt(), self.limiting[k + 1] as usize)
    }

    /// Computes the pace: along a path followed at pace s, velocities scale with s and accelerations are
    /// `q''·s² + q'·ds/dt`. Each segment gets the highest s that keeps both for all joints, then a pass backwards
    /// makes sure that the next slow segment can be reached in time (time-optimal path parametrisation, with s²
    /// linear in a segment).
    pub(crate) fn plan_pace(&mut self, bounds: &[Bound]) {
        let n = self.joints;
        if self.len < 2 {
            return;
        }
        self.pace2[..self.len].fill(1.0);
        for k in (0..self.len - 1).rev() {
            let h = if k == 0 { self.first } else { self.dt };
            let next = self.pace2[k + 1];
            let (mut cap, mut limiting, mut rise) = (1.0f64, 0, f64::INFINITY);
            for (j, b) in bounds.iter().enumerate().take(n) {
                let (i0, i1) = (k * n + j, (k + 1) * n + j);
                let (v0, v1, slope) = (self.v[i0], self.v[i1], (self.q[i1] - self.q[i0]) / h);
                let a0 = (6.0 * slope - 4.0 * v0 - 2.0 * v1) / h;
                let a1 = (-6.0 * slope + 2.0 * v0 + 4.0 * v1) / h;
                let bend = a0.abs().max(a1.abs());
                let mut speed = v0.abs().max(v1.abs());
                if a0 * a1 < 0.0 {
                    let t = h * a0 / (a0 - a1);
                    speed = speed.max((v0 + 0.5 * a0 * t).abs());
                }
                let mut own = 1.0f64;
                if speed > b.velocity * (1.0 + 1e-9) {
                    own = own.min((PACE_MARGIN * b.velocity / speed).powi(2));
                }
                if bend > b.acceleration * (1.0 + 1e-9) {
                    own = own.min(PACE_MARGIN * b.acceleration / bend);
                }
                if own < cap {
                    (cap, limiting) = (own, j);
                }
                if next < 1.0 {
                    let spare = (PACE_MARGIN * b.acceleration - bend * next).max(0.0);
                    rise = rise.min(spare / (bend + 0.5 * speed / h).max(1e-12));
                }
            }
            if next < 1.0 && next + rise < cap {
                // Slowed for what comes after it, by the joint that has to be slow there.
                (cap, limiting) = (next + rise, self.limiting[k + 2] as usize);
            }
            // A knot belongs to two segments: both caps hold there.
            self.pace2[k] = cap;
            self.pace2[k + 1] = next.min(cap);
            self.limiting[k + 1] = limiting as u8;
        }
    }
}

/// Braking from `(q, v)` at full acceleration for `t` seconds.
pub(crate) fn coast(q: f64, v: f64, bound: &Bound, t: f64) -> (f64, f64) {
    let a = bound.acceleration;
    let t = t.clamp(0.0, if a > 0.0 { v.abs() / a } else { 0.0 });
    let left = v - (a * t).copysign(v);
    ((q + 0.5 * (v + left) * t).clamp(bound.min, bound.max), if t * a >= v.abs() { 0.0 } else { left })
}

/// Smooth step from 0 to 1 over `span` seconds (C1), and its derivative.
pub(crate) fn smooth(t: f64, span: f64) -> (f64, f64) {
    let y = t / span;
    if y.is_nan() || y <= 0.0 {
        (0.0, 0.0)
    } else if y >= 1.0 {
        (1.0, 0.0)
    } else {
        (y * y * (3.0 - 2.0 * y), 6.0 * y * (1.0 - y) / span)
    }
}

/// Writes the velocities at the actions of a chunk: central differences, as a Catmull-Rom spline has them, one-sided at
/// the ends. `q` and `v` are `[horizon, joints]`. Actions on a position limit get velocity zero, and those beside one
/// at most three times the slope towards it: the most that does not overshoot (Fritsch and Carlson 1980).
pub(crate) fn tangents(q: &[f64], joints: usize, dt: f64, bounds: &[Bound], v: &mut [f64]) {
    let horizon = q.len() / joints.max(1);
    for (j, l) in bounds.iter().enumerate().take(joints) {
        let at = |i: usize| q[i * joints + j];
        let on_limit = |i: usize| at(i) <= l.min || at(i) >= l.max;
        for i in 0..horizon {
            let (a, b) = (i.saturating_sub(1), (i + 1).min(horizon - 1));
            let mut slope = if a == b || on_limit(i) { 0.0 } else { (at(b) - at(a)) / ((b - a) as f64 * dt) };
            for (near, rise) in [(a, at(i) - at(a)), (b, at(b) - at(i))] {
                if near != i && on_limit(near) {
                    let steepest = 3.0 * rise / dt;
                    slope = slope.max(steepest.min(0.0)).min(steepest.max(0.0));
                }
            }
            v[i * joints + j] = slope;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::joints::JointVector;
    use super::super::pace::State;
    use super::super::status::{Interventions, Rule};
    use super::*;

    const BOUND: Bound = Bound { min: -2.0, max: 2.0, velocity: 1.0, acceleration: 5.0 };

    #[test]
    fn velocities_at_actions_are_central_differences_and_do_not_overshoot_a_limit() {
        let q = [0.0, 0.0, 1.0, 1.5, 2.0, 2.0, 1.9, 0.0];
        let mut v = [f64::NAN; 8];
        tangents(&q, 1, 0.5, &[BOUND], &mut v);
        // 1.5 lies beside the limit: 1.0/1.0 is below three times the slope of 1; 1.9 is held to three times -0.2.
        assert_eq!(v.map(|v| (v * 1e9).round() / 1e9), [0.0, 1.0, 1.5, 1.0, 0.0, 0.0, -0.6, -3.8]);
        // Before a limit as after it, on both sides.
        for side in [1.0, -1.0] {
            let mut v = [f64::NAN; 4];
            tangents(&[0.0, 1.9, 2.0, 2.0].map(|q| side * q), 1, 0.5, &[BOUND], &mut v);
            assert_eq!(v.map(|v| (side * v * 1e9).round() / 1e9), [3.8, 0.6, 0.0, 0.0]);
            // It turns on the limit, whatever is beside it; one action has no slope.
            let mut v = [f64::NAN; 3];
            tangents(&[0.0, 2.0, 1.0].map(|q| side * q), 1, 0.5, &[BOUND], &mut v);
            assert_eq!(v.map(|v| side * v), [4.0, 0.0, -2.0]);
            tangents(&[0.3], 1, 0.5, &[BOUND], &mut v[..1]);
            assert_eq!(v[0], 0.0);
        }
    }

    #[test]
    fn a_blend_starts_and_ends_with_no_slope() {
        assert_eq!([smooth(-1.0, 2.0), smooth(0.0, 2.0), smooth(2.0, 2.0)], [(0.0, 0.0), (0.0, 0.0), (1.0, 0.0)]);
        assert_eq!(smooth(1.0, 2.0), (0.5, 0.75));
        assert_eq!(smooth(0.0, 0.0), (0.0, 0.0));
    }

    #[test]
    fn coasting_brakes_to_rest_and_stays() {
        for (t, q, v) in [(0.0, 0.5, 1.0), (0.1, 0.575, 0.5), (0.2, 0.6, 0.0), (9.0, 0.6, 0.0)] {
            let (a, b) = coast(0.5, 1.0, &BOUND, t);
            assert!((a - q).abs() < 1e-12 && (b - v).abs() < 1e-12, "{t}: {a} {b}");
            let (a, b) = coast(-0.5, -1.0, &BOUND, t);
            assert!((a + q).abs() < 1e-12 && (b + v).abs() < 1e-12, "{t}: {a} {b}");
        }
        assert_eq!(coast(0.5, 1.0, &Bound { acceleration: 0.5, ..BOUND }, 1.0), (1.25, 0.5), "it takes two seconds");
        assert_eq!(coast(0.5, 0.0, &Bound { acceleration: 0.0, ..BOUND }, 1.0), (0.5, 0.0), "no limit is known");
    }

    /// Two joints on a line, the second twice as fast the other way; 25 ms to the second of `knots`, then 50 ms each.
    fn line(knots: usize) -> Curve {
        let mut curve = Curve::with_room(2, knots);
        curve.begin(0.025, 0.05);
        for k in 0..knots {
            let t = if k == 0 { 0.0 } else { 0.025 + 0.05 * (k - 1) as f64 };
            let (q, v) = curve.push().unwrap();
            q.copy_from_slice(&[0.4 * t, -0.8 * t]);
            v.copy_from_slice(&[0.4, -0.8]);
        }
        curve.plan_pace(&[BOUND; 2]);
        curve
    }

    #[test]
    fn a_curve_is_followed_to_its_last_knot_and_brakes_beyond_it() {
        for knots in 1..6 {
            let curve = line(knots);
            let end = if knots == 1 { 0.0 } else { 0.025 + 0.05 * (knots - 2) as f64 };
            assert!((curve.end() - end).abs() < 1e-12);
            // At 5 rad/s² the joints need 80 and 160 ms to stop.
            for (t, left, gone) in [(0.04, [0.2, -0.6], [0.012, -0.028]), (1.0, [0.0, 0.0], [0.016, -0.064])] {
                let (mut q, mut v) = ([0.0; 2], [0.0; 2]);
                curve.sample(end + t, &[BOUND; 2], &mut q, &mut v);
                for j in 0..2 {
                    let at = [0.4, -0.8][j] * end + gone[j];
                    assert!((q[j] - at).abs() < 1e-9 && (v[j] - left[j]).abs() < 1e-9, "{knots} knots: {q:?} {v:?}");
                }
            }
            let (mut q, mut v) = ([0.0; 2], [0.0; 2]);
            for i in 0..=20 {
                let x = end * f64::from(i) / 20.0;
                curve.sample(x, &[BOUND; 2], &mut q, &mut v);
                assert!(
                    (q[0] - 0.4 * x).abs() < 1e-12 && (q[1] + 0.8 * x).abs() < 1e-12,
                    "{knots} knots at {x}: {q:?}"
                );
                assert!((v[0] - 0.4).abs() < 1e-9 && (v[1] + 0.8).abs() < 1e-9);
                assert_eq!(curve.pace(x), (1.0, 0));
            }
        }
    }

    #[test]
    fn each_segment_is_slowed_by_the_joint_that_needs_it_most_and_names_it() {
        // Velocities of two joints at three knots; 1 rad/s is allowed, of which nine tenths are planned for.
        let slow = Bound { acceleration: 1e6, ..BOUND };
        for (speeds, paces) in [
            ([[3.0, 2.0], [3.0, 2.0], [1.0, 2.0]], [(0.3, 0), (0.3, 0)]),
            ([[3.0, 0.5], [0.5, 0.5], [0.5, 1.5]], [(0.3, 0), (0.6, 1)]),
            ([[0.5, 0.5], [0.5, 0.5], [0.5, 1.5]], [(1.0, 0), (0.6, 1)]),
            ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [(1.0, 0), (1.0, 0)]),
        ] {
            let mut curve = Curve::with_room(2, 3);
            curve.begin(0.1, 0.1);
            let mut at = [0.0; 2];
            for k in 0..3 {
                for j in 0..2 {
                    at[j] += if k == 0 { 0.0 } else { 0.05 * (speeds[k - 1][j] + speeds[k][j]) };
                }
                let (q, v) = curve.push().unwrap();
                q.copy_from_slice(&at);
                v.copy_from_slice(&speeds[k]);
            }
            curve.plan_pace(&[slow; 2]);
            for (x, (pace, joint)) in [(1e-9, paces[0]), (0.2 - 1e-9, paces[1])] {
                let (found, by) = curve.pace(x);
                assert!((found - pace).abs() < 1e-3 && by == joint, "{speeds:?} at {x}: {found} by {by}");
            }
            assert_eq!(curve.pace(0.2), (1.0, 0), "it is over");
        }
        let mut two = Curve::with_room(1, 2);
        two.begin(0.1, 0.1);
        for k in 0..2 {
            let (q, v) = two.push().unwrap();
            (q[0], v[0]) = (0.3 * f64::from(k), 3.0);
        }
        assert!(two.push().is_none(), "no room");
        two.plan_pace(&[slow]);
        assert!((two.pace(0.05).0 - 0.3).abs() < 1e-9);
        // Slow at both knots and 2 rad/s between them.
        let mut fast_between = Curve::with_room(1, 2);
        fast_between.begin(0.1, 0.1);
        for k in 0..2 {
            let (q, v) = fast_between.push().unwrap();
            (q[0], v[0]) = (0.15 * f64::from(k), 0.5);
        }
        fast_between.plan_pace(&[slow]);
        assert!((fast_between.pace(0.05).0 - 0.45).abs() < 1e-9, "{}", fast_between.pace(0.05).0);
        let mut none = Curve::with_room(1, 2);
        none.plan_pace(&[slow]);
        assert_eq!((none.pace(0.0), none.end()), ((1.0, 0), 0.0));
    }

    #[test]
    fn towards_a_slow_segment_the_pace_falls_as_fast_as_braking_allows_and_no_faster() {
        let (h, bound) = (0.1, Bound { velocity: 10.0, acceleration: 1.0, ..BOUND });
        // On a line, and on a parabola that takes half of the acceleration by itself.
        for bend in [0.0, 0.5] {
            let mut curve = Curve::with_room(2, 9);
            curve.begin(h, h);
            let (mut at, mut before) = (0.0, 0.0);
            for k in 0..9 {
                // The last segment needs twenty times the acceleration that there is.
                let speed = 0.8 + bend * h * f64::from(k) + if k == 8 { 2.0 } else { 0.0 };
                at += if k == 0 { 0.0 } else { 0.5 * (before + speed) * h };
                before = speed;
                let (q, v) = curve.push().unwrap();
                q.copy_from_slice(&[0.0, at]);
                v.copy_from_slice(&[0.0, speed]);
            }
            curve.plan_pace(&[bound; 2]);
            let mut braking = 0;
            for k in 0..7 {
                let (here, next) = (curve.pace2[k], curve.pace2[k + 1]);
                assert!(here > next || here == 1.0, "{:?}", curve.pace2);
                // Along the path: its own bend at this pace, and the pace's fall over the segment.
                let needed = bend * here + 0.5 * curve.v[2 * k + 3] * (here - next) / h;
                if here < 1.0 {
                    assert!((needed - 0.9).abs() < 1e-9, "{needed} of 1 at knot {k}: {:?}", curve.pace2);
                    assert_eq!(curve.limiting[k + 1], 1, "the joint that has to be slow there");
                    braking += 1;
                } else {
                    assert!(needed <= 0.9 + 1e-9, "{needed} of 1 at knot {k}: {:?}", curve.pace2);
                }
            }
            assert!(braking > 2, "{:?}", curve.pace2);
        }
    }

    #[test]
    fn between_two_knots_the_square_of_the_pace_is_between_theirs() {
        let rng = &mut ChaCha8Rng::seed_from_u64(6);
        let mut slowed = [0; 4];
        for _ in 0..200 {
            let curve = random_curve(rng);
            for k in 0..38 {
                let pace = |part: f64| curve.pace((f64::from(k) + part) * 0.05).0;
                // A knot is asked for from its own segment.
                let (from, to) = (pace(1e-9), pace(1.0 - 1e-9));
                let half = 0.5 * (from * from + to * to);
                assert!((pace(0.5).powi(2) - half).abs() < 1e-6, "{from}, {}, {to}", pace(0.5));
                slowed[usize::from(from < 0.999) + 2 * usize::from(to < 0.999)] += 1;
            }
        }
        assert!(slowed.iter().all(|n| *n > 10), "{slowed:?}");
    }

    #[test]
    fn from_rest_the_pace_rises_as_fast_as_the_acceleration_allows() {
        // A straight line at half a radian per second: with 5 rad/s² and periods of 20 ms that takes five of them.
        let mut curve = Curve::with_room(1, 20);
        curve.begin(0.1, 0.1);
        for k in 0..20 {
            let (q, v) = curve.push().unwrap();
            (q[0], v[0]) = (0.05 * f64::from(k), 0.5);
        }
        curve.plan_pace(&[BOUND]);
        let mut state = State::rest(JointVector::zeros(1));
        for k in 1..=7 {
            state.follow(&curve, &[BOUND], 0.02, None);
            let pace = (0.2 * f64::from(k)).min(1.0);
            assert!((state.pace - pace).abs() < 1e-9, "{} after {k} periods", state.pace);
        }
    }

    /// Three joints on a random smooth path, up to several times too fast.
    fn random_curve(rng: &mut ChaCha8Rng) -> Curve {
        let (joints, horizon, dt) = (3, 40, 0.05);
        let waves: Vec<(f64, f64, f64)> = (0..joints)
            .map(|_| (rng.random_range(0.0..0.6), rng.random_range(0.5..7.0), rng.random_range(0.0..6.0)))
            .collect();
        let q: Vec<f64> = (0..horizon * joints)
            .map(|k| {
                let (a, w, p) = waves[k % joints];
                a * ((k / joints) as f64 * dt * w + p).sin()
            })
            .collect();
        let mut v = vec![0.0; q.len()];
        tangents(&q, joints, dt, &[BOUND; 3], &mut v);
        let mut curve = Curve::with_room(joints, horizon);
        curve.begin(dt, dt);
        for k in 0..horizon {
            let (kq, kv) = curve.push().unwrap();
            kq.copy_from_slice(&q[k * joints..(k + 1) * joints]);
            kv.copy_from_slice(&v[k * joints..(k + 1) * joints]);
        }
        curve.plan_pace(&[BOUND; 3]);
        curve
    }

    #[test]
    fn a_plan_that_is_too_fast_is_slowed_enough_to_stay_on_its_path() {
        let rng = &mut ChaCha8Rng::seed_from_u64(5);
        let (mut scaled, mut backstop, mut steps) = (0, 0, 0);
        for _ in 0..300 {
            let curve = random_curve(rng);
            let bounds = [BOUND; 3];
            let mut s = State::rest(JointVector::zeros(3));
            s.pace = curve.pace(0.0).0;
            curve.sample(0.0, &bounds, &mut s.q, &mut s.v);
            let pace = s.pace;
            s.v.iter_mut().for_each(|v| *v *= pace);
            let mut tally = Interventions::default();
            let (mut lag, mut ticks) = (0.0, 0);
            while curve.end() - s.x > 0.02 {
                let x = s.x;
                s.follow(&curve, &bounds, 0.02, Some(&mut tally));
                lag += 0.02 - (s.x - x);
                ticks += 1;
                assert!(ticks < 2000, "it goes on: {s:?}");
            }
            steps += ticks;
            scaled += tally.by_rule(Rule::Scaled);
            backstop += tally.by_rule(Rule::Velocity) + tally.by_rule(Rule::Acceleration);
            assert!(lag > -1e-9);
        }
        assert!(scaled > steps / 4, "{scaled} of {steps}");
        assert_eq!(backstop, 0, "the path was left");
    }
}
