//! The node with a policy in virtual time: it arms, moves, and does the same every time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pi0_mps::clock::{Clock, Monotonic, RosTime, VirtualClock};
use pi0_mps::control::chunk::ActionChunk;
use pi0_mps::control::{Lifecycle, Mode, Requests, Window};
use pi0_mps::engine::cpu::CpuEngine;
use pi0_mps::model::synthetic::{self, JOINT_NAMES, MEAN_POSE};
use pi0_mps::model::{Checkpoint, Frame, Resampler};
use pi0_mps::node::{Outputs, SteppedNode};
use pi0_mps::params::{Params, Value, yaml};
use pi0_mps::pipeline::StageTimes;

#[derive(Clone, Default)]
struct Windows(Arc<Mutex<Vec<Vec<f64>>>>);

impl Outputs for Windows {
    fn trajectory(&mut self, window: &Window) {
        self.0.lock().unwrap().push(window.positions(0).to_vec());
    }

    fn chunk(&mut self, _: &ActionChunk) {}
}

/// The first points of all windows of two seconds, and how many chunks were guided.
fn run(mode: &str, decode_ms: u64) -> (Vec<Vec<f64>>, u64) {
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), 1).unwrap();
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/robots/sim_arm.yaml")).unwrap();
    let mut given = yaml::overrides(&text, "pi0_mps").unwrap();
    for (name, value) in [("checkpoint", dir.path().to_str().unwrap()), ("pipeline_mode", mode), ("seam", "rtc")] {
        given.push((name.into(), Value::String(value.into())));
    }
    let settings = Params::from_overrides(given).unwrap().settings();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let engine = CpuEngine::load(&checkpoint, Resampler::from(checkpoint.origin()), 1).unwrap();
    let policy = Arc::new(SteppedNode::policy(&settings, &checkpoint).unwrap());
    let clock = VirtualClock::new(Monotonic(1_000_000_000), RosTime(1_000_000_000));
    let out = Windows::default();
    let times = StageTimes { encode: Duration::from_millis(20), decode: Duration::from_millis(decode_ms) };
    let mut node =
        SteppedNode::with_policy(settings, policy, &engine, times, Arc::new(clock.clone()), Box::new(out.clone()))
            .unwrap();
    node.set_lifecycle(Lifecycle::Ready);
    let names = JOINT_NAMES.map(String::from);
    let mut pose = MEAN_POSE.to_vec();
    for tick in 0..100u8 {
        node.inputs().joints(clock.ros(), &names, &pose);
        if tick.is_multiple_of(7) {
            let frame = Frame::new(32, 32, 96, "rgb8", vec![tick; 32 * 32 * 3]).unwrap();
            (0..2).for_each(|camera| node.inputs().frame(camera, clock.ros(), Ok(frame.clone())));
        }
        if node.control_status().mode == Mode::Active && node.control_status().counters.chunks > 0 {
            node.ask(Requests { enable: true, ..Requests::default() });
        }
        for _ in 0..2 {
            node.think();
            clock.advance(Duration::from_millis(10));
        }
        node.control(0).unwrap();
        node.publish();
        if let Some(told) = out.0.lock().unwrap().last() {
            pose.clone_from(told);
        }
    }
    let (status, report) = (node.control_status(), node.pipeline_report());
    assert_eq!(status.mode, Mode::Run, "{mode}: {:?}", status.reason);
    assert_eq!(report.encode.errors + report.decode.errors, 0, "{:?}", report.last_error);
    assert_eq!(report.decode.time.stats().max / 1_000_000, decode_ms, "a decode takes the time it is given");
    let windows = out.0.lock().unwrap().clone();
    assert!(windows.len() > 70, "{mode}: {} windows", windows.len());
    let (first, last) = (&windows[0], &windows[windows.len() - 1]);
    assert!(first.iter().zip(last).any(|(a, b)| (a - b).abs() > 0.01), "{mode}: the arm moves");
    (windows, report.guided)
}

#[test]
fn every_pipeline_mode_moves_the_arm_and_guides_its_chunks() {
    for mode in ["sequential", "pipelined", "dual_rate"] {
        assert!(run(mode, 60).1 > 0, "{mode}: no chunk was guided");
    }
}

#[test]
fn the_same_run_gives_the_same_motion_and_a_slower_device_another() {
    let (once, again, slower) = (run("pipelined", 60).0, run("pipelined", 60).0, run("pipelined", 250).0);
    assert!(once == again);
    assert!(once != slower);
}
