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
            let x = self.x + h;
            curve.sample(x, bounds, &mut q, &mut v);
            if let Some(untouched) = self.keeps(bounds, &q, &v, h) {
                return self.land(bounds, (&q, &v), Step { x, pace: 1.0, limiting, untouched }, h, tally);
            }
        }
        // The pace changes by what the accelerations allow; the highest that keeps all joints on the path is taken.
        curve.sample(self.x, bounds, &mut q, &mut v);
        let change =
            bounds.iter().zip(v.iter()).map(|(b, v)| b.acceleration * h / v.abs().max(1e-12)).fold(1.0, f64::min);
        let high = cap.min(self.pace + change);
        let low = (self.pace - change).max(0.0).min(high);
        let target = |pace: f64, q: &mut [f64], v: &mut [f64]| {
            let x = self.x + 0.5 * (self.pace + pace) * h;
            curve.sample(x, bounds, q, v);
            v.iter_mut().for_each(|v| *v *= pace);
            x
        };
        let step = (0..=4).find_map(|k| {
            let pace = high - (high - low) * 0.25 * f64::from(k);
            let x = target(pace, &mut q, &mut v);
            self.keeps(bounds, &q, &v, h).map(|untouched| Step { x, pace, limiting, untouched })
        });
        let step =
            step.unwrap_or_else(|| Step { x: target(high, &mut q, &mut v), pace: high, limiting, untouched: false });
        self.land(bounds, (&q, &v), step, h, tally);
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

    /// Takes the step: joints that may go to `(q, v)` do so untouched, the others approach it within their limits.
    fn land(
        &mut self,
        bounds: &[Bound],
        (q, v): (&[f64], &[f64]),
        step: Step,
        h: f64,
        mut tally: Option<&mut Interventions>,
    ) {
        let mut count = |joint, rule| {
            if let Some(t) = tally.as_deref_mut() {
                t.count(joint, rule);
            }
        };
        if step.pace < 1.0 {
            count(step.limiting, Rule::Scaled);
        }
        for (j, b) in bounds.iter().enumerate() {
            let verdict = if step.untouched { Ok(()) } else { b.allows(self.q[j], self.v[j], q[j], v[j], h) };
            match verdict {
                Ok(()) => (self.q[j], self.v[j]) = (q[j].max(b.min).min(b.max), v[j]),
                Err(breach) => {
                    (self.q[j], self.v[j]) = b.approach(self.q[j], self.v[j], q[j], v[j], h);
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
        (self.x, self.pace) = (step.x, step.pace);
    }
}

/// Where the reference is at the end of a step, and which joint limits its pace.
#[derive(Debug, Clone, Copy)]
struct Step {
    x: f64,
    pace: f64,
    limiting: usize,
    /// Whether every joint is known to take it as it is.
    untouched: bool,
}
