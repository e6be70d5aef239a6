//! The control thread allocates nothing and frees nothing after start.

mod control_common;
#[path = "common/counting.rs"]
mod counting;

use std::cell::Cell;

use control_common::*;
use counting::Counting;
use pi0_mps::control::*;

thread_local! {
    static CALLS: Cell<Option<u64>> = const { Cell::new(None) };
}

fn count() {
    // A thread that is being torn down has no counter; it is not the one under test.
    let _ = CALLS.try_with(|c| c.set(c.get().map(|n| n + 1)));
}

#[global_allocator]
static ALLOCATOR: Counting = Counting(count);

fn calls_during(f: impl FnOnce()) -> u64 {
    CALLS.with(|c| c.set(Some(0)));
    f();
    CALLS.with(|c| c.take()).unwrap_or(0)
}

#[test]
fn the_counter_counts() {
    assert_eq!(calls_during(|| drop(std::hint::black_box(vec![1u8; 100]))), 2);
    assert_eq!(calls_during(|| ()), 0);
}

fn seven_joints() -> ControlConfig {
    let mut c = ControlConfig::new((0..7).map(|j| format!("j{j}")), 0.02, 0.02, 50);
    for joint in &mut c.joints {
        joint.limits = limits(2.0, 8.0);
    }
    c.replan_steps = 10;
    c
}

#[test]
fn a_tick_allocates_and_frees_nothing_in_any_mode() {
    let config = seven_joints();
    let mut controller = Controller::new(config.clone()).unwrap();
    // As a slot between threads has it: a clone.
    let mut window = controller.window().clone();
    let mut deadlines = Deadlines::new(0.0, config.period);
    let mut seen = [false; 9];
    let mut now = pi0_mps::clock::RosTime(1_000_000_000_000);
    let mut measured = Measured { ages: JointVector::filled(7, 0.001), ..Measured::missing(7) };
    measured.positions.fill(0.0);
    let mut sequence = 0;
    for i in 0..4000u32 {
        now = now.plus_seconds(if i % 500 == 499 { -0.3 } else { 0.02 });
        sequence += 1;
        let mut c = chunk(&config, sequence, now, |t, j| (0.3 * (t + j as f64 + f64::from(i) * 0.02)).sin());
        c.epoch = controller.epoch();
        if i % 97 == 0 {
            c.positions[3] = f64::NAN;
        }
        let give = i % 200 > 80 && i % 5 == 0;
        let lifecycle = match i {
            0..10 => Lifecycle::Unconfigured,
            10..20 => Lifecycle::Warmup,
            3000..3010 => Lifecycle::Failed,
            _ => Lifecycle::Ready,
        };
        if i % 700 == 650 {
            measured.positions[2] += 1.0;
        }
        let input = TickInput {
            ros_now: now,
            mono_now: pi0_mps::clock::Monotonic(i64::from(i) * 20_000_000),
            skipped: u64::from(i % 50 == 3),
            measured,
            inputs: InputHealth::Ok,
            lifecycle,
            chunk: give.then_some(&c),
            requests: Requests {
                enable: i % 7 == 0,
                disable: i % 900 == 800,
                stop: i % 400 == 350,
                reset: i % 400 == 390,
            },
        };
        let mut report = None;
        let mut status = None;
        let calls = calls_during(|| {
            report = Some(controller.tick(&input, &mut window));
            status = Some(controller.status());
            deadlines.record(&TickTimes::default());
        });
        let report = report.unwrap();
        assert_eq!(calls, 0, "tick {i} in mode {}", report.mode);
        seen[report.mode as usize] = true;
        if report.published {
            measured.positions.copy_from_slice(window.sample(0.02).0.as_ref());
        }
    }
    for (row, seen) in MODES.iter().zip(seen) {
        assert!(seen, "mode {} was not reached", row.name);
    }
}
