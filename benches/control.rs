//! How long the control thread's own work takes: `cargo bench --bench control`.
//!
//! Every iteration is one tick of a running plan of 50 actions for 16 joints, a window of 200 ms with its braking tail
//! included, and only the tick itself is timed. In between runs a closed loop: the robot is where it was told to be, and
//! every fifth tick brings a chunk, of which every second one is adopted (`replan_steps` 10 at dt = one period).

#[path = "../tests/control_common/mod.rs"]
mod control_common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use control_common::{World, chunk, limits};
use criterion::Criterion;
use pi0_mps::clock::{Monotonic, RosTime};
use pi0_mps::control::{
    ActionChunk, ControlConfig, Controller, InputHealth, JointVector, Lifecycle, Measured, Requests, TickInput, Window,
};

const JOINTS: usize = 16;
const HORIZON: usize = 50;
const PERIOD: f64 = 0.02;
/// Ticks between chunks.
const CHUNK_EVERY: u64 = 5;

/// What a tick did beside following the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing.
    Plain,
    /// Checked and copied a chunk.
    Received,
    /// Checked and copied a chunk, and merged it into the running plan.
    Adopted,
}

/// An armed controller in a closed loop.
struct Loop {
    controller: Controller,
    window: Window,
    config: ControlConfig,
    now: RosTime,
    start: RosTime,
    ticks: u64,
    /// Frequency of the policy's sine, rad/s: 0.5 is followed as it is, 9 has to be slowed down.
    speed: f64,
}

impl Loop {
    fn new(speed: f64) -> Self {
        let mut config = ControlConfig::new((0..JOINTS).map(|j| format!("j{j}")), PERIOD, PERIOD, HORIZON);
        for joint in &mut config.joints {
            joint.limits = limits(2.0, 8.0);
        }
        config.replan_steps = 10;
        let mut world = World::new(config.clone());
        world.arm(|t, j| action(speed, t, j));
        let World { controller, window, now, .. } = world;
        Self { controller, window, config, now, start: now, ticks: 0, speed }
    }

    fn chunk(&self, sequence: u64) -> ActionChunk {
        let (at, speed) = (self.now.seconds_since(self.start), self.speed);
        chunk(&self.config, sequence, self.now, |t, j| action(speed, at + t, j))
    }

    /// One tick: what it did and how long that took.
    fn step(&mut self) -> (Kind, Duration) {
        self.ticks += 1;
        self.now = self.now.plus_seconds(PERIOD);
        let given = self.ticks.is_multiple_of(CHUNK_EVERY).then(|| self.chunk(100 + self.ticks));
        let mut measured = Measured { ages: JointVector::filled(JOINTS, 0.001), ..Measured::missing(JOINTS) };
        measured.positions.fill(0.0);
        measured.positions.copy_from_slice(self.window.sample(PERIOD).0.as_ref());
        let input = TickInput {
            ros_now: self.now,
            mono_now: Monotonic(0),
            skipped: 0,
            measured,
            inputs: InputHealth::Ok,
            lifecycle: Lifecycle::Ready,
            chunk: given.as_ref(),
            requests: Requests::default(),
        };
        let start = Instant::now();
        let report = black_box(self.controller.tick(black_box(&input), &mut self.window));
        let took = start.elapsed();
        assert!(report.published, "the loop fell out of motion: {report:?}");
        let kind = match (report.adoption, given) {
            (Some(_), _) => Kind::Adopted,
            (None, Some(_)) => Kind::Received,
            (None, None) => Kind::Plain,
        };
        (kind, took)
    }

    /// Time of the next `n` ticks of one kind.
    fn time(&mut self, wanted: Kind, n: u64) -> Duration {
        let (mut total, mut seen) = (Duration::ZERO, 0);
        while seen < n {
            let (kind, took) = self.step();
            if kind == wanted {
                (total, seen) = (total + took, seen + 1);
            }
        }
        total
    }
}

fn action(speed: f64, t: f64, joint: usize) -> f64 {
    0.5 * (speed * t + joint as f64).sin() - 0.5 * (joint as f64).sin()
}

fn control(c: &mut Criterion) {
    for (shape, speed) in [("smooth", 0.5), ("slowed", 9.0)] {
        let mut group = c.benchmark_group(format!("{JOINTS} joints, {HORIZON} actions, {shape} plan"));
        for (name, kind) in
            [("tick", Kind::Plain), ("tick with chunk", Kind::Received), ("tick with adoption", Kind::Adopted)]
        {
            let mut running = Loop::new(speed);
            group.bench_function(name, |b| b.iter_custom(|n| running.time(kind, n)));
        }
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    control(&mut criterion);
    criterion.final_summary();
}
