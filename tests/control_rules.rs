//! The rules of the control core, one test each, named after the rule. `World` checks every moment of every published
//! window against the limits, so a test here says what else must hold.

mod control_common;

use control_common::*;
use pi0_mps::clock::RosTime;
use pi0_mps::control::*;

fn hold(_: f64, _: usize) -> f64 {
    0.0
}

fn names() -> Names {
    let arm = OutputNames { name: "arm".into(), topic: "/arm/joint_trajectory".into(), others: Vec::new() };
    Names { joints: vec!["shoulder".into(), "elbow".into()], cameras: vec!["base".into()], outputs: vec![arm] }
}

/// Follows `f`, in seconds since `t0`, for `ticks`, with a chunk every 6 ticks that is `late` seconds old.
fn run(w: &mut World, t0: RosTime, ticks: usize, late: f64, f: impl Fn(f64, usize) -> f64) {
    for i in 0..ticks {
        let c = (i % 6 == 0).then(|| {
            let stamp = w.now.plus_seconds(w.controller.config().period - late);
            let mut c = w.observe(|t, j| f(stamp.seconds_since(t0) + t, j));
            c.state_stamp = stamp;
            c
        });
        w.step(c.as_ref());
    }
}

/// Armed and past the ramp, holding still at zero.
fn running(config: ControlConfig) -> World {
    let mut w = World::new(config);
    w.arm(hold);
    let t0 = w.now;
    run(&mut w, t0, 60, 0.05, hold);
    assert_eq!(w.controller.mode(), Mode::Run);
    w
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
    // Central differences are exact for a parabola, so the reference is the plan itself.
    let parabola = |t: f64, j: usize| 0.02 * t * t - 0.3 * j as f64;
    let mut w = World::new(config());
    let t0 = w.now;
    w.robot = Played::hold(w.now, &[0.0, -0.3], 0.02);
    w.arm(|t, j| parabola(0.04 + t, j));
    run(&mut w, t0, 150, 0.1, parabola);
    assert_eq!(w.controller.mode(), Mode::Run);
    let before = w.controller.status();
    for _ in 0..120 {
        run(&mut w, t0, 1, 0.1, parabola);
        let t = w.now.seconds_since(t0);
        for (j, q) in w.told().0.iter().enumerate() {
            assert!((q - parabola(t, j)).abs() < 1e-9, "joint {j} at {t}: {q}");
        }
    }
    let s = w.controller.status();
    assert_eq!(s.interventions, before.interventions);
    assert!(s.plan.unwrap().lag.abs() < 1e-12);
    assert!(s.seam_jump < 1e-9);
}

#[test]
fn one_nan_drops_the_whole_chunk_and_is_counted() {
    let mut w = running(config());
    let mut c = w.observe(|_, _| 0.3);
    c.positions[7] = f64::NAN;
    let refused = ChunkRefusal::NonFinite { joint: 1, step: 3 };
    assert_eq!(w.step(Some(&c)).chunk, Some(ChunkVerdict::Refused(refused)));
    let text = refused.text(&names());
    assert!(text.contains("action 3 of joint 'elbow' is not finite"), "{text}");
    assert_eq!(w.controller.status().counters.refused[refused.kind()], 1);
    w.until(Mode::Coast, 100);
    assert!(w.told().0.iter().all(|q| q.abs() < 1e-9), "nothing of it was executed");
}

#[test]
fn chunks_that_are_stale_foreign_or_out_of_order_are_refused_by_kind() {
    type Spoil = fn(&mut ActionChunk);
    let cases: [(&str, &str, Spoil); 14] = [
        ("old_epoch", "chunk of epoch 1, current is 0", |c| c.epoch += 1),
        ("sequence", "duplicate or out of order", |c| c.sequence -= 1),
        ("old_prompt", "chunk for prompt 4, current is 5", |c| c.prompt_generation = 4),
        ("joints", "chunk with 3 joints, expected 2", |c| c.joints = 3),
        ("horizon", "chunk with 19 actions, expected 20", |c| c.horizon = 19),
        ("horizon", "chunk with 18 actions, expected 20", |c| c.positions.truncate(37)),
        ("time_step", "chunk with dt 0.04 s, expected 0.05 s", |c| c.dt = 0.04),
        // A thousand of them are 1 ms apart from what they are taken for.
        ("time_step", "chunk with dt 0.050001 s", |c| c.dt = 0.050_001),
        ("time_step", "chunk with dt NaN s", |c| c.dt = f64::NAN),
        ("no_stamp", "without a time", |c| c.state_stamp = RosTime(0)),
        ("too_old", "observation 1220 ms old", |c| c.state_stamp = c.state_stamp.plus_seconds(-1.2)),
        ("from_future", "observation 180 ms in the future", |c| c.state_stamp = c.state_stamp.plus_seconds(0.2)),
        ("images_too_old", "images 1520 ms old", |c| c.oldest_image_stamp = c.state_stamp.plus_seconds(-1.5)),
        ("non_finite", "action 2 of joint 'elbow' is not finite", |c| c.positions[5] = f64::INFINITY),
    ];
    for (name, says, spoil) in cases {
        let mut w = running(config());
        let mut good = w.observe(hold);
        good.prompt_generation = 5;
        assert_eq!(w.step(Some(&good)).chunk, Some(ChunkVerdict::Accepted));
        let mut bad = w.observe(hold);
        bad.prompt_generation = 5;
        spoil(&mut bad);
        let Some(ChunkVerdict::Refused(why)) = w.step(Some(&bad)).chunk else { panic!("{name} was accepted") };
        assert_eq!(ChunkRefusal::NAMES[why.kind()], name);
        assert!(why.text(&names()).contains(says), "{}", why.text(&names()));
        assert_eq!(w.controller.status().counters.refused[why.kind()], 1);
        let next = w.observe(hold);
        let mut next = ActionChunk { prompt_generation: 5, ..next };
        next.sequence += 1;
        assert_eq!(w.step(Some(&next)).chunk, Some(ChunkVerdict::Accepted), "the next good one is taken");
    }
}

#[test]
fn what_is_exactly_as_old_as_allowed_is_taken() {
    for (state, image) in [(1.0, 1.0), (-0.05, 0.0), (0.0, 1.5)] {
        let mut w = running(config());
        w.wait(0.02);
        w.controller.set_ages(1.0, 1.5);
        let (state_stamp, oldest_image_stamp) = (w.now.plus_seconds(-state), w.now.plus_seconds(-image));
        let c = ActionChunk { state_stamp, oldest_image_stamp, ..w.observe(hold) };
        assert_eq!(w.tick(Some(&c)).chunk, Some(ChunkVerdict::Accepted), "{state} s, images {image} s");
    }
}

#[test]
fn after_a_stop_a_policy_may_number_its_chunks_from_anywhere() {
    let mut w = running(config());
    w.requests.stop = true;
    w.step(None);
    let chunk = |w: &mut World, sequence| {
        let c = ActionChunk { sequence, ..w.observe(hold) };
        w.step(Some(&c)).chunk.unwrap()
    };
    assert_eq!(chunk(&mut w, 1), ChunkVerdict::Accepted, "it was started again");
    let again = ChunkRefusal::Sequence { chunk: 1, last: 1 };
    assert_eq!(chunk(&mut w, 1), ChunkVerdict::Refused(again));
    assert_eq!(chunk(&mut w, 2), ChunkVerdict::Accepted);
}

#[test]
fn arming_is_refused_with_the_reason() {
    type Spoil = fn(&mut World);
    let cases: [(Spoil, &str); 12] = [
        (|w| w.lifecycle = Lifecycle::Warmup, "warming up"),
        (|w| w.lifecycle = Lifecycle::Unconfigured, "configure and activate"),
        (|w| w.lifecycle = Lifecycle::Failed, "fault"),
        (|w| w.requests.stop = true, "call ~/reset first"),
        (|w| assert!(w.change(|c| c.joints[1].limits = None)), "joint 'elbow' has no limits"),
        (|w| w.disturbance[1] = f64::NAN, "no usable position of joint 'elbow'"),
        (|w| w.age = f64::NAN, "no usable position of joint 'shoulder'"),
        (|w| w.age = 0.3, "joint 'shoulder' is 300 ms old (limit 100 ms)"),
        (|w| w.disturbance[0] = 1.6, "joint 'shoulder' is at 1.6000, outside its limits -1.5000 to 1.5000"),
        (
            |w| w.health = InputHealth::Bad(InputFault::CameraStale { camera: 0, age: 0.5, max: 0.2 }),
            "camera 'base' is 500 ms old (limit 200 ms)",
        ),
        (
            |w| w.health = InputHealth::Bad(InputFault::OutputContested { output: 0 }),
            "somebody else publishes on /arm/joint_trajectory, the topic of output 'arm': stop the other node",
        ),
        (|w| w.wait(1.5), "no usable action chunk: observation 1560 ms old"),
    ];
    for (spoil, says) in cases {
        let mut w = World::new(config());
        let c = w.observe(hold);
        w.step(Some(&c));
        w.step(None);
        spoil(&mut w);
        if w.requests.stop {
            w.step(None);
        }
        w.requests.enable = true;
        let report = w.step(None);
        let text = report.refusal.expect(says).text(&names());
        assert!(text.contains(says), "{text}");
        assert!(!report.published && !report.mode.armed());
    }
    // A joint state of fewer joints, or of more.
    for joints in [1, 3] {
        let mut w = World::new(config());
        w.step(None);
        let c = w.observe(hold);
        let input = TickInput {
            ros_now: w.now.plus_seconds(0.02),
            mono_now: w.mono,
            skipped: 0,
            measured: Measured {
                positions: JointVector::zeros(joints),
                ages: JointVector::zeros(joints),
                ..Measured::missing(joints)
            },
            inputs: InputHealth::Ok,
            lifecycle: Lifecycle::Ready,
            chunk: Some(&c),
            requests: Requests { enable: true, ..Requests::default() },
        };
        let report = w.controller.tick(&input, &mut w.window);
        assert_eq!((report.refusal, report.published), (Some(Refusal::StateMissing { joint: 1 }), false), "{joints}");
    }
    // On a limit is inside it.
    let mut w = World::new(config());
    w.robot = Played::hold(w.now, &[1.5, -1.5], 0.02);
    w.arm(|_, j| [1.5, -1.5][j]);
    let mut w = World::new(config());
    w.requests.enable = true;
    assert_eq!(w.step(None).refusal, Some(Refusal::NoChunk));
    let mut w = World::new(config());
    w.now = RosTime(-40_000_000);
    w.requests.enable = true;
    assert_eq!(w.step(None).refusal, Some(Refusal::NoClock));
}

#[test]
fn from_rest_the_origin_is_the_adoption_and_nothing_is_skipped() {
    let mut w = World::new(config());
    let mut c = w.observe(|t, _| 0.1 * t);
    c.state_stamp = w.now.plus_seconds(-0.6);
    w.step(Some(&c));
    w.requests.enable = true;
    let report = w.step(None);
    let adoption = report.adoption.unwrap();
    assert_eq!((adoption.actions_skipped, adoption.from_rest), (0, true));
    assert_eq!(w.controller.status().plan.unwrap().origin, w.now);
}

#[test]
fn a_late_chunk_loses_exactly_what_is_past() {
    let mut w = running(config());
    // Everything before now was executed: action 0 is due at the observation.
    let mut c = w.observe(|t, _| 0.1 * t);
    c.state_stamp = w.now.plus_seconds(-0.33);
    let stamp = c.state_stamp;
    let adoption = w.until_adopted(&c);
    let plan = w.controller.status().plan.unwrap();
    assert_eq!(plan.origin, stamp);
    let late = plan.adopted_at.seconds_since(stamp);
    assert_eq!(adoption.actions_skipped, (late / 0.05).ceil() as usize);
    let next = plan.next_adoption.seconds_since(plan.adopted_at);
    assert!(next > 0.25 && next <= 0.3 + 1e-9, "6 steps from the action that is being executed: {next}");
}

#[test]
fn while_no_chunk_waits_the_adoption_moves_on_by_one_step_of_the_grid() {
    let mut w = running(config());
    let mut waited = 0;
    for i in 0..200 {
        // Some of the time a period is skipped, which may be more than a step of the grid.
        (w.skipped, w.now) = if i % 7 == 6 { (5, w.now.plus_seconds(0.1)) } else { (0, w.now) };
        w.step(None);
        let Some(p) = w.controller.status().plan else { break };
        let left = p.next_adoption.seconds_since(w.now);
        let steps = p.next_adoption.seconds_since(p.origin) / 0.05;
        // The seam is one period ahead of the tick, and the adoption after it: it has not come yet.
        assert!((steps - steps.round()).abs() < 1e-6 && left > 0.02 + 1e-9, "{left}");
        if p.adopted_at.plus_seconds(0.3) < w.now {
            assert!(left <= 0.05 + 0.02 + 1e-9, "{left}");
            waited += 1;
        }
    }
    assert!(waited > 10, "{waited}");
}

#[test]
fn what_is_more_serious_is_said_even_while_stopping() {
    let mut w = moving();
    w.requests.disable = true;
    assert_eq!(w.step(None).stop, Some(Reason::Disabled));
    w.age = 0.2;
    assert!(matches!(w.step(None).stop, Some(Reason::StateStale { .. })));
    w.requests.stop = true;
    assert_eq!(w.step(None).stop, None, "less serious, though it latches");
    assert!(matches!(w.controller.status().reason, Some(Reason::StateStale { .. })));
    w.until(Mode::Stopped, 30);

    let mut w = moving();
    w.requests.disable = true;
    w.step(None);
    w.requests.stop = true;
    assert_eq!(w.step(None).stop, Some(Reason::StopRequested));
    w.until(Mode::Stopped, 30);
    assert_eq!(w.controller.status().reason, Some(Reason::StopRequested));
    w.age = 0.2;
    assert_eq!(w.step(None).stop, None, "at rest an old joint state stops nothing");

    // Of two that are as serious, what a person asked for is the reason; what is less serious is not.
    let mut w = moving();
    w.wait(-0.1);
    assert!(matches!(w.tick(None).stop, Some(Reason::ClockJumpedBack { .. })));
    w.requests.stop = true;
    assert_eq!(w.step(None).stop, Some(Reason::StopRequested));
    w.requests.disable = true;
    assert_eq!(w.step(None).stop, None);
    assert_eq!(w.controller.status().reason, Some(Reason::StopRequested));

    let mut w = World::new(config());
    w.step(None);
    w.requests.stop = true;
    assert_eq!(w.step(None).stop, Some(Reason::StopRequested), "unarmed too");
    w.requests.stop = true;
    assert_eq!(w.step(None).stop, None, "once");
}

#[test]
fn a_chunk_never_loses_more_than_was_consumed() {
    // Observed 0.5 s before arming, adopted 0.3 s after it: only 0.3 s of motion were consumed.
    let mut w = World::new(config());
    w.step(None);
    w.wait(0.5 - 0.02);
    let observed = w.now.plus_seconds(-0.46);
    w.step(None);
    w.arm(hold);
    let armed = w.now;
    let mut c = w.observe(hold);
    c.state_stamp = observed;
    let adoption = w.until_adopted(&c);
    let plan = w.controller.status().plan.unwrap();
    let consumed = plan.adopted_at.seconds_since(armed);
    assert!((plan.adopted_at.seconds_since(plan.origin) - consumed).abs() < 1e-9, "{plan:?}");
    assert_eq!(adoption.actions_skipped, (consumed / 0.05 - 1e-9).ceil() as usize);
}

#[test]
fn a_slowed_plan_is_consumed_slower_and_the_next_chunk_knows() {
    let mut w = running(config());
    // 4 rad/s is twice what is allowed.
    let sprint = |t: f64, _: usize| -1.4 + (4.0 * t).min(2.8);
    let t0 = w.now;
    let c = w.observe(|t, _| if t < 0.3 { -1.4 * (t / 0.3) } else { sprint(t - 0.3, 0) });
    w.step(Some(&c));
    let (mut lag, mut pace) = (0.0f64, 1.0f64);
    for _ in 0..30 {
        w.step(None);
        if let Some(p) = w.controller.status().plan {
            (lag, pace) = (lag.max(p.lag), pace.min(p.pace));
        }
    }
    assert!(lag > 0.05, "{lag}");
    assert!(pace < 0.6, "it is said at which pace: {pace}");
    let s = w.controller.status();
    assert!(s.interventions.by_rule(Rule::Scaled) > 5);
    // A chunk observed before all that is dated by what was consumed.
    let mut c = w.observe(hold);
    c.state_stamp = t0.plus_seconds(0.02);
    w.until_adopted(&c);
    let p = w.controller.status().plan.unwrap();
    assert!(p.origin.seconds_since(c.state_stamp) > 0.05, "{p:?}");
}

#[test]
fn the_pace_said_is_that_of_the_moment_on_early_ticks_too() {
    let mut w = running(config());
    // 4 rad/s, there and back, is twice what is allowed: the pace falls and rises.
    let c = w.observe(|t, _| 0.5 * (8.0 * t).sin());
    w.until_adopted(&c);
    let (mut before, mut changing) = (w.controller.status().plan.unwrap().pace, 0);
    for _ in 0..25 {
        // Half-way between two points of the window, and at the second.
        let mut half = || {
            w.wait(0.01);
            w.tick(None);
            w.controller.status().plan.unwrap().pace
        };
        let (between, after) = (half(), half());
        assert!((between - 0.5 * (before + after)).abs() < 1e-9, "{before}, {between}, {after}");
        changing += i32::from((after - before).abs() > 1e-4);
        before = after;
    }
    assert!(changing > 3, "{changing}");
}

#[test]
fn a_chunk_is_adopted_every_replan_steps_on_the_grid_and_the_newest_wins() {
    let mut w = running(config());
    let before = w.controller.status();
    let mut times = Vec::new();
    let mut last_given = 0;
    for _ in 0..200 {
        let c = w.observe(hold);
        let report = w.step(Some(&c));
        last_given = last_given.max(c.sequence);
        if let Some(a) = report.adoption {
            assert_eq!(a.sequence, last_given, "the newest");
            times.push(w.controller.status().plan.unwrap());
        }
    }
    for pair in times.windows(2) {
        let gap = pair[1].adopted_at.seconds_since(pair[0].adopted_at);
        assert!((gap - 0.3).abs() <= 0.05 + 1e-9, "6 steps of 50 ms, to a grid point: {gap}");
        let due = pair[0].next_adoption.seconds_since(pair[0].origin) / 0.05;
        assert!((due - due.round()).abs() < 1e-6, "on the grid of the running plan");
        let late = pair[1].adopted_at.seconds_since(pair[0].next_adoption);
        assert!((-1e-9..0.02 + 1e-9).contains(&late), "at the first tick of the grid point: {late}");
    }
    let s = w.controller.status();
    let (adopted, superseded) =
        (s.counters.adopted - before.counters.adopted, s.counters.superseded - before.counters.superseded);
    assert!(adopted >= 12 && adopted + superseded + 1 >= 200, "{adopted} {superseded}");
}

#[test]
fn on_a_grid_that_ticks_meet_replan_steps_are_exact() {
    let mut c = config();
    c.dt = 0.04;
    let mut w = running(c);
    let mut adopted = Vec::new();
    for _ in 0..100 {
        let c = w.observe(hold);
        if w.step(Some(&c)).adoption.is_some() {
            adopted.push(w.controller.status().plan.unwrap().adopted_at);
        }
    }
    for pair in adopted[1..].windows(2) {
        assert_eq!(pair[1].0 - pair[0].0, 240_000_000, "6 steps of 40 ms");
    }
}

#[test]
fn the_jump_at_a_seam_is_measured_before_the_blend_and_named() {
    let mut w = running(config());
    let c = w.observe(|_, j| if j == 1 { 0.02 } else { 0.01 });
    let a = w.until_adopted(&c);
    assert!((a.jump - 0.02).abs() < 1e-9 && a.joint == 1, "{a:?}");
    assert!((w.controller.status().seam_jump_max - 0.02).abs() < 1e-9, "and not the way to the plan after arming");
    // Blended over 3 steps of 50 ms: not there after one, there after four.
    let at = |w: &World| w.told().0[0];
    w.step(None);
    w.step(None);
    assert!(at(&w) < 0.008);
    (0..8).for_each(|_| {
        w.step(None);
    });
    assert!((at(&w) - 0.01).abs() < 1e-6, "{}", at(&w));
}

#[test]
fn the_jump_is_between_two_moving_plans_at_the_same_moment() {
    let line = |t: f64, j: usize| 0.1 * t * (1.0 + j as f64);
    let mut w = World::new(config());
    let t0 = w.now;
    w.arm(|t, j| 0.3 + line(t, j));
    assert_eq!(w.controller.status().seam_jump_max, 0.0, "the way to the plan is not a jump");
    run(&mut w, t0, 80, 0.05, line);
    // Late by a third of a second, and beside the running plan by as much as its joint says.
    let stamp = w.now.plus_seconds(-0.33);
    let mut c = w.observe(|t, j| line(stamp.seconds_since(t0) + t, j) + [0.003, 0.007][j]);
    c.state_stamp = stamp;
    let a = w.until_adopted(&c);
    assert!((a.jump - 0.007).abs() < 1e-6 && a.joint == 1, "{a:?}");

    let mut w = running(config());
    w.until(Mode::Coast, 100);
    let c = w.observe(|_, _| 0.4);
    let a = w.until_adopted(&c);
    assert!((a.jump - 0.4).abs() < 1e-9 && a.from_rest);
    assert!((w.controller.status().seam_jump - 0.4).abs() < 1e-9, "after a coast it is one");
}

#[test]
fn the_tail_is_played_to_its_last_action() {
    for more in 0..2 {
        let mut w = running(config());
        let t0 = w.now;
        run(&mut w, t0, 15 * more, 0.0, hold);
        let c = w.observe(|t, _| 0.3 * t);
        w.step(Some(&c));
        w.until(Mode::Coast, 100);
        let reached = w.told().0[0];
        assert!(reached > 0.3 * 0.95 - 0.3 * 0.04, "{reached}");
    }
}

#[test]
fn an_action_due_on_a_tick_is_the_last_one_played() {
    let mut c = config();
    c.dt = 0.04;
    let mut w = running(c);
    let (chunk, stamp) = (w.observe(|t, _| 0.05 * t), w.now);
    w.step(Some(&chunk));
    w.until(Mode::Coast, 100);
    // What is promised now is the last action, due one period from here; braking comes after it.
    let left = stamp.plus_seconds(0.76).seconds_since(w.now);
    assert!((left - 0.02).abs() < 1e-9, "{left} {:?}", w.window.positions(0));
    assert!((w.window.positions(0)[0] - 0.05 * 0.76).abs() < 1e-9, "{:?}", w.window.positions(0));
    assert!((w.window.velocities(0)[0] - 0.05).abs() < 1e-9);
}

/// A chunk of which `used` seconds are over when its turn comes in `w`, which follows a plan.
fn used_at_its_turn(w: &mut World, used: f64) -> ActionChunk {
    let (period, due) = (w.controller.config().period, w.controller.status().plan.unwrap().next_adoption);
    // The seam is one period ahead of the first tick that has it in sight.
    let mut seam = w.now.plus_seconds(2.0 * period);
    while due.seconds_since(seam) > 1e-9 {
        seam = seam.plus_seconds(period);
    }
    let mut c = w.observe(hold);
    (c.state_stamp, c.oldest_image_stamp) = (seam.plus_seconds(-used), seam.plus_seconds(-used));
    c
}

#[test]
fn a_chunk_with_nothing_left_to_move_to_is_past() {
    // 20 actions 50 ms apart: the last is due after 950 ms. It takes a period to get there, and a quarter of a step.
    for (period, used, late) in [
        (0.02, 0.5, None),
        (0.02, 0.929, None),
        (0.02, 0.935, Some(-0.015)),
        (0.02, 1.05, Some(0.1)),
        (0.002, 0.94, Some(-0.01)),
    ] {
        let mut c = config();
        (c.period, c.stop_time) = (period, 0.5);
        let mut w = World::new(c);
        w.arm(hold);
        let t0 = w.now;
        run(&mut w, t0, (1.2 / period) as usize, 0.05, hold);
        w.controller.set_ages(2.0, 2.0);
        let c = used_at_its_turn(&mut w, used);
        let mut report = w.step(Some(&c));
        assert_eq!(report.chunk, Some(ChunkVerdict::Accepted));
        for _ in 0..(0.4 / period) as usize {
            if report.adoption.is_some() || report.dropped.is_some() {
                break;
            }
            report = w.step(None);
        }
        match (report.dropped, late) {
            (None, None) => assert_eq!(report.adoption.unwrap().sequence, c.sequence),
            (Some((dropped, ChunkRefusal::Past { late: found })), Some(late)) => {
                assert_eq!(dropped, c.sequence);
                assert!((found - late).abs() < 1e-6, "{found}");
            }
            other => panic!("{used} s: {other:?}"),
        }
    }
}

#[test]
fn when_chunks_stop_the_tail_is_played_then_it_decelerates_and_holds() {
    let mut w = running(config());
    // Still moving at its end, at 0.3 rad/s.
    let c = w.observe(|t, _| 0.3 * t);
    w.step(Some(&c));
    w.until(Mode::Coast, 100);
    let reached = w.told().0[0];
    assert!(reached > 0.26, "the tail was played: {reached}");
    assert_eq!(w.controller.status().reason, Some(Reason::Starved));
    assert_eq!(w.controller.status().level, Level::Warn);
    for _ in 0..10 {
        assert!(w.step(None).published);
    }
    let (q, v) = w.told();
    assert_eq!(v, vec![0.0, 0.0]);
    // 0.3 rad/s at 8 rad/s² needs 6 mm.
    assert!(q[0] - reached < 0.015 && w.controller.mode() == Mode::Coast);
    (0..120).for_each(|_| {
        w.step(None);
    });
    assert_eq!(w.controller.status().level, Level::Error, "silence is not safe");
    assert_eq!(w.told().0, q);
    // A fresh chunk goes on from there, dated by its adoption.
    let c = w.observe(|_, _| 0.3);
    let report = w.step(Some(&c));
    assert_eq!((report.mode, report.adoption.unwrap().from_rest), (Mode::Run, true));
    let p = w.controller.status().plan.unwrap();
    assert!((p.origin.seconds_since(p.adopted_at)).abs() < 1e-8 && p.adopted_at == w.now.plus_seconds(0.02), "{p:?}");
    assert_eq!(w.controller.status().level, Level::Ok);
    (0..15).for_each(|_| {
        w.step(None);
    });
    assert!((w.told().0[0] - 0.3).abs() < 1e-6);
}

#[test]
fn after_a_coast_a_distant_plan_is_approached_by_a_ramp() {
    // Blended over 3 steps of 50 ms if that is enough: a centimetre is near, a hand's breadth is not.
    for (away, mode) in [(0.01, Mode::Run), (0.1, Mode::Ramp), (1.2, Mode::Ramp)] {
        let mut w = running(config());
        w.until(Mode::Coast, 100);
        let c = w.observe(|_, _| away);
        assert_eq!(w.step(Some(&c)).mode, mode, "{away} away");
    }
}

#[test]
fn with_miss_policy_stop_starvation_disarms() {
    let mut c = config();
    c.miss_policy = MissPolicy::Stop;
    let mut w = running(c);
    w.until(Mode::Active, 100);
    assert_eq!(w.controller.status().reason, Some(Reason::Starved));
}

/// Armed and moving at 1 rad/s.
fn moving() -> World {
    let mut w = running(config());
    let t0 = w.now;
    run(&mut w, t0, 55, 0.05, |t, _| if t < 1.0 { 0.5 * t * t } else { t - 0.5 });
    assert!(w.told().1[0] > 0.95, "{:?}", w.told());
    w
}

#[test]
fn disarming_decelerates_to_active() {
    let mut w = moving();
    w.requests.disable = true;
    let report = w.step(None);
    assert_eq!((report.mode, report.stop), (Mode::Stopping, Some(Reason::Disabled)));
    w.until(Mode::Active, 20);
    assert_eq!(w.told().1, vec![0.0, 0.0]);
    assert!(!w.step(None).published);
    let epoch = w.controller.epoch();
    assert_eq!(epoch, 0, "chunks in flight stay good");
}

#[test]
fn a_stop_is_in_time_latched_and_invalidates_chunks_in_flight() {
    let mut w = moving();
    let flying = w.observe(|_, _| 0.5);
    w.requests.stop = true;
    let report = w.step(None);
    assert_eq!((report.mode, report.stop), (Mode::Stopping, Some(Reason::StopRequested)));
    let refused = w.step(Some(&flying)).chunk;
    assert!(matches!(refused, Some(ChunkVerdict::Refused(ChunkRefusal::Epoch { chunk: 0, current: 1 }))));
    let ticks = w.until(Mode::Stopped, 60);
    assert!(ticks as f64 * 0.02 <= 0.5 + 0.02);
    w.requests.enable = true;
    assert_eq!(w.step(None).refusal, Some(Refusal::Mode(Mode::Stopped)));
    w.requests.reset = true;
    assert_eq!(w.step(None).mode, Mode::Active);
    w.requests.enable = true;
    assert_eq!(w.step(Some(&flying)).refusal, Some(Refusal::NoChunk), "a reset revives none");
}

#[test]
fn stop_wins_over_reset_and_enable_and_works_unarmed() {
    let mut w = World::new(config());
    let c = w.observe(hold);
    w.step(Some(&c));
    w.requests = Requests { enable: true, disable: false, stop: true, reset: true };
    let report = w.step(None);
    assert_eq!((report.mode, report.published), (Mode::Stopped, false));
    assert_eq!(w.controller.status().counters.discarded, 1);
}

#[test]
fn what_is_not_safe_any_more_decelerates_disarms_and_says_why() {
    type Spoil = fn(&mut World);
    let cases: [(Spoil, &str); 6] = [
        (|w| w.age = 0.2, "joint 'shoulder' is 200 ms old (limit 100 ms)"),
        (|w| w.disturbance[1] = f64::NAN, "no usable position of joint 'elbow'"),
        (|w| w.age = f64::NAN, "no usable position of joint 'shoulder'"),
        (|w| w.health = InputHealth::Bad(InputFault::CameraFrozen { camera: 0, age: 2.0 }), "same picture for 2.0 s"),
        (
            |w| w.health = InputHealth::Bad(InputFault::OutputUnconnected { output: 0 }),
            "nobody listens to /arm/joint_trajectory, the topic of output 'arm'",
        ),
        (|w| w.lifecycle = Lifecycle::Warmup, "deactivated"),
    ];
    for (spoil, says) in cases {
        let mut w = moving();
        spoil(&mut w);
        let report = w.step(None);
        assert_eq!(report.mode, Mode::Stopping, "{says}");
        let text = report.stop.unwrap().text(&names());
        assert!(text.contains(says), "{text}");
        for _ in 0..30 {
            w.step(None);
        }
        assert!(!w.controller.mode().publishes() && !w.controller.mode().armed());
        assert_eq!(w.told().1, vec![0.0, 0.0]);
        assert!(w.controller.status().reason.unwrap().text(&names()).contains(says));
    }
}

#[test]
fn a_robot_that_is_not_where_it_was_told_is_held_where_it_is() {
    let mut w = moving();
    w.disturbance = vec![0.0, -0.15];
    let told = w.told().0;
    let report = w.step(None);
    assert!(report.published && !report.restarted, "one measurement may be garbage: it brakes on its way");
    assert_eq!(report.mode, Mode::Stopping);
    let Some(Reason::TrackingError { joint: 1, measured, max, .. }) = report.stop else { panic!("{report:?}") };
    assert_eq!(max, 0.1);
    assert!(measured < told[1] - 0.1);
    let measured = w.robot.at(w.now.plus_seconds(0.02)).0[1] - 0.15;
    let again = w.step(None);
    assert!(again.restarted && again.published, "two are not");
    assert!((w.window.positions(0)[1] - measured).abs() < 1e-9);
    assert!((0..w.window.points()).all(|i| w.window.velocities(i).iter().all(|v| *v == 0.0)));
    let text = report.stop.unwrap().text(&names());
    assert!(text.contains("joint 'elbow' was told") && text.contains("limit 0.1000 apart"), "{text}");
    assert_eq!(w.controller.mode(), Mode::Active, "at rest at once, disarmed");
    assert_eq!(w.controller.epoch(), 1);
}

#[test]
fn one_measurement_that_cannot_be_moves_nothing() {
    // Inside the limits for one tick, then right again; or past them for good, and no pose at all.
    for (error, ticks) in [(-0.6, 1), (0.8, 1), (90.0, 60), (-1e300, 60)] {
        let mut w = moving();
        for i in 0..60 {
            w.disturbance = vec![0.0, if i < ticks { error } else { 0.0 }];
            let report = w.step(None);
            assert!(!report.restarted, "{error} in tick {i}");
            assert!(!report.mode.armed());
        }
        assert_eq!(w.controller.mode(), Mode::Active);
        assert_eq!(w.told().1, vec![0.0, 0.0], "braked on its way");
        let text = w.controller.status().reason.unwrap().text(&names());
        assert!(text.contains("joint 'elbow' was told"), "{text}");
    }
}

#[test]
fn the_same_measurement_again_confirms_nothing_and_a_robot_at_rest_waits_for_another() {
    let mut w = running(config());
    w.disturbance = vec![0.0, 0.3];
    w.step(None);
    for _ in 0..3 {
        // Nothing new is heard.
        w.age += 0.02;
        let report = w.step(None);
        assert!(report.published && !report.restarted);
        assert_eq!(report.mode, Mode::Stopping, "it stands, and what was measured is still in doubt");
    }
    w.age = 0.005;
    let report = w.step(None);
    assert!(report.restarted);
    assert_eq!(report.mode, Mode::Active);
    assert!((w.window.positions(0)[1] - 0.3).abs() < 1e-9, "it is let go where it is");

    let mut w = running(config());
    w.disturbance = vec![0.0, 0.3];
    w.step(None);
    for _ in 0..6 {
        w.age += 0.02;
        assert!(!w.step(None).restarted);
    }
    assert_eq!(w.controller.mode(), Mode::Active, "older than it may be, it is no measurement");

    let mut w = running(config());
    w.disturbance = vec![0.0, 0.3];
    w.step(None);
    w.wait(-3.0);
    w.tick(None);
    assert!(w.step(None).restarted, "after a jump of the clock, the next two are compared");
}

#[test]
fn a_joint_at_its_stop_may_be_measured_a_little_past_its_limit() {
    let mut w = World::new(config());
    w.robot = Played::hold(w.now, &[1.5, 0.0], 0.02);
    w.disturbance = vec![0.03, 0.0];
    let report = w.arm(|_, j| if j == 0 { 1.4 } else { 0.0 });
    assert!(report.restarted && report.published);
    assert_eq!(w.window.now().0, [1.5, 0.0], "and is told to be on it");
}

#[test]
fn a_stop_stays_latched_if_reset_is_asked_while_it_brakes() {
    let mut w = moving();
    w.requests.stop = true;
    w.step(None);
    w.requests.reset = true;
    assert_eq!(w.step(None).mode, Mode::Stopping);
    w.until(Mode::Stopped, 60);
}

#[test]
fn whoever_asks_to_arm_in_the_tick_of_a_stop_is_refused() {
    for (stop, disable) in [(true, false), (false, true)] {
        let mut w = moving();
        w.requests = Requests { enable: true, stop, disable, ..Requests::default() };
        assert_eq!(w.step(None).refusal, Some(Refusal::Mode(Mode::Stopping)));
    }
}

#[test]
fn the_shortest_window_follows_the_plan_whenever_its_ticks_come() {
    for early in [0.0, 5e-6, 2e-4, 3e-3] {
        let mut c = config();
        c.output_window = c.period;
        let mut w = World::new(c);
        w.arm(hold);
        let t0 = w.now;
        run(&mut w, t0, 60, 0.05, hold);
        let t0 = w.now;
        for i in 0..120 {
            let sign = if i % 2 == 0 { -1.0 } else { 1.0 };
            w.wait(sign * early);
            run(&mut w, t0, 1, 0.05, |t, _| 0.3 * t);
            w.step(None);
        }
        let (went, asked) = (w.told().0[0], 0.3 * w.now.seconds_since(t0));
        assert!(went > 0.8 * asked, "{went} of {asked} with ticks {early} s early");
    }
}

#[test]
fn a_driver_that_holds_its_command_catches_up_no_faster_than_a_joint_may_move() {
    let mut w = moving();
    w.step(None);
    let mut sent = w.window.follow(None);
    let (mut before, mut most) = (w.window.command().to_vec(), 0.0f64);
    for i in 0..80 {
        w.step(None);
        // Nothing was sent for a while, though the controller went on.
        if !(20..28).contains(&i) {
            sent = w.window.follow(Some(&sent));
            let step = w.window.command().iter().zip(&before).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            most = most.max(step);
            before = w.window.command().to_vec();
        }
    }
    assert!(most <= 2.0 * 0.02 * (1.0 + 1e-9) && most > 0.03, "{most}");
    assert!((before[0] - w.window.sample(0.02).0[0]).abs() < 1e-9, "it has caught up");
    // A pose that does not go on from the last one is taken at once: nothing pushes on against a stop. The other joint,
    // of which nothing new is known, goes on.
    w.disturbance = vec![-0.5, 0.0];
    w.step(None);
    assert!(w.step(None).restarted);
    let _ = w.window.follow(Some(&sent));
    assert_eq!(w.window.command()[0], w.window.now().0[0]);
}

#[test]
fn a_driver_that_holds_its_command_begins_where_the_robot_is_though_the_first_window_was_not_sent() {
    let mut w = moving();
    w.step(None);
    let sent = w.window.follow(None);
    w.requests.disable = true;
    w.step(None);
    w.until(Mode::Active, 60);
    // Somebody moves it, then it is armed again, under other settings.
    w.robot = Played::hold(w.now, &[-1.0, -1.0], 0.02);
    assert!(w.change(|c| c.ramp_time = 0.6));
    w.arm(|_, _| -1.0);
    w.step(None);
    let _ = w.window.follow(Some(&sent));
    assert!(w.window.command().iter().all(|q| (q + 1.0).abs() < 1e-3), "{:?}", w.window.command());
}

#[test]
fn a_robot_that_braked_by_itself_far_from_its_command_is_held_where_it_is() {
    let mut w = moving();
    w.step(None);
    let sent = w.window.follow(None);
    w.disturbance = vec![0.0, -0.3];
    w.health = InputHealth::Bad(InputFault::OutputBlocked);
    let measured = w.robot.at(w.now.plus_seconds(0.02)).0[1] - 0.3;
    assert!(w.step(None).restarted);
    assert!((w.window.positions(0)[1] - measured).abs() < 1e-9);
    let _ = w.window.follow(Some(&sent));
    assert!((w.window.command()[1] - measured).abs() < 1e-9);
}

#[test]
fn a_joint_in_doubt_is_settled_after_another_one_was_held() {
    let mut w = moving();
    w.disturbance = vec![0.0, -0.3];
    w.step(None);
    w.disturbance = vec![-0.3, -0.3];
    let told = w.robot.at(w.now.plus_seconds(0.02)).0;
    let report = w.step(None);
    assert!(report.restarted);
    assert_eq!(report.mode, Mode::Stopping, "the first joint is in doubt");
    assert!((w.window.positions(0)[1] - (told[1] - 0.3)).abs() < 1e-9);
    assert!((w.window.positions(0)[0] - told[0]).abs() < 1e-9);
    w.disturbance = vec![-0.3, 0.0];
    let report = w.step(None);
    assert!(report.restarted);
    assert_eq!(report.mode, Mode::Active);
    assert!((w.window.positions(0)[0] - (told[0] - 0.3)).abs() < 1e-9);
}

#[test]
fn a_robot_that_braked_by_itself_is_held_where_it_is() {
    let mut w = moving();
    // Less than a tracking error: only that nothing was sent tells.
    w.disturbance = vec![0.0, -0.05];
    w.health = InputHealth::Bad(InputFault::OutputBlocked);
    let measured = w.robot.at(w.now.plus_seconds(0.02)).0[1] - 0.05;
    let report = w.step(None);
    assert!(report.restarted && report.published);
    assert_eq!(report.stop, Some(Reason::Input(InputFault::OutputBlocked)));
    assert!((w.window.positions(0)[1] - measured).abs() < 1e-9);
    assert!((0..w.window.points()).all(|i| w.window.velocities(i).iter().all(|v| *v == 0.0)));
}

#[test]
fn a_paused_clock_repeats_the_last_command() {
    let mut w = moving();
    w.step(None);
    let last = w.window.clone();
    let interventions = w.controller.status().interventions;
    for _ in 0..10 {
        w.age += 1.0; // nobody sends anything while time stands still
        assert!(w.tick(None).published);
        assert_eq!(w.window, last);
    }
    assert_eq!(w.controller.status().interventions, interventions);
    assert_eq!(w.controller.status().counters.paused, 10);
    w.requests.stop = true;
    assert_eq!(w.tick(None).mode, Mode::Stopping, "but a stop is heard");
}

#[test]
fn a_clock_that_jumps_back_disarms_and_invalidates_chunks_in_flight() {
    let mut w = moving();
    let flying = w.observe(hold);
    w.wait(-3.0);
    let report = w.tick(Some(&flying));
    assert_eq!((report.mode, w.controller.epoch()), (Mode::Stopping, 1));
    let Some(Reason::ClockJumpedBack { seconds }) = report.stop else { panic!("{report:?}") };
    assert!((seconds - 3.0).abs() < 1e-9);
    assert!(matches!(report.chunk, Some(ChunkVerdict::Refused(ChunkRefusal::Epoch { .. }))));
    w.until(Mode::Active, 20);
}

#[test]
fn a_clock_that_jumps_far_forward_finds_the_robot_at_the_end_of_its_window() {
    let mut w = moving();
    let end = w.window.positions(w.window.points() - 1).to_vec();
    w.wait(5.0);
    let report = w.tick(None);
    assert_eq!(report.mode, Mode::Coast, "what is left of the plan is too old");
    assert_eq!(w.told().0, end);
}

#[test]
fn after_skipped_periods_it_continues_from_what_the_robot_was_told() {
    let mut w = moving();
    let promised = w.window.clone();
    let before = w.controller.status().counters;
    w.skipped = 4;
    w.wait(0.08);
    w.step(None);
    let (q, v) = w.window.now();
    assert!(q.iter().zip(promised.positions(4)).all(|(a, b)| (a - b).abs() < 1e-12));
    assert!(v.iter().zip(promised.velocities(4)).all(|(a, b)| (a - b).abs() < 1e-9));
    let c = w.controller.status().counters;
    assert_eq!((c.ticks - before.ticks, c.skipped - before.skipped, c.published - before.published), (5, 4, 1));
}

#[test]
fn an_early_or_late_tick_keeps_the_promised_point() {
    let mut w = moving();
    let promised = w.window.clone();
    w.wait(0.013);
    w.tick(None);
    assert!((w.window.seconds_from_start(0) - 0.007).abs() < 1e-9);
    assert_eq!(w.window.positions(0), promised.positions(0));
    assert_eq!(w.window.velocities(0), promised.velocities(0));
}

#[test]
fn jitter_is_not_taken_for_time_that_was_not_used() {
    let mut w = running(config());
    let mut adopted = 0;
    for i in 0..200 {
        w.wait([0.02, 0.013, 0.027, 0.021, 0.019][i % 5]);
        let c = w.observe(|t, _| 0.1 * t.sin());
        if w.tick(Some(&c)).adoption.is_some() {
            adopted += 1;
        }
        let p = w.controller.status().plan.unwrap();
        if adopted > 1 {
            // One nanosecond of rounding per tick.
            assert!(p.origin.0.abs_diff(p.state_stamp.0) < 20, "{p:?}");
            assert!(p.lag.abs() < 1e-7);
        }
    }
    assert!(adopted > 10);
}

#[test]
fn a_window_has_points_one_period_apart_and_ends_at_rest() {
    let mut w = moving();
    w.step(None);
    let win = &w.window;
    assert_eq!(win.driven_points(), 10, "200 ms at 50 Hz");
    assert_eq!((win.time_from_start(0).as_millis(), win.period()), (20, 0.02));
    for i in 1..win.points() {
        let gap = win.time_from_start(i) - win.time_from_start(i - 1);
        assert_eq!(gap.as_nanos(), 20_000_000);
    }
    assert!(win.velocities(win.driven_points() - 1)[0] > 0.5, "driven");
    assert_eq!(win.velocities(win.points() - 1), [0.0, 0.0]);
    assert!(win.points() > win.driven_points());
    assert!(win.velocities(win.points() - 2)[0] > 0.0, "at rest only at its end");
    let (q, _) = win.sample(0.02);
    assert_eq!(&q[..], win.positions(0));
    let mut w = running(config());
    w.step(None);
    assert_eq!((w.window.points(), w.window.driven_points()), (10, 10), "who stands still needs no tail");
}

#[test]
fn time_scaling_keeps_the_path() {
    let mut w = running(config());
    // A straight line in joint space at 6 rad/s, three times what is allowed, from 0.3 s on.
    let line = |t: f64, j: usize| (1.2 * ((t - 0.3) * 5.0).clamp(0.0, 1.0)) * if j == 0 { 1.0 } else { -0.5 };
    let c = w.observe(line);
    let mut c = Some(c);
    let before = w.controller.status().interventions;
    let mut furthest = 0.0f64;
    for _ in 0..150 {
        w.step(c.take().as_ref());
        let q = w.told().0;
        furthest = furthest.max(q[0]);
        assert!((q[1] + 0.5 * q[0]).abs() < 1e-9, "off the path: {q:?}");
    }
    let i = w.controller.status().interventions;
    assert!(furthest > 1.1, "{furthest}");
    assert!(i.of(0, Rule::Scaled) > before.of(0, Rule::Scaled));
    for rule in [Rule::Velocity, Rule::Acceleration] {
        assert_eq!(i.by_rule(rule), before.by_rule(rule), "the backstop was not needed");
    }
}

#[test]
fn a_plan_past_a_position_limit_ends_on_the_limit_without_bouncing() {
    let mut w = running(config());
    let t0 = w.now;
    let mut highest = 0.0f64;
    for _ in 0..150 {
        run(&mut w, t0, 1, 0.05, |t, j| if j == 0 { (1.2 * t).min(3.0) } else { 0.0 });
        let (q, v) = w.told();
        assert!(q[0] >= highest - 1e-9 && v[0] >= -1e-9, "it goes one way: {q:?} {v:?}");
        highest = q[0];
    }
    assert!((highest - 1.5).abs() < 1e-6, "{highest}");
    let i = w.controller.status().interventions;
    assert!(i.of(0, Rule::Position) > 0);
    assert_eq!(i.of(1, Rule::Position), 0, "each joint on its own");
}

#[test]
fn an_action_past_a_limit_counts_for_its_joint_as_soon_as_its_chunk_is_adopted() {
    for (far, counted) in [(1.5, 0), (-1.5, 0), (1.51, 1), (-1.51, 1)] {
        let mut w = running(config());
        // One action, most of a second away.
        let c = w.observe(|t, j| if j == 1 && (t - 0.85).abs() < 0.01 { far } else { 0.0 });
        let before = w.controller.status().interventions;
        w.until_adopted(&c);
        let after = w.controller.status().interventions;
        let position = |joint| after.of(joint, Rule::Position) - before.of(joint, Rule::Position);
        assert_eq!((position(0), position(1)), (0, counted), "{far}");
    }
}

#[test]
fn the_ramp_is_bounded_and_starts_at_the_measured_pose() {
    let mut w = World::new(config());
    w.robot = Played::hold(w.now, &[-0.6, 0.2], 0.02);
    let report = w.arm(|_, j| if j == 0 { 0.6 } else { 0.2 });
    assert!(report.restarted && report.adoption.unwrap().from_rest);
    assert_eq!(w.window.now().0, [-0.6, 0.2]);
    let t0 = w.now;
    let mut fastest = 0.0f64;
    for _ in 0..200 {
        if w.controller.mode() != Mode::Ramp {
            break;
        }
        run(&mut w, t0, 1, 0.05, |_, j| if j == 0 { 0.6 } else { 0.2 });
        fastest = fastest.max(w.told().1[0].abs());
    }
    // 1.2 rad at half of 2 rad/s and 8 rad/s² takes 1.8 s, more than the ramp time of 0.5 s.
    let took = w.now.seconds_since(t0);
    assert!((took - 1.8).abs() < 0.05, "{took}");
    assert!(fastest < 1.05, "{fastest}");
    assert!((w.told().0[0] - 0.6).abs() < 1e-3);
}

#[test]
fn settings_change_only_while_unarmed() {
    let slower = |c: &mut ControlConfig| c.joints.iter_mut().for_each(|j| j.limits = limits(1.0, 4.0));
    let mut w = moving();
    assert!(!w.change(slower));
    assert_eq!(w.controller.config(), &config(), "the old ones stay");
    w.requests.disable = true;
    w.step(None);
    assert!(!w.change(slower), "still stopping");
    w.until(Mode::Active, 20);
    assert!(w.change(slower));
    assert_eq!(w.controller.config().joints[0].limits.unwrap().max_velocity, 1.0);
}

#[test]
fn how_old_a_chunk_may_be_changes_while_moving() {
    let mut w = moving();
    let late = |w: &mut World| {
        let stamp = w.now.plus_seconds(-0.3);
        let c = ActionChunk { state_stamp: stamp, oldest_image_stamp: stamp, ..w.observe(hold) };
        w.step(Some(&c)).chunk.unwrap()
    };
    assert_eq!(late(&mut w), ChunkVerdict::Accepted);
    w.controller.set_ages(0.2, 0.7);
    assert!(matches!(late(&mut w), ChunkVerdict::Refused(ChunkRefusal::TooOld { max: 0.2, .. })));
    w.controller.set_ages(0.5, 0.2);
    assert!(matches!(late(&mut w), ChunkVerdict::Refused(ChunkRefusal::ImagesTooOld { max: 0.2, .. })));
    w.controller.set_ages(0.5, 0.7);
    assert_eq!(late(&mut w), ChunkVerdict::Accepted);
    assert_eq!((w.controller.mode(), w.controller.epoch()), (Mode::Run, 0));
}

#[test]
fn a_change_of_settings_keeps_the_books_the_latch_and_the_newest_prompt_and_drops_what_waits() {
    let mut w = moving();
    w.requests.stop = true;
    w.step(None);
    w.until(Mode::Stopped, 20);
    let mut waiting = w.observe(hold);
    waiting.prompt_generation = 3;
    assert_eq!(w.step(Some(&waiting)).chunk, Some(ChunkVerdict::Accepted));
    let flying = w.observe(hold);
    let before = w.controller.status();
    assert!(w.change(|c| c.replan_steps = 4));
    let after = w.controller.status();
    assert_eq!((after.mode, after.reason), (Mode::Stopped, Some(Reason::StopRequested)));
    assert_eq!(after.epoch, before.epoch + 1);
    let discarded = before.counters.discarded + 1;
    assert_eq!(after.counters, Counters { discarded, ..before.counters });
    assert_eq!(after.interventions, before.interventions);
    assert_eq!((after.seam_jump_max, after.tracking_error_max), (before.seam_jump_max, before.tracking_error_max));
    assert_eq!(after.command.len(), 0, "nothing was told under these settings");
    let refused = |r: TickReport| match r.chunk {
        Some(ChunkVerdict::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(w.step(Some(&flying))), ChunkRefusal::Epoch { .. }));
    let of_the_old_prompt = ActionChunk { prompt_generation: 2, ..w.observe(hold) };
    assert!(matches!(refused(w.step(Some(&of_the_old_prompt))), ChunkRefusal::OldPrompt { chunk: 2, current: 3 }));
    w.requests.enable = true;
    assert_eq!(w.step(None).refusal, Some(Refusal::Mode(Mode::Stopped)), "the stop is still latched");
}

#[test]
fn the_level_is_that_of_the_mode_and_of_the_reason_for_standing_still() {
    let mut w = World::new(config());
    w.lifecycle = Lifecycle::Unconfigured;
    w.step(None);
    assert_eq!(w.controller.status().level, Level::Stale, "no news");
    let mut w = moving();
    assert_eq!(w.controller.status().level, Level::Ok);
    w.health = InputHealth::Bad(InputFault::CameraMissing { camera: 0 });
    w.step(None);
    w.until(Mode::Active, 20);
    assert_eq!(w.controller.status().level, Level::Error);
    w.lifecycle = Lifecycle::Unconfigured;
    w.step(None);
    assert_eq!(w.controller.status().mode, Mode::Unconfigured);
    assert_eq!(w.controller.status().level, Level::Error, "somebody has to act, loaded or not");
}

#[test]
fn a_failure_stops_and_is_left_by_reset_once_it_is_over() {
    let mut w = moving();
    w.lifecycle = Lifecycle::Failed;
    assert_eq!(w.step(None).stop, Some(Reason::Failed));
    let epoch = w.controller.epoch();
    w.until(Mode::Fault, 20);
    assert_eq!(w.controller.epoch(), epoch, "one failure ends one epoch");
    w.requests.reset = true;
    assert_eq!(w.step(None).mode, Mode::Fault, "it is still there");
    w.lifecycle = Lifecycle::Ready;
    assert_eq!(w.step(None).mode, Mode::Fault, "it is not left by itself");
    assert_eq!(w.controller.status().level, Level::Error);
    w.requests.reset = true;
    assert_eq!(w.step(None).mode, Mode::Active);
    assert_eq!(w.controller.status().reason, None);
}

#[test]
fn the_status_says_what_guided_chunking_needs() {
    let mut w = running(config());
    let s = w.controller.status();
    let p = s.plan.unwrap();
    assert_eq!((p.horizon, p.dt, p.pace), (20, 0.05, 1.0));
    assert!(p.origin >= p.state_stamp && p.adopted_at >= p.origin && p.next_adoption > p.adopted_at);
    assert!((s.chunk_age.unwrap() - w.now.seconds_since(p.state_stamp)).abs() < 1e-12);
    w.requests.stop = true;
    w.step(None);
    assert_eq!(w.controller.status().plan, None);
}
