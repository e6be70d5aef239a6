//! The rules of the control core, one test each, named after the rule.

mod control_common;

use control_common::*;
use pi0_mps::clock::RosTime;
use pi0_mps::control::*;

const HOLD: fn(f64, usize) -> f64 = |_, _| 0.0;

/// A smooth plan in absolute time, well inside the limits.
fn wave(t: f64, j: usize) -> f64 {
    0.4 * (1.3 * t + j as f64).sin()
}

/// Runs the wave for `ticks` with a chunk every 6 ticks, each `late` seconds old when it comes.
fn run_wave(w: &mut World, ticks: usize, late: f64) {
    let t0 = RosTime(1_000_000_000_000);
    for i in 0..ticks {
        let c = (i % 6 == 0).then(|| {
            let stamp = w.now.plus_seconds(-late);
            let mut c = w.observe(|t, j| wave(stamp.seconds_since(t0) + t, j));
            c.state_stamp = stamp;
            c
        });
        w.step(c.as_ref());
    }
}

#[test]
fn it_never_moves_a_robot_because_it_started() {
    let mut w = World::new(config());
    for _ in 0..50 {
        let c = w.observe(|t, _| t);
        assert!(!w.step(Some(&c)).published);
    }
    assert_eq!(w.controller.mode(), Mode::Active);
}

#[test]
fn a_smooth_plan_within_limits_passes_untouched() {
    let mut w = World::new(config());
    let t0 = w.now;
    w.arm(|t, j| wave(0.04 + t, j));
    run_wave(&mut w, 200, 0.1);
    assert_eq!(w.controller.mode(), Mode::Run);
    let before = w.controller.status();
    let mut worst = 0.0f64;
    for _ in 0..50 {
        run_wave(&mut w, 10, 0.1);
        for (j, q) in w.told().0.iter().enumerate() {
            worst = worst.max((q - wave(w.now.seconds_since(t0), j)).abs());
        }
    }
    // A cubic through samples 50 ms apart differs from the wave by less than 1e-5.
    assert!(worst < 1e-5, "{worst}");
    let s = w.controller.status();
    assert_eq!(s.interventions, before.interventions);
    assert!(s.plan.unwrap().lag.abs() < 1e-12);
}
