//! From a waiting chunk to the running plan: when it is due, how it is dated, how it is blended in.

use super::config::{MissPolicy, Seam};
use super::curve::{coast, smooth, tangents};
use super::io::{Adoption, TickInput, TickReport};
use super::joints::JointVector;
use super::mode::Mode;
use super::pace::State;
use super::reason::{ChunkRefusal, Reason};
use super::status::{PlanView, Rule};
use super::tick::{Controller, Motion};
use super::window::Hermite;
use crate::clock::RosTime;

/// Part of `dt` that the first segment of an adopted plan has at least.
const FIRST_SEGMENT: f64 = 0.25;

/// The blend from where the motion began to the plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ramp {
    start: RosTime,
    span: f64,
    q: JointVector,
    v: JointVector,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) view: PlanView,
    pub(crate) oldest_image_stamp: RosTime,
}

impl Controller {
    /// Adopts what is due, and notices when the plan has run out.
    pub(crate) fn follow(&mut self, input: &TickInput<'_>, motion: &mut Motion, report: &mut TickReport) {
        let now = input.ros_now;
        if self.mode == Mode::Ramp && self.ramp.is_none_or(|r| now.seconds_since(r.start) >= r.span) {
            self.ramp = None;
            self.enter(Mode::Run);
        }
        // However slowly it is followed: what was seen longer ago than a chunk may be old and last is not acted upon.
        let oldest = self.config.max_chunk_age + self.config.horizon as f64 * self.config.dt;
        let outdated = self.plan.is_some_and(|p| now.seconds_since(p.view.state_stamp) > oldest);
        let exhausted = outdated || self.exhausted(&motion.base);
        let due = match &mut self.plan {
            Some(plan) => {
                let view = &mut plan.view;
                let late = now.seconds_since(view.next_adoption) + motion.ahead;
                let due = late >= -1e-9;
                if due && !self.pending.present {
                    // It waits for the next point of the grid.
                    let steps = (late / view.dt + 1e-9).floor() + 1.0;
                    view.next_adoption = view.next_adoption.plus_seconds(steps * view.dt);
                }
                due || exhausted
            }
            None => true,
        };
        if due && self.pending.present {
            match self.pending.age(&self.gate, now).and_then(|()| self.adopt(now, motion)) {
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
    pub(crate) fn exhausted(&self, state: &State) -> bool {
        self.plan.is_none() || self.curve.end() - state.x < self.config.period * (1.0 - 1e-6)
    }

    fn crossfade(&self) -> f64 {
        self.config.crossfade_steps as f64 * self.config.dt
    }

    /// Makes the waiting chunk the running plan: dates it, blends it in, and plans the pace.
    pub(crate) fn adopt(&mut self, now: RosTime, motion: &mut Motion) -> Result<Adoption, ChunkRefusal> {
        let (n, horizon, dt) = (self.bounds.len(), self.config.horizon, self.config.dt);
        let (stamp, running) = (self.pending.state_stamp, self.plan.is_some());
        // The seam is at the point that the robot is promised already.
        let (base, ahead) = (motion.base, motion.ahead);
        let seam = now.plus_seconds(ahead);
        let too_old = ChunkRefusal::TooOld { age: now.seconds_since(stamp), max: self.config.max_chunk_age };
        let used_ahead = if running { base.x - motion.here.x } else { 0.0 };
        let lost_ahead = ((ahead - used_ahead) * 1e9).round() as i64;
        let lost = self.consumption.lost_since(stamp).ok_or(too_old)?.saturating_add(lost_ahead);
        let origin = RosTime(stamp.0.saturating_add(lost));
        let used = now.seconds_since(origin) + ahead;
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
        let (mut q0, mut v0) = (base.q, base.v);
        if running {
            self.curve.sample(base.x, &self.bounds, &mut q0, &mut v0);
            v0.iter_mut().for_each(|v| *v *= base.pace);
        }
        // There is an action after it: the first of the plan.
        let i = (used / dt) as usize;
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
            self.ramp = Some(Ramp { start: seam, span: span.max(least).max(self.config.period), q: q0, v: v0 });
        }

        self.spare.begin(first, dt);
        if let Some((q, v)) = self.spare.push() {
            q.copy_from_slice(&q0);
            v.copy_from_slice(&v0);
        }
        let fade = if running && self.config.seam != Seam::None { crossfade } else { 0.0 };
        let (mut old_q, mut old_v) = (q0, v0);
        for k in first_index..horizon {
            let t = first + (k - first_index) as f64 * dt;
            let Some((q, v)) = self.spare.push() else { break };
            q.copy_from_slice(&positions[k * n..(k + 1) * n]);
            v.copy_from_slice(&self.velocities[k * n..(k + 1) * n]);
            if let Some(ramp) = &self.ramp {
                let since = t + seam.seconds_since(ramp.start);
                let (w, dw) = smooth(since, ramp.span);
                if w < 1.0 {
                    for j in 0..n {
                        let (hold, drift) = coast(ramp.q[j], ramp.v[j], &self.bounds[j], since);
                        blend(&mut q[j], &mut v[j], hold, drift, w, dw);
                    }
                }
            }
            let (w, dw) = smooth(t, fade);
            if w < 1.0 {
                self.curve.sample(base.x + t, &self.bounds, &mut old_q, &mut old_v);
                for j in 0..n {
                    blend(&mut q[j], &mut v[j], old_q[j], old_v[j], w, dw);
                }
            }
            for ((q, v), b) in q.iter_mut().zip(v).zip(&self.bounds) {
                if *q <= b.min || *q >= b.max {
                    (*q, *v) = (q.max(b.min).min(b.max), 0.0);
                }
            }
        }
        self.spare.plan_pace(&self.bounds);
        std::mem::swap(&mut self.curve, &mut self.spare);
        // Plan time counts from the seam; what is used up to there is before it.
        motion.here.x = -used_ahead;
        (motion.base.x, motion.base.pace) = (0.0, 1.0);

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
                adopted_at: seam,
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
}

/// `(q, v)` becomes the blend from `(from, drift)` to itself with weight `w` and its derivative `dw`.
fn blend(q: &mut f64, v: &mut f64, from: f64, drift: f64, w: f64, dw: f64) {
    *v = drift + w * (*v - drift) + dw * (*q - from);
    *q = from + w * (*q - from);
}
