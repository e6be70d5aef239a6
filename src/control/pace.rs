//! One period along the reference: all joints together at the highest pace that keeps them on the path, else each joint
//! on its own.

use super::curve::Curve;
use super::filter::{Bound, Breach};
use super::joints::JointVector;
use super::status::{Interventions, Rule};

/// Positions, velocities, plan time (seconds since the curve's start) and pace at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    pub(crate) q: JointVector,
    pub(crate) v: JointVector,
    pub(crate) x: f64,
    pub(crate) pace: f64,
}

impl State {
    /// At rest in `q`.
    pub(crate) fn rest(q: JointVector) -> Self {
        Self { q, v: JointVector::zeros(q.len()), x: 0.0, pace: 0.0 }
    }

    /// One period of braking.
    pub(crate) fn brake(&mut self, bounds: &[Bound], h: f64) {
        for (j, b) in bounds.iter().enumerate() {
            (self.q[j], self.v[j]) = b.brake(self.q[j], self.v[j], h);
        }
        self.pace = 0.0;
    }

    /// One period along `curve`. Interventions are counted where a tally is given.
    pub(crate) fn follow(&mut self, curve: &Curve, bounds: &[Bound], h: f64, tally: Option<&mut Interventions>) {
        let (mut q, mut v) = (self.q, self.v);
        let (here, there) = (curve.pace(self.x), curve.pace(self.x + self.pace * h));
        let (cap, limiting) = if here.0 < there.0 { here } else { there };
        if self.pace == 1.0 && cap == 1.0 {
            curve.sample(self.x + h, bounds, &mut q, &mut v);
            if let Some(untouched) = self.keeps(bounds, &q, &v, h) {
                let target = Target { x: self.x + h, pace: 1.0, q, v, limiting, untouched };
                return self.land(bounds, target, h, tally);
            }
        }
        // The pace changes by what the accelerations allow; the highest that keeps all joints on the path is taken.
        curve.sample(self.x, bounds, &mut q, &mut v);
        let change =
            bounds.iter().zip(v.iter()).map(|(b, v)| b.acceleration * h / v.abs().max(1e-12)).fold(1.0, f64::min);
        let high = cap.min(self.pace + change);
        let low = (self.pace - change).max(0.0).min(high);
        let mut at = |pace: f64| {
            let x = self.x + 0.5 * (self.pace + pace) * h;
            curve.sample(x, bounds, &mut q, &mut v);
            v.iter_mut().for_each(|v| *v *= pace);
            Target { x, pace, q, v, limiting, untouched: false }
        };
        let target = (0..=4)
            .map(|k| at(high - (high - low) * 0.25 * f64::from(k)))
            .find_map(|t| self.keeps(bounds, &t.q, &t.v, h).map(|untouched| Target { untouched, ..t }))
            .unwrap_or_else(|| at(high));
        self.land(bounds, target, h, tally);
    }

    /// Whether all joints can take the step within velocity and acceleration; positions are each joint's own affair.
    /// True if none of them minds, false if only positions are in the way, `None` if it cannot be taken.
    fn keeps(&self, bounds: &[Bound], q: &[f64], v: &[f64], h: f64) -> Option<bool> {
        let mut untouched = true;
        for (j, b) in bounds.iter().enumerate() {
            match b.allows(self.q[j], self.v[j], q[j], v[j], h) {
                Ok(()) => {}
                Err(Breach::Position) => untouched = false,
                Err(_) => return None,
            }
        }
        Some(untouched)
    }

    /// Takes the step: joints that may go to the target do so untouched, the others approach it within their limits.
    fn land(&mut self, bounds: &[Bound], target: Target, h: f64, mut tally: Option<&mut Interventions>) {
        let mut count = |joint, rule| {
            if let Some(t) = tally.as_deref_mut() {
                t.count(joint, rule);
            }
        };
        if target.pace < 1.0 {
            count(target.limiting, Rule::Scaled);
        }
        for (j, b) in bounds.iter().enumerate() {
            let (q, v) = (target.q[j], target.v[j]);
            let verdict = if target.untouched { Ok(()) } else { b.allows(self.q[j], self.v[j], q, v, h) };
            match verdict {
                Ok(()) => (self.q[j], self.v[j]) = (q.max(b.min).min(b.max), v),
                Err(breach) => {
                    (self.q[j], self.v[j]) = b.approach(self.q[j], self.v[j], q, v, h);
                    count(
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
        (self.x, self.pace) = (target.x, target.pace);
    }
}

/// Where the reference is at the end of a step, and which joint limits its pace.
#[derive(Debug, Clone, Copy)]
struct Target {
    x: f64,
    pace: f64,
    q: JointVector,
    v: JointVector,
    limiting: usize,
    /// Whether every joint is known to take it as it is.
    untouched: bool,
}
