//! A robot over real topics: cameras, joint states, an arm that follows its trajectories perfectly, and a client of the
//! node's services.

use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::fmt::Display;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::{FutureExt, Stream, StreamExt};
use pi0_mps::clock::{Clock, RosTime};
use pi0_mps::control::JointLimits;
use pi0_mps::params::Settings;
use pi0_mps::rt::SystemClock;
use r2r::builtin_interfaces::msg::Time;
use r2r::diagnostic_msgs::msg::{DiagnosticArray, DiagnosticStatus};
use r2r::rcl_interfaces::msg::{Parameter, ParameterValue};
use r2r::rcl_interfaces::srv::SetParametersAtomically;
use r2r::sensor_msgs::msg::{Image, JointState};
use r2r::std_srvs::srv::{SetBool, Trigger};
use r2r::trajectory_msgs::msg::JointTrajectory;
use r2r::{Client, Publisher, QosProfile};

use crate::Outcome;

/// Full name of the node under test.
const NODE: &str = "/pi0_mps";
/// Longest wait for a service and its answer; `~/save_recording` writes a file meanwhile.
const ANSWER: Duration = Duration::from_secs(60);
/// Between joint states.
const STATE_PERIOD: Duration = Duration::from_millis(10);
/// Sides of the camera frames, pixels.
const FRAME: (usize, usize) = (640, 480);
/// Chunks that are kept.
const KEPT: usize = 16;
/// Faults that are kept in words.
const WORDS: usize = 5;
/// What a last velocity may be off zero, as the controller compares it.
const AT_REST: f64 = f32::EPSILON as f64;
/// Slack of every comparison with a limit.
const SLACK: f64 = 1e-6;

/// What the robot shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scene {
    /// The same images and the same pose until told otherwise, drawn from the number.
    Still(u64),
    /// Images with grain, and the arm where its trajectory has brought it.
    Live,
}

/// One message of `~/action_chunk`.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Of the joint state that it was decoded from.
    pub stamp: RosTime,
    /// `[horizon, joints]`; rad or m.
    pub positions: Vec<f64>,
}

/// Everything that the node has said since [`Robot::forget`].
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// The newest `~/status`; its text as `message`.
    pub status: BTreeMap<String, String>,
    /// Every text of `~/status`, once.
    pub texts: Vec<String>,
    /// Values and text (`message`) of the newest `/diagnostics` by the name of their part.
    pub diagnostics: BTreeMap<String, BTreeMap<String, String>>,
    /// The newest chunks.
    pub chunks: Vec<Chunk>,
    /// When each chunk arrived.
    pub chunk_times: Vec<Instant>,
    /// Trajectories that came.
    pub trajectories: u64,
    /// Trajectories that were wrong, and what was wrong with the first of them.
    pub wrong: (u64, Vec<String>),
    /// Whether the newest trajectory speeds up nowhere: a stop, or a hold.
    pub brakes: bool,
}

impl Heard {
    /// A value of the status; empty if there is none.
    pub fn status(&self, key: &str) -> &str {
        self.status.get(key).map_or("", String::as_str)
    }

    /// A counter of the status.
    pub fn count(&self, key: &str) -> u64 {
        self.status(key).parse().unwrap_or(0)
    }

    /// A value of a diagnostic; empty if there is none.
    pub fn diagnostic(&self, part: &str, key: &str) -> &str {
        self.diagnostics.get(part).and_then(|d| d.get(key)).map_or("", String::as_str)
    }
}

/// A point of a trajectory.
#[derive(Debug, Clone)]
struct Point {
    /// s since the epoch.
    at: f64,
    /// rad or m.
    positions: Vec<f64>,
    /// rad/s or m/s.
    velocities: Vec<f64>,
}

/// A trajectory; never without points.
#[derive(Debug, Clone)]
struct Path {
    stamp: RosTime,
    points: Vec<Point>,
}

impl Path {
    /// Standing still there.
    fn hold(home: &[f64]) -> Self {
        let point = Point { at: 0.0, positions: home.to_vec(), velocities: vec![0.0; home.len()] };
        Self { stamp: RosTime(0), points: vec![point] }
    }

    /// The position at `t`: cubic between points, held before the first and after the last.
    fn at(&self, t: f64) -> Vec<f64> {
        let after = self.points.partition_point(|p| p.at <= t);
        if after == 0 || after == self.points.len() {
            return self.points[after.saturating_sub(1)].positions.clone();
        }
        let (a, b) = (&self.points[after - 1], &self.points[after]);
        let (h, u) = (b.at - a.at, (t - a.at) / (b.at - a.at));
        (0..a.positions.len())
            .map(|j| {
                let (m0, m1, d) = (h * a.velocities[j], h * b.velocities[j], b.positions[j] - a.positions[j]);
                a.positions[j] + u * (m0 + u * ((3.0 * d - 2.0 * m0 - m1) + u * (m0 + m1 - 2.0 * d)))
            })
            .collect()
    }
}

struct Shared {
    heard: Mutex<Heard>,
    path: Mutex<Path>,
    scene: Mutex<Scene>,
    /// When each joint state was sent.
    sent: Mutex<Vec<Instant>>,
    running: AtomicBool,
    joints: Vec<(String, JointLimits)>,
    home: Vec<f64>,
    period: f64,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seconds(t: &Time) -> f64 {
    f64::from(t.sec) + 1e-9 * f64::from(t.nanosec)
}

fn ros(t: &Time) -> RosTime {
    RosTime(i64::from(t.sec) * 1_000_000_000 + i64::from(t.nanosec))
}

fn stamp(t: RosTime) -> Time {
    let sec = i32::try_from(t.0.div_euclid(1_000_000_000)).unwrap_or(i32::MAX);
    Time { sec, nanosec: t.0.rem_euclid(1_000_000_000) as u32 }
}

fn failed(doing: impl Display) -> impl FnOnce(r2r::Error) -> String {
    move |e| format!("{doing}: {e}")
}

impl Shared {
    /// The arm's pose now, rad or m.
    fn pose(&self) -> Vec<f64> {
        match *lock(&self.scene) {
            Scene::Live => lock(&self.path).at(SystemClock.ros().0 as f64 * 1e-9),
            Scene::Still(seed) => self.still_pose(seed),
        }
    }

    /// Somewhere within the limits, a tenth of their range around home.
    fn still_pose(&self, seed: u64) -> Vec<f64> {
        let place = |(j, ((_, l), home)): (usize, (&(String, JointLimits), &f64))| {
            let off = 0.1 * (l.max_position - l.min_position) * (TAU * (seed as f64 / 7.0 + j as f64 / 3.0)).sin();
            (home + off).clamp(l.min_position, l.max_position)
        };
        self.joints.iter().zip(&self.home).enumerate().map(place).collect()
    }

    fn trajectory(&self, m: &JointTrajectory) {
        let received = self.read(m);
        let mut heard = lock(&self.heard);
        heard.trajectories += 1;
        match received {
            Ok(new) => {
                let mut path = lock(&self.path);
                let slower =
                    |w: &[Point]| w[0].velocities.iter().zip(&w[1].velocities).all(|(a, b)| b.abs() <= a.abs() + 1e-3);
                heard.brakes = new.points.windows(2).all(slower);
                // From where it is to the first point of the new one.
                let now = SystemClock.ros().0 as f64 * 1e-9;
                let here = path.at(now);
                *path = new;
                if now < path.points[0].at {
                    let velocities = path.points[0].velocities.clone();
                    path.points.insert(0, Point { at: now, positions: here, velocities });
                }
            }
            Err(why) => {
                heard.wrong.0 += 1;
                if heard.wrong.1.len() < WORDS {
                    heard.wrong.1.push(why);
                }
            }
        }
    }

    /// The rules of joint_trajectory_controller, the limits, and no jump from one trajectory to the next.
    fn read(&self, m: &JointTrajectory) -> Outcome<Path> {
        let n = self.joints.len();
        let order: Option<Vec<usize>> =
            self.joints.iter().map(|(name, _)| m.joint_names.iter().position(|other| other == name)).collect();
        let order = order.filter(|_| m.joint_names.len() == n).ok_or_else(|| format!("joints {:?}", m.joint_names))?;
        let start = seconds(&m.header.stamp);
        let mut points: Vec<Point> = Vec::with_capacity(m.points.len());
        for (i, p) in m.points.iter().enumerate() {
            if p.positions.len() != n || p.velocities.len() != n {
                return Err(format!("point {i}: {} positions, {} velocities", p.positions.len(), p.velocities.len()));
            }
            for (j, (name, l)) in self.joints.iter().enumerate() {
                let (x, v) = (p.positions[order[j]], p.velocities[order[j]]);
                if !(x.is_finite() && v.is_finite()) {
                    return Err(format!("point {i}: '{name}' is {x}, its velocity {v}"));
                }
                if x < l.min_position - SLACK || x > l.max_position + SLACK || v.abs() > l.max_velocity + SLACK {
                    return Err(format!("point {i}: '{name}' at {x} with velocity {v} is past its limits {l:?}"));
                }
            }
            let at = start + f64::from(p.time_from_start.sec) + 1e-9 * f64::from(p.time_from_start.nanosec);
            if points.last().is_some_and(|before| at <= before.at) {
                return Err(format!("point {i}: times do not increase"));
            }
            let pick = |from: &[f64]| order.iter().map(|k| from[*k]).collect::<Vec<_>>();
            points.push(Point { at, positions: pick(&p.positions), velocities: pick(&p.velocities) });
        }
        let Some(last) = points.last() else { return Err("no points".into()) };
        if last.velocities.iter().any(|v| v.abs() > AT_REST) {
            return Err(format!("it does not end at rest: {:?}", last.velocities));
        }
        let (new, old) = (Path { stamp: ros(&m.header.stamp), points }, lock(&self.path));
        // Between neighbours only: a message that this side was too slow for is no jump.
        if new.stamp.seconds_since(old.stamp) < 1.5 * self.period {
            let first = &new.points[0];
            for (((name, l), a), b) in self.joints.iter().zip(old.at(first.at)).zip(&first.positions) {
                if (a - b).abs() > l.max_velocity * self.period + SLACK {
                    return Err(format!("'{name}' jumps by {} from one trajectory to the next", (a - b).abs()));
                }
            }
        }
        Ok(new)
    }

    fn status(&self, m: DiagnosticStatus) {
        let mut heard = lock(&self.heard);
        if !heard.texts.contains(&m.message) {
            heard.texts.push(m.message.clone());
        }
        heard.status = values(m);
    }

    fn diagnostics(&self, m: DiagnosticArray) {
        let mut heard = lock(&self.heard);
        for part in m.status {
            let name = part.name.rsplit(": ").next().unwrap_or_default().to_owned();
            heard.diagnostics.insert(name, values(part));
        }
    }

    fn chunk(&self, m: &JointTrajectory) {
        let mut heard = lock(&self.heard);
        heard.chunk_times.push(Instant::now());
        if heard.chunks.len() == KEPT {
            heard.chunks.remove(0);
        }
        let positions = m.points.iter().flat_map(|p| p.positions.iter().copied()).collect();
        heard.chunks.push(Chunk { stamp: ros(&m.header.stamp), positions });
    }
}

fn values(m: DiagnosticStatus) -> BTreeMap<String, String> {
    let level = ("level".to_owned(), m.level.to_string());
    let message = ("message".to_owned(), m.message);
    m.values.into_iter().map(|v| (v.key, v.value)).chain([level, message]).collect()
}

/// The robot, its threads, and clients of the node's services.
pub struct Robot {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    enable: Client<SetBool::Service>,
    save: Client<Trigger::Service>,
    set: Client<SetParametersAtomically::Service>,
}

/// Hands each item of a stream to `take`.
type Drain = Box<dyn FnMut() + Send>;

fn drain<T: 'static>(
    mut stream: impl Stream<Item = T> + Unpin + Send + 'static,
    mut take: impl FnMut(T) + Send + 'static,
) -> Drain {
    Box::new(move || {
        while let Some(Some(item)) = stream.next().now_or_never() {
            take(item);
        }
    })
}

impl Robot {
    /// Starts the robot that these parameters describe at `home` (rad or m), its cameras at `image_hz`.
    pub fn start(settings: &Settings, home: &[f64], image_hz: f64) -> Outcome<Self> {
        let context = r2r::Context::create().map_err(failed("starting ROS"))?;
        let mut node = r2r::Node::create(context, "robot_stand_in", "").map_err(failed("creating the robot's node"))?;
        let joints = settings.joints.iter().map(|j| {
            let limits = j.limits.ok_or_else(|| format!("joint '{}' has no limits: the node would not arm", j.name))?;
            Ok((j.name.clone(), limits))
        });
        let shared = Arc::new(Shared {
            heard: Mutex::default(),
            path: Mutex::new(Path::hold(home)),
            scene: Mutex::new(Scene::Live),
            sent: Mutex::default(),
            running: AtomicBool::new(true),
            joints: joints.collect::<Outcome<_>>()?,
            home: home.to_vec(),
            period: 1.0 / settings.timing.control_rate_hz,
        });

        let reliable = QosProfile::default().keep_last(100).reliable();
        let mut drains: Vec<Drain> = Vec::new();
        for group in &settings.outputs {
            let topic = group.topic.replacen('~', NODE, 1);
            let stream = node.subscribe::<JointTrajectory>(&topic, reliable.clone()).map_err(failed(&topic))?;
            let to = shared.clone();
            drains.push(drain(stream, move |m| to.trajectory(&m)));
        }
        let chunks = format!("{NODE}/action_chunk");
        let stream = node.subscribe::<JointTrajectory>(&chunks, reliable.clone()).map_err(failed(chunks))?;
        let to = shared.clone();
        drains.push(drain(stream, move |m| to.chunk(&m)));
        let status = format!("{NODE}/status");
        let stream = node.subscribe::<DiagnosticStatus>(&status, reliable.clone()).map_err(failed(status))?;
        let to = shared.clone();
        drains.push(drain(stream, move |m| to.status(m)));
        let stream = node.subscribe::<DiagnosticArray>("/diagnostics", reliable).map_err(failed("/diagnostics"))?;
        let to = shared.clone();
        drains.push(drain(stream, move |m| to.diagnostics(m)));

        let newest = QosProfile::default().keep_last(1).best_effort();
        let states = node
            .create_publisher::<JointState>("joint_states", QosProfile::default().keep_last(10).reliable())
            .map_err(failed("joint_states"))?;
        let cameras: Vec<Publisher<Image>> = (settings.inputs.cameras.iter())
            .map(|c| node.create_publisher(&c.topic, newest.clone()).map_err(failed(&c.topic)))
            .collect::<Outcome<_>>()?;
        let services = || QosProfile::services_default();
        let enable = node
            .create_client::<SetBool::Service>(&format!("{NODE}/enable"), services())
            .map_err(failed("~/enable"))?;
        let save = node
            .create_client::<Trigger::Service>(&format!("{NODE}/save_recording"), services())
            .map_err(failed("~/save_recording"))?;
        let set = node
            .create_client::<SetParametersAtomically::Service>(&format!("{NODE}/set_parameters_atomically"), services())
            .map_err(failed("~/set_parameters_atomically"))?;

        let (of_states, of_images) = (shared.clone(), shared.clone());
        let image_period = Duration::from_secs_f64(1.0 / image_hz);
        let threads = vec![
            spawn("robot-spin", shared.clone(), Duration::ZERO, move |_| {
                node.spin_once(Duration::from_millis(20));
                drains.iter_mut().for_each(|d| d());
            })?,
            spawn("robot-states", shared.clone(), STATE_PERIOD, move |_| of_states.publish_state(&states))?,
            spawn("robot-images", shared.clone(), image_period, move |n| of_images.publish_images(&cameras, n))?,
        ];
        Ok(Self { shared, threads, enable, save, set })
    }

    /// From now on the robot shows this.
    pub fn show(&self, scene: Scene) {
        *lock(&self.shared.scene) = scene;
    }

    /// Of the node's control loop, s.
    pub fn period(&self) -> f64 {
        self.shared.period
    }

    /// The pose that [`Scene::Still`] of that number holds; rad or m.
    pub fn still_pose(&self, seed: u64) -> Vec<f64> {
        self.shared.still_pose(seed)
    }

    /// Forgets what was heard, also what the last node sent at its end; the arm is back at home.
    pub fn forget(&self) {
        std::thread::sleep(Duration::from_millis(500));
        *lock(&self.shared.heard) = Heard::default();
        *lock(&self.shared.path) = Path::hold(&self.shared.home);
    }

    /// Between the joint states sent since then, ms.
    pub fn between_states(&self, since: Instant) -> Vec<f64> {
        let sent = lock(&self.shared.sent);
        let sent = &sent[sent.partition_point(|t| *t <= since)..];
        sent.windows(2).map(|w| (w[1] - w[0]).as_secs_f64() * 1e3).collect()
    }

    /// A look at what was heard.
    pub fn heard<R>(&self, look: impl FnOnce(&Heard) -> R) -> R {
        look(&lock(&self.shared.heard))
    }

    /// `~/enable`: what the node answers, or why it refuses.
    pub fn enable(&self, on: bool) -> Outcome<String> {
        let request = SetBool::Request { data: on };
        let answer = call("~/enable", r2r::Node::is_available(&self.enable), || self.enable.request(&request))?;
        if answer.success { Ok(answer.message) } else { Err(answer.message) }
    }

    /// `~/save_recording`: the path of the file.
    pub fn save_recording(&self) -> Outcome<String> {
        let request = Trigger::Request {};
        let answer = call("~/save_recording", r2r::Node::is_available(&self.save), || self.save.request(&request))?;
        if answer.success { Ok(answer.message) } else { Err(format!("~/save_recording: {}", answer.message)) }
    }

    /// Sets whole numbers through the parameter services, all of them or none.
    pub fn set_parameters(&self, values: &[(&str, i64)]) -> Outcome<()> {
        let parameter = |(name, value): &(&str, i64)| Parameter {
            name: (*name).into(),
            value: ParameterValue { type_: 2, integer_value: *value, ..Default::default() },
        };
        let request = SetParametersAtomically::Request { parameters: values.iter().map(parameter).collect() };
        let ready = r2r::Node::is_available(&self.set);
        let answer = call("set_parameters_atomically", ready, || self.set.request(&request))?.result;
        if answer.successful { Ok(()) } else { Err(format!("{values:?} refused: {}", answer.reason)) }
    }

    /// Ends the threads, and the topics with them.
    pub fn end(self) {
        self.shared.running.store(false, Ordering::Relaxed);
        for thread in self.threads {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// A call of a service, from its discovery to its answer.
fn call<T, F: Future<Output = r2r::Result<T>>>(
    name: &str,
    available: r2r::Result<impl Future<Output = r2r::Result<()>>>,
    request: impl FnOnce() -> r2r::Result<F>,
) -> Outcome<T> {
    wait(name, available.map_err(failed(name))?)?.map_err(failed(name))?;
    wait(name, request().map_err(failed(name))?)?.map_err(failed(name))
}

/// Waits for what the spinning thread completes.
fn wait<F: Future>(name: &str, future: F) -> Outcome<F::Output> {
    let mut future = Box::pin(future);
    let end = Instant::now() + ANSWER;
    loop {
        if let Some(output) = future.as_mut().now_or_never() {
            return Ok(output);
        }
        if Instant::now() > end {
            return Err(format!("{name}: no answer within {} s", ANSWER.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A thread that calls `turn` with its number every `period` for as long as the robot runs.
fn spawn(
    name: &str,
    shared: Arc<Shared>,
    period: Duration,
    mut turn: impl FnMut(u64) + Send + 'static,
) -> Outcome<JoinHandle<()>> {
    let body = move || {
        let mut next = Instant::now();
        for n in 0.. {
            if !shared.running.load(Ordering::Relaxed) {
                return;
            }
            turn(n);
            // Never two at once to make up for a late one.
            next = (next + period).max(Instant::now());
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(|e| format!("cannot start thread '{name}': {e}"))
}

impl Shared {
    fn publish_state(&self, to: &Publisher<JointState>) {
        let mut m = JointState { position: self.pose(), ..Default::default() };
        m.name = self.joints.iter().map(|(name, _)| name.clone()).collect();
        m.header.stamp = stamp(SystemClock.ros());
        publish("joint_states", to, &m);
        lock(&self.sent).push(Instant::now());
    }

    fn publish_images(&self, to: &[Publisher<Image>], turn: u64) {
        let scene = *lock(&self.scene);
        let at = stamp(SystemClock.ros());
        for (camera, to) in to.iter().enumerate() {
            let mut m =
                Image { encoding: "rgb8".into(), data: picture(scene, camera as u64, turn), ..Default::default() };
            (m.width, m.height, m.step) = (FRAME.0 as u32, FRAME.1 as u32, 3 * FRAME.0 as u32);
            m.header.stamp = at.clone();
            publish("an image", to, &m);
        }
    }
}

fn publish<T: r2r::WrappedTypesupport + 'static>(what: &str, to: &Publisher<T>, message: &T) {
    if let Err(e) = to.publish(message) {
        eprintln!("publishing {what} failed: {e}");
    }
}

/// `[height, width, 3]` bytes: colours that vary slowly, and on the first rows of a live scene grain, so that no two
/// images are the same.
fn picture(scene: Scene, camera: u64, turn: u64) -> Vec<u8> {
    let (width, height) = FRAME;
    let (seed, grain) = match scene {
        Scene::Still(seed) => (seed, None),
        Scene::Live => (0, Some(turn)),
    };
    let phase = (seed * 5 + camera * 3) as usize;
    let mut data: Vec<u8> = Vec::with_capacity(3 * width * height);
    for y in 0..height {
        let row = (y * (2 + phase % 4)) / 4;
        data.extend((0..width).flat_map(|x| {
            let column = (x * (3 + phase % 5)) / 8 + 20 * phase;
            [(row + column) as u8, (row ^ column) as u8, (row + 255 - column % 256) as u8]
        }));
    }
    for (i, byte) in data.iter_mut().take(if grain.is_some() { 8 * 3 * width } else { 0 }).enumerate() {
        *byte = byte
            .wrapping_add(((i as u64 + 1).wrapping_mul(grain.unwrap_or(0) + 1).wrapping_mul(0x9e37_79b9) >> 16) as u8);
    }
    data
}
