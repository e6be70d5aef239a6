//! Properties that hold for every history: seeded adversaries drive the controller through random latencies, drops,
//! reorders, NaNs, wrong shapes, clock pauses, jumps and scales, skipped periods, stale inputs, requests, parameter
//! changes and plans, while `World` checks every moment of every window (see `control_common`).
//!
//! `PI0_MPS_TEST_TICKS` sets the number of virtual ticks of the large test (default one million).

mod control_common;

use control_common::*;
use pi0_mps::clock::RosTime;
use pi0_mps::control::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How a plan looks; times from the chunk's state stamp.
#[derive(Debug, Clone, Copy)]
enum Shape {
    Smooth,
    Fast,
    Steps,
    Sawtooth,
    BeyondLimits,
    Huge,
    Noise,
    Hold,
}

fn plan(shape: Shape, phase: f64, t: f64, j: usize) -> f64 {
    let p = phase + j as f64;
    match shape {
        Shape::Smooth => 0.5 * (1.1 * t + p).sin(),
        Shape::Fast => 1.4 * (6.0 * t + p).sin(),
        Shape::Steps => 1.2 * (5.0 * t + p).sin().signum(),
        Shape::Sawtooth => 2.0 * ((2.0 * t + p).rem_euclid(1.0) - 0.5),
        Shape::BeyondLimits => 2.5 * (1.7 * t + p).sin(),
        Shape::Huge => 1e300 * (9.0 * t + p).sin(),
        Shape::Noise => 1.4 * ((1e4 * (t + p)).sin() * 43_758.545_3).fract(),
        Shape::Hold => 0.3 * p.sin(),
    }
}

fn random_config(rng: &mut ChaCha8Rng) -> ControlConfig {
    let joints = rng.random_range(1..=7);
    let period = [0.002, 0.01, 0.02, 0.02, 0.02, 0.05][rng.random_range(0..6)];
    let dt = [0.02, 0.05, 0.1][rng.random_range(0..3)];
    let mut c = ControlConfig::new((0..joints).map(|j| format!("j{j}")), period, dt, rng.random_range(4..30));
    for joint in &mut c.joints {
        let low = rng.random_range(-2.0..0.5);
        joint.limits = Some(JointLimits {
            min_position: low,
            max_position: low + 10f64.powf(rng.random_range(-2.5..0.5)),
            max_velocity: 10f64.powf(rng.random_range(-1.0..1.0)),
            max_acceleration: 10f64.powf(rng.random_range(-0.5..2.0)),
        });
        joint.max_tracking_error = 10f64.powf(rng.random_range(-2.0..0.0));
    }
    c.stop_time = rng.random_range(2.5..30.0) * period;
    c.ramp_time = rng.random_range(0.0..1.0);
    c.output_window = rng.random_range(1.0..12.0) * period;
    c.replan_steps = rng.random_range(1..c.horizon);
    c.crossfade_steps = rng.random_range(1..=c.horizon.min(8));
    c.seam = [Seam::None, Seam::Crossfade, Seam::Rtc][rng.random_range(0..3)];
    c.miss_policy = if rng.random_bool(0.7) { MissPolicy::Coast } else { MissPolicy::Stop };
    c
}

/// Parameters that may change while unarmed, changed. The pose is inside the new limits more often than not.
fn other_settings(rng: &mut ChaCha8Rng, pose: &[f64], c: &mut ControlConfig) {
    for (joint, q) in c.joints.iter_mut().zip(pose) {
        let room = 10f64.powf(rng.random_range(-2.5..0.5));
        let low = q - room * rng.random_range(-0.05..1.0);
        joint.limits = Some(JointLimits {
            min_position: low,
            max_position: low + room,
            max_velocity: 10f64.powf(rng.random_range(-1.0..1.0)),
            max_acceleration: 10f64.powf(rng.random_range(-0.5..2.0)),
        });
        joint.max_tracking_error = 10f64.powf(rng.random_range(-2.0..0.0));
    }
    c.ramp_time = rng.random_range(0.0..1.0);
    c.replan_steps = rng.random_range(1..c.horizon);
    c.seam = [Seam::None, Seam::Crossfade, Seam::Rtc][rng.random_range(0..3)];
    c.miss_policy = if rng.random_bool(0.7) { MissPolicy::Coast } else { MissPolicy::Stop };
    c.max_joint_state_age = rng.random_range(0.02..0.2);
}

/// What histories have led through.
#[derive(Debug, Default, Clone, PartialEq)]
struct Seen {
    digest: u64,
    modes: [u64; 9],
    rules: [u64; 4],
    refused: [u64; ChunkRefusal::KINDS],
    ticks: u64,
    published: u64,
    adopted: u64,
    superseded: u64,
    discarded: u64,
    starved: u64,
    skipped: u64,
    paused: u64,
    jumps: u64,
    restarted: u64,
    changed: u64,
    change_refused: u64,
    longest_stop: f64,
}

impl Seen {
    fn add(&mut self, o: &Seen) {
        let sum = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        sum(&mut self.modes, &o.modes);
        sum(&mut self.rules, &o.rules);
        sum(&mut self.refused, &o.refused);
        for (a, b) in [
            (&mut self.ticks, o.ticks),
            (&mut self.published, o.published),
            (&mut self.adopted, o.adopted),
            (&mut self.superseded, o.superseded),
            (&mut self.discarded, o.discarded),
            (&mut self.starved, o.starved),
            (&mut self.skipped, o.skipped),
            (&mut self.paused, o.paused),
            (&mut self.jumps, o.jumps),
            (&mut self.restarted, o.restarted),
            (&mut self.changed, o.changed),
            (&mut self.change_refused, o.change_refused),
        ] {
            *a += b;
        }
        self.longest_stop = self.longest_stop.max(o.longest_stop);
    }
}

/// One adversary; returns what happened, with a digest of everything that was published.
fn adversary(seed: u64, ticks: usize) -> Seen {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let config = random_config(rng);
    let period = config.period;
    let mut w = World::new(config.clone());
    // Start inside the limits.
    let start: Vec<f64> = config
        .joints
        .iter()
        .map(|j| j.limits.map_or(0.0, |l| rng.random_range(l.min_position..=l.max_position)))
        .collect();
    w.robot = Played::hold(w.now, &start, period);
    let shapes = [
        Shape::Smooth,
        Shape::Fast,
        Shape::Steps,
        Shape::Sawtooth,
        Shape::BeyondLimits,
        Shape::Huge,
        Shape::Noise,
        Shape::Hold,
    ];
    // How often something unusual happens differs between adversaries.
    let trouble = [0.0, 0.002, 0.02, 0.2][rng.random_range(0..4)];
    let jitter = [0.0, 1e-5, 0.003, 0.3][rng.random_range(0..4)] * period;
    let mut flying: Vec<(usize, ActionChunk)> = Vec::new();
    let mut shape = shapes[rng.random_range(0..shapes.len())];
    let mut scale = 1.0;
    let mut stop_since: Option<(RosTime, u64)> = None;
    let mut seen = Seen { digest: 0xcbf2_9ce4_8422_2325, ..Seen::default() };
    for tick in 0..ticks {
        // Time.
        let mut elapsed = period * scale;
        if trouble > 0.0 && rng.random_bool(trouble) {
            match rng.random_range(0..7) {
                0 => elapsed = 0.0,
                6 if rng.random_bool(0.02) => {
                    w.now = RosTime([0, -1, i64::MIN, i64::MAX, 1_000_000_000_000][rng.random_range(0..5)]);
                    w.skipped = [0, 1_000_000][rng.random_range(0..2)];
                }
                1 => {
                    w.skipped = rng.random_range(1..20);
                    elapsed *= (1 + w.skipped) as f64;
                }
                2 => elapsed = rng.random_range(0.0..3.0),
                3 => elapsed = -rng.random_range(0.0..0.5),
                _ => scale = [0.01, 0.3, 1.0, 1.0, 1.0, 3.7][rng.random_range(0..6)],
            }
        }
        if elapsed > 0.0 {
            elapsed += rng.random_range(-1.0..=1.0f64) * jitter;
        }
        w.wait(elapsed.max(if elapsed < 0.0 { elapsed } else { 0.0 }));
        // Inputs.
        if rng.random_bool(trouble) {
            match rng.random_range(0..8) {
                0 => w.age = [0.0, 0.05, 0.3, f64::INFINITY, f64::NAN][rng.random_range(0..5)],
                1 => {
                    let j = rng.random_range(0..config.joints.len());
                    w.disturbance[j] = [0.0, 0.01, 0.5, -3.0, f64::NAN, f64::INFINITY][rng.random_range(0..6)];
                }
                2 => w.health = InputHealth::Bad(InputFault::CameraStale { camera: 0, age: 1.0, max: 0.2 }),
                3 => {
                    w.lifecycle =
                        [Lifecycle::Failed, Lifecycle::Warmup, Lifecycle::Unconfigured][rng.random_range(0..3)]
                }
                4 => shape = shapes[rng.random_range(0..shapes.len())],
                _ => {}
            }
        } else if rng.random_bool(0.05) {
            w.age = 0.005;
            w.disturbance.fill(0.0);
            w.health = InputHealth::Ok;
            w.lifecycle = Lifecycle::Ready;
        }
        // Parameters: taken over while nothing is published, refused otherwise.
        if rng.random_bool(0.1 * trouble) {
            let pose = w.told().0;
            let moving = w.controller.mode().publishes();
            let taken = w.change(|c| other_settings(rng, &pose, c));
            assert_eq!(taken, !moving);
            seen.changed += u64::from(taken);
            seen.change_refused += u64::from(!taken);
        }
        // Chunks: observed every few ticks, delivered after a random latency, perhaps spoilt.
        if rng.random_bool(0.15) {
            let phase = w.now.seconds_since(RosTime(0)).rem_euclid(1000.0);
            let mut c = w.observe(|t, j| plan(shape, phase, t, j));
            c.prompt_generation = tick as u64 / 700;
            if rng.random_bool(trouble) {
                match rng.random_range(0..11) {
                    9 => c.oldest_image_stamp = c.oldest_image_stamp.plus_seconds(-rng.random_range(0.0..5.0)),
                    0 => {
                        let i = rng.random_range(0..c.positions.len());
                        c.positions[i] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][rng.random_range(0..3)];
                    }
                    1 => {
                        c.positions.pop();
                    }
                    2 => c.joints += 1,
                    3 => c.horizon -= 1,
                    4 => c.dt = [f64::NAN, 0.0, -1.0, 1.5 * c.dt][rng.random_range(0..4)],
                    5 => c.state_stamp = RosTime([0, -5, i64::MAX, i64::MIN][rng.random_range(0..4)]),
                    6 => c.state_stamp = c.state_stamp.plus_seconds(rng.random_range(-5.0..5.0)),
                    7 => c.epoch = c.epoch.wrapping_add(rng.random_range(0..3)).wrapping_sub(1),
                    8 => c.prompt_generation = rng.random_range(0..4),
                    _ => c.sequence = rng.random_range(0..c.sequence + 5),
                }
            }
            let longest = if rng.random_bool(0.1) { 60 } else { 6 };
            let latency = rng.random_range(0..longest);
            flying.push((tick + latency, c));
        }
        if rng.random_bool(trouble) && !flying.is_empty() {
            flying.swap_remove(rng.random_range(0..flying.len()));
        }
        let due = flying.iter().position(|(at, _)| *at <= tick);
        let chunk = due.map(|i| flying.swap_remove(i).1);
        // Requests.
        w.requests = Requests {
            enable: rng.random_bool(0.05),
            disable: rng.random_bool(0.2 * trouble),
            stop: rng.random_bool(0.2 * trouble),
            reset: rng.random_bool(0.02),
        };
        let asked = w.requests;
        let report = w.tick(chunk.as_ref());
        // Rules about modes.
        assert!(
            report.previous == report.mode
                || report.previous.row().next.contains(&report.mode)
                || report.previous.row().next.iter().any(|m| m.row().next.contains(&report.mode)),
            "{} to {}",
            report.previous,
            report.mode
        );
        seen.modes[report.mode as usize] += 1;
        seen.restarted += u64::from(report.restarted);
        if asked.stop {
            assert!(!report.mode.armed(), "a stop takes effect in its tick");
        }
        if report.adoption.is_some() {
            assert!(report.mode.armed() && report.published);
        }
        // A stop is complete in time, by ROS time, as long as that only goes forward.
        match (report.mode, stop_since) {
            (Mode::Stopping, None) => stop_since = Some((w.now, w.controller.status().counters.clock_jumps)),
            (Mode::Stopping, Some((since, jumps))) => {
                if jumps == w.controller.status().counters.clock_jumps {
                    let took = w.now.seconds_since(since);
                    seen.longest_stop = seen.longest_stop.max((took - elapsed.max(0.0)) / (config.stop_time + period));
                    // It may be noticed one tick after it is over; a tick here is as long as time jumps.
                    assert!(
                        took - elapsed.max(0.0) <= config.stop_time + period + 1e-9,
                        "stopping for {took} s of {} s",
                        config.stop_time
                    );
                }
            }
            _ => stop_since = None,
        }
        for i in 0..w.window.points() {
            for x in w.window.positions(i).iter().chain(w.window.velocities(i)) {
                seen.digest = (seen.digest ^ x.to_bits()).wrapping_mul(0x0100_0000_01b3);
            }
        }
        seen.digest = (seen.digest ^ report.mode as u64).wrapping_mul(0x0100_0000_01b3);
    }
    let status = w.controller.status();
    let c = status.counters;
    for (rule, _) in Rule::ALL {
        seen.rules[rule as usize] = status.interventions.by_rule(rule);
    }
    Seen {
        refused: c.refused,
        ticks: c.ticks,
        published: c.published,
        adopted: c.adopted,
        superseded: c.superseded,
        discarded: c.discarded,
        starved: c.starved,
        skipped: c.skipped,
        paused: c.paused,
        jumps: c.clock_jumps,
        ..seen
    }
}

#[test]
fn no_history_makes_a_command_past_a_limit() {
    let total: usize = std::env::var("PI0_MPS_TEST_TICKS").ok().and_then(|s| s.parse().ok()).unwrap_or(1_000_000);
    let each = 2_500;
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
    let all = std::sync::Mutex::new(Seen::default());
    std::thread::scope(|s| {
        for t in 0..threads {
            let all = &all;
            s.spawn(move || {
                for seed in (t..total.div_ceil(each)).step_by(threads) {
                    match std::panic::catch_unwind(|| adversary(seed as u64, each)) {
                        Ok(seen) => all.lock().unwrap().add(&seen),
                        Err(e) => {
                            eprintln!("seed {seed}");
                            std::panic::resume_unwind(e);
                        }
                    }
                }
            });
        }
    });
    let seen = all.into_inner().unwrap();
    eprintln!("{seen:#?}");
    // A history that avoids the trouble proves nothing: everything must have happened, often.
    let often = total as u64 / 20_000;
    assert!(seen.published > total as u64 / 4);
    for (mode, n) in seen.modes.iter().enumerate() {
        assert!(*n > often, "mode {} only {n} times", MODES[mode].name);
    }
    for ((_, name), n) in Rule::ALL.iter().zip(seen.rules) {
        assert!(n > often, "rule {name} only {n} times");
    }
    for (name, n) in ChunkRefusal::NAMES.iter().zip(seen.refused) {
        assert!(n > 0, "no chunk was refused as {name}");
    }
    let changes = [seen.changed, seen.change_refused];
    for n in [seen.adopted, seen.superseded, seen.starved, seen.skipped, seen.paused, seen.jumps, seen.restarted]
        .into_iter()
        .chain(changes)
    {
        assert!(n > often, "{seen:?}");
    }
}

#[test]
fn the_same_history_gives_the_same_commands() {
    for seed in 0..6 {
        assert_eq!(adversary(1000 + seed, 1500), adversary(1000 + seed, 1500));
    }
}
