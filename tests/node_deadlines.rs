//! The node without a middleware, driven over a robot that does what it is told: its deadlines, and what its control
//! thread does not do once it runs: allocate, free, wait for anything but its next period, or meet a page fault.

#[path = "common/counting.rs"]
mod counting;

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use counting::Counting;
use pi0_mps::bag::BagReader;
use pi0_mps::bag::message::{Message, Tick};
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

/// Periods in which the control thread ran: not those it skipped, but those whose window was not sent.
fn turns(status: &Status) -> u64 {
    let count = |key| value(status, "control", key).unwrap().parse::<u64>().unwrap();
    count("ticks") - count("skipped") + count("windows_not_sent")
}

/// The thread that is watched, and how often it has allocated or freed.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static ID: Cell<i32> = const { Cell::new(0) };
}

fn count() {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched == 0 {
        return;
    }
    // A thread that is being torn down has no identity any more; it is not the one under test.
    let _ = ID.try_with(|id| {
        if id.get() == 0 {
            // SAFETY: gettid takes nothing and cannot fail.
            id.set(unsafe { libc::gettid() });
        }
        if id.get() == watched {
            CALLS.fetch_add(1, Ordering::Relaxed);
        }
    });
}

#[global_allocator]
static ALLOCATOR: Counting = Counting(count);

/// A thread of this process, as the kernel knows it.
struct Task(PathBuf);

impl Task {
    fn of_name(name: &str) -> Self {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|t| t.unwrap().path());
        let is = |task: &PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name);
        Self(tasks.into_iter().find(is).unwrap())
    }

    fn id(&self) -> i32 {
        self.0.file_name().unwrap().to_str().unwrap().parse().unwrap()
    }

    /// Minor and major page faults so far.
    fn page_faults(&self) -> [u64; 2] {
        // Behind the name in brackets: state, 6 numbers, minflt, cminflt, majflt.
        let stat = std::fs::read_to_string(self.0.join("stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        [fields[7].parse().unwrap(), fields[9].parse().unwrap()]
    }

    /// How often it has given up its CPU to wait for something.
    fn waits(&self) -> u64 {
        let status = std::fs::read_to_string(self.0.join("status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse().unwrap()
    }
}

/// What is known of the control thread at one moment of the soak.
#[derive(Debug, Clone, Copy)]
struct Moment {
    commands: usize,
    ticks: u64,
    faults: [u64; 2],
    waits: u64,
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
    let mut settings = Params::from_overrides(given).unwrap().settings();
    let (send, told) = channel();
    let node = Node::start(settings.clone(), Arc::new(SystemClock), Box::new(Robot(send))).unwrap();
    // Another one than at start, which everything has to take up.
    settings.timing.deadline = Duration::from_millis(30);
    node.apply(&settings).unwrap();
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
        // Once everything has been done once, nothing of this happens any more, whatever settings change meanwhile.
        let adopted = value(&status, "control", "observation_to_command_ms_p50").is_some_and(|v| v != "0.00");
        if commands > 60 && adopted && soak.is_none() {
            let control = Task::of_name("pi0_control");
            WATCHED.store(control.id(), Ordering::Relaxed);
            CALLS.store(0, Ordering::Relaxed);
            let (ticks, faults, waits) = (turns(&status), control.page_faults(), control.waits());
            soak = Some((control, Moment { commands, ticks, faults, waits }));
        }
        if let Some((control, begin)) = &soak {
            if commands > begin.commands + 100 {
                settings.inputs.cameras[0].max_age += Duration::from_millis(1);
                node.apply(&settings).unwrap();
            }
            if commands > begin.commands + 200 {
                let waits = control.waits();
                assert_eq!(control.page_faults(), begin.faults, "page faults since {begin:?}");
                assert_eq!(CALLS.load(Ordering::Relaxed), 0, "calls of the allocator since {begin:?}");
                // One sleep a period. A lock that somebody else holds would be one more.
                let periods = turns(&node.status()) - begin.ticks;
                assert!(waits - begin.waits <= periods + 1, "{waits} waits in {periods} periods since {begin:?}");
                break;
            }
        }
        assert!(Instant::now() < end, "{commands} commands; {status:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (before, after) = (before.unwrap(), node.status());
    assert_eq!(value(&before, "control", "slack_ms_min"), None, "nothing was published");
    assert_eq!(value(&after, "control", "deadline_ms"), Some("30.00"));
    let ms = |diagnostic, key| value(&after, diagnostic, key).unwrap().parse::<f64>().unwrap();
    assert!(ms("control", "slack_ms_min") <= ms("control", "slack_ms_p01"));
    assert!(ms("control", "slack_ms_p01") <= ms("control", "slack_ms_p50"));
    assert!(ms("control", "slack_ms_p50") < 30.0);
    // The slowest command was published that much before the deadline, or after it.
    assert!((ms("control", "slack_ms_min") + ms("control", "publish_ms_max") - 30.0).abs() < 0.02);
    // The first command of a chunk is one of those that follow it.
    assert!(ms("control", "plan_age_ms_max") >= ms("control", "observation_to_command_ms_max"));
    // Decoded, then handed over, then adopted.
    assert!(ms("control", "observation_to_command_ms_max") > 0.0 && ms("inference", "hand_over_ms_max") > 0.0);
    // As in a recording.
    let recording = node.commands().save_recording().unwrap();
    let ticks = BagReader::open(recording.as_ref()).unwrap().map(Result::unwrap).filter(|r| r.topic.kind == Tick::TYPE);
    let slack: Vec<_> = ticks.map(|r| r.decode::<Tick>().unwrap().times).filter(|t| t[2].is_finite()).collect();
    assert!(slack.len() > 100 && slack.iter().all(|[.., publish, slack]| (publish + slack - 30.0).abs() < 1e-9));
    node.shutdown().unwrap();
}
