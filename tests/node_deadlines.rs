//! The node without a middleware, driven over a robot that does what it is told.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use pi0_mps::clock::Clock;
use pi0_mps::control::{ActionChunk, Window};
use pi0_mps::model::Frame;
use pi0_mps::model::synthetic::{self, JOINT_NAMES, MEAN_POSE};
use pi0_mps::node::{Node, Outputs, Status};
use pi0_mps::params::{Params, Value, yaml};
use pi0_mps::rt::SystemClock;

const PATIENCE: Duration = Duration::from_secs(60);

/// Sends the next position of every window to the test.
struct Robot(Sender<Vec<f64>>);

impl Outputs for Robot {
    fn trajectory(&mut self, window: &Window) {
        let _ = self.0.send(window.now().0.to_vec());
    }
    fn chunk(&mut self, _: &ActionChunk) {}
}

fn value<'a>(status: &'a Status, diagnostic: &str, key: &str) -> Option<&'a str> {
    let d = status.diagnostics.iter().find(|d| d.name == diagnostic)?;
    d.values.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
}

/// Minor and major page faults of this process's thread of that name so far, from the kernel's own count.
fn page_faults(thread: &str) -> [u64; 2] {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|t| t.unwrap().path());
    let of = |file: &str, task: &std::path::Path| std::fs::read_to_string(task.join(file)).unwrap_or_default();
    let task = tasks.into_iter().find(|t| of("comm", t).trim() == thread).unwrap();
    // Behind the name in brackets: state, 6 numbers, minflt, cminflt, majflt.
    let stat = of("stat", &task);
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    [fields[7].parse().unwrap(), fields[9].parse().unwrap()]
}

#[test]
fn deadlines_are_reported_from_the_first_command_on() {
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), 1).unwrap();
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/robots/sim_arm.yaml")).unwrap();
    let mut given = yaml::overrides(&text, "pi0_mps").unwrap();
    given.push(("checkpoint".into(), Value::String(dir.path().display().to_string())));
    for (name, value) in [
        ("cameras.base.max_age_ms", Value::Double(60_000.0)),
        ("cameras.wrist.max_age_ms", Value::Double(60_000.0)),
        ("max_joint_state_age_ms", Value::Double(60_000.0)),
        ("lock_memory", Value::Bool(false)),
        ("recorder.folder", Value::String(dir.path().join("recordings").display().to_string())),
    ] {
        given.retain(|(n, _)| n != name);
        given.push((name.into(), value));
    }
    let settings = Params::from_overrides(given).unwrap().settings();
    let (send, told) = channel();
    let node = Node::start(settings, Arc::new(SystemClock), Box::new(Robot(send))).unwrap();
    let (inputs, names) = (node.inputs(), JOINT_NAMES.map(String::from));
    let frame = Frame::new(32, 32, 96, "rgb8", (0..32 * 32 * 3).map(|i| i as u8).collect::<Vec<_>>()).unwrap();
    let mut pose = MEAN_POSE.to_vec();
    let (mut before, mut armed, mut commands) = (None, false, 0);
    let mut soak = None;
    let end = Instant::now() + PATIENCE;
    loop {
        let stamp = SystemClock.ros();
        (0..2).for_each(|camera| inputs.frame(camera, stamp, Ok(frame.clone())));
        inputs.joints(stamp, &names, &pose);
        let status = node.status();
        if !armed {
            before = Some(status.clone());
            armed = node.commands().enable(true).is_ok();
        }
        while let Ok(q) = told.try_recv() {
            (pose, commands) = (q, commands + 1);
        }
        // Once everything has been done once, the control thread meets no page fault any more.
        if commands > 60 && value(&status, "control", "observation_to_command_ms_p50").is_some_and(|v| v != "0.00") {
            let (from, faults) = *soak.get_or_insert_with(|| (commands, page_faults("pi0_control")));
            if commands > from + 200 {
                assert_eq!(page_faults("pi0_control"), faults, "after {from} commands, and 200 more");
                break;
            }
        }
        assert!(Instant::now() < end, "{commands} commands; {status:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (before, after) = (before.unwrap(), node.status());
    assert_eq!(value(&before, "control", "slack_ms_min"), None, "nothing was published");
    assert_eq!(value(&after, "control", "deadline_ms"), Some("20.00"));
    let ms = |diagnostic, key| value(&after, diagnostic, key).unwrap().parse::<f64>().unwrap();
    assert!(ms("control", "slack_ms_min") <= ms("control", "slack_ms_p01"));
    assert!(ms("control", "slack_ms_p01") <= ms("control", "slack_ms_p50"));
    assert!(ms("control", "slack_ms_p50") < 20.0);
    // The slowest command was published that much before the deadline, or after it.
    assert!((ms("control", "slack_ms_min") + ms("control", "publish_ms_max") - 20.0).abs() < 0.02);
    // The first command of a chunk is one of those that follow it.
    assert!(ms("control", "plan_age_ms_max") >= ms("control", "observation_to_command_ms_max"));
    // Decoded, then handed over, then adopted.
    assert!(ms("control", "observation_to_command_ms_max") > 0.0 && ms("inference", "hand_over_ms_max") > 0.0);
    node.shutdown().unwrap();
}
