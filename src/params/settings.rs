//! The typed form of the parameters: what the node is built from.

use std::path::PathBuf;
use std::time::Duration;

use super::choice::*;
use super::{Params, Value};
use crate::control::{JointLimits, MissPolicy, Seam};
use crate::engine::partition::{Backend, Split};
use crate::engine::{Device, GuidanceSchedule};
use crate::model::ActionMode;
use crate::pipeline::PipelineMode;

/// Everything a user can set, in the types the program uses. Made by [`Params::settings`], so always valid.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The policy.
    pub model: Model,
    /// Cameras, joint states and their bounds.
    pub inputs: Inputs,
    /// Joints in the order of `joint_names`; every list of joints in the program has this order.
    pub joints: Vec<Joint>,
    /// Command topics.
    pub outputs: Vec<OutputGroup>,
    /// Plan in each published trajectory ahead of the braking tail.
    pub output_window: Duration,
    /// Rates and deadlines.
    pub timing: Timing,
    /// How the stages share the device.
    pub gpu: Gpu,
    /// How chunks follow one another.
    pub chunks: Chunks,
    /// Bounds of motion that are not a joint's own.
    pub safety: Safety,
    /// The flight recorder.
    pub recorder: Recorder,
    /// The process.
    pub process: Process,
}

/// The policy and how it is run.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Folder of the checkpoint.
    pub checkpoint: PathBuf,
    /// tokenizer.json, if not in the checkpoint folder.
    pub tokenizer: Option<PathBuf>,
    /// Normalisation statistics, if not in the checkpoint folder.
    pub norm_stats: Option<PathBuf>,
    /// Where it runs.
    pub device: Device,
    /// The task in words; may be empty until one comes by topic.
    pub prompt: String,
    /// Flow-matching steps per chunk.
    pub num_inference_steps: usize,
    /// Seed of the initial noise.
    pub seed: u64,
    /// Whether the noise is kept between chunks.
    pub noise: Noise,
}

/// What comes in.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    /// Cameras in the order of the policy's views.
    pub cameras: Vec<Camera>,
    /// An older measurement of any joint stops the robot.
    pub max_joint_state_age: Duration,
    /// Largest difference of stamps within one observation.
    pub max_camera_skew: Duration,
    /// What happens when a camera goes silent.
    pub on_camera_loss: OnCameraLoss,
    /// Delivery of images.
    pub images_qos: Qos,
    /// Delivery of joint states.
    pub joint_states_qos: Qos,
}

/// One camera.
#[derive(Debug, Clone, PartialEq)]
pub struct Camera {
    /// Its name in `camera_names`.
    pub name: String,
    /// Image topic, relative names allowed.
    pub topic: String,
    /// How images travel.
    pub transport: Transport,
    /// Name of the view in the checkpoint's configuration.
    pub model_key: String,
    /// An older image counts as lost.
    pub max_age: Duration,
}

/// Delivery of one kind of subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qos {
    /// Queue depth.
    pub depth: usize,
    /// Whether lost messages are sent again.
    pub reliability: Reliability,
}

/// One joint.
#[derive(Debug, Clone, PartialEq)]
pub struct Joint {
    /// Its name in joint_states and trajectories.
    pub name: String,
    /// Its position in the policy's state and action vectors.
    pub index: usize,
    /// Robot units = policy units · `scale` + `offset`; never zero.
    pub scale: f64,
    /// Robot units = policy units · `scale` + `offset`; rad or m.
    pub offset: f64,
    /// All four limits, or none: without them the node does not arm.
    pub limits: Option<JointLimits>,
    /// Where each limit is from, in one sentence; empty without limits.
    pub limits_from: String,
    /// Largest distance from its command before the robot is stopped, rad or m.
    pub max_tracking_error: f64,
    /// Whether its actions are absolute even when the policy's are differences.
    pub action_absolute: bool,
}

/// One command topic.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputGroup {
    /// Its name in `outputs.names`.
    pub name: String,
    /// Indices into [`Settings::joints`], in the order of the messages.
    pub joints: Vec<usize>,
    /// Topic, relative and private names allowed.
    pub topic: String,
    /// Message type.
    pub kind: OutputKind,
}

/// Rates and deadlines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// Actions a second.
    pub policy_rate_hz: f64,
    /// Ticks a second.
    pub control_rate_hz: f64,
    /// From the start of a tick to the return of publish; one period if the user gave 0.
    pub deadline: Duration,
    /// From observation to finished chunk.
    pub chunk_budget: Duration,
    /// What happens past the budget.
    pub miss_policy: MissPolicy,
}

impl Timing {
    /// Seconds from one action to the next.
    pub fn dt(&self) -> f64 {
        self.policy_rate_hz.recip()
    }

    /// From one tick to the next.
    pub fn period(&self) -> Duration {
        Duration::from_secs_f64(self.control_rate_hz.recip())
    }
}

/// How the stages share the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    /// How they share time.
    pub pipeline_mode: PipelineMode,
    /// How they share multiprocessors.
    pub split: Split,
}

/// How chunks follow one another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chunks {
    /// Policy steps between adopted chunks, at least 1.
    pub replan_steps: usize,
    /// How a new chunk joins the running one.
    pub seam: Seam,
    /// How the weight of guidance falls.
    pub rtc_schedule: GuidanceSchedule,
    /// Step at which guidance ends.
    pub rtc_execution_horizon: usize,
    /// Upper bound of the guidance gain.
    pub rtc_max_guidance_weight: f64,
    /// What actions mean; see also [`Joint::action_absolute`].
    pub action_mode: ActionMode,
}

/// Bounds of motion that are not a joint's own.
#[derive(Debug, Clone, PartialEq)]
pub struct Safety {
    /// Limits that arming needs and nobody gave, by their parameter names.
    pub missing_limits: Vec<String>,
    /// What is wrong with the robot description, or missing from it.
    pub description_problems: Vec<String>,
    /// Longest time of a decelerating stop.
    pub stop_time: Duration,
    /// Shortest time from the measured pose to the first action after arming.
    pub ramp_time: Duration,
}

/// The flight recorder.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorder {
    /// Whether it runs.
    pub enabled: bool,
    /// What it keeps, in seconds.
    pub seconds: f64,
    /// Where its files go; `None` for the place where ROS keeps what it writes.
    pub folder: Option<PathBuf>,
    /// Files that stay.
    pub keep: usize,
    /// Widest image, pixels; 0 leaves images as they are.
    pub image_width: usize,
    /// Images a second of each camera; 0 for none.
    pub image_rate_hz: f64,
    /// Whether an ordinary end of the node is written too.
    pub on_shutdown: bool,
}

/// The process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Load and run the policy at start.
    pub autostart: bool,
    /// SCHED_FIFO priority of the control thread; `None` asks for none.
    pub rt_priority: Option<u8>,
    /// CPUs of the control, encoder and decoder threads, in this order; those not given run anywhere.
    pub cpu_affinity: Vec<usize>,
    /// Lock the process into memory.
    pub lock_memory: bool,
    /// Stamps follow `/clock`.
    pub use_sim_time: bool,
}

/// Reads values that the table has already checked: names, kinds and ranges hold, so the fallbacks never show.
struct Reader<'a>(&'a Params);

impl Reader<'_> {
    fn value(&self, name: &str) -> Option<&Value> {
        let entry = self.0.get(name);
        debug_assert!(entry.is_some(), "'{name}' is not in the table");
        entry.map(|e| &e.value)
    }

    fn flag(&self, name: &str) -> bool {
        matches!(self.value(name), Some(Value::Bool(true)))
    }

    fn int<T: TryFrom<i64> + Default>(&self, name: &str) -> T {
        self.value(name).and_then(Value::as_int).and_then(|i| i.try_into().ok()).unwrap_or_default()
    }

    fn double(&self, name: &str) -> f64 {
        self.value(name).and_then(Value::as_double).unwrap_or(f64::NAN)
    }

    fn ms(&self, name: &str) -> Duration {
        Duration::try_from_secs_f64(self.double(name) * 1e-3).unwrap_or_default()
    }

    fn text(&self, name: &str) -> &str {
        self.value(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        Some(self.text(name)).filter(|s| !s.is_empty()).map(PathBuf::from)
    }

    fn texts(&self, name: &str) -> &[String] {
        self.value(name).and_then(Value::as_strings).unwrap_or_default()
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        match self.value(name) {
            Some(Value::Ints(v)) => v.iter().filter_map(|i| usize::try_from(*i).ok()).collect(),
            _ => Vec::new(),
        }
    }

    fn qos(&self, of: &str) -> Qos {
        Qos {
            depth: self.int(&format!("qos.{of}.depth")),
            reliability: Reliability::from_name(self.text(&format!("qos.{of}.reliability")))
                .unwrap_or(Reliability::BestEffort),
        }
    }
}

/// The four limits of a joint, in the order of [`JointLimits`].
const LIMITS: [&str; 4] = ["min_position", "max_position", "max_velocity", "max_acceleration"];

impl Settings {
    pub(super) fn read(params: &Params) -> Self {
        let r = Reader(params);
        let names = r.texts("joint_names");
        let period = r.double("control_rate_hz").recip();
        Settings {
            model: Model {
                checkpoint: PathBuf::from(r.text("checkpoint")),
                tokenizer: r.path("tokenizer"),
                norm_stats: r.path("norm_stats"),
                device: Device::from_name(r.text("device")).unwrap_or(Device::Auto),
                prompt: r.text("prompt").into(),
                num_inference_steps: r.int("num_inference_steps"),
                seed: r.int("seed"),
                noise: Noise::from_name(r.text("noise")).unwrap_or(Noise::Held),
            },
            inputs: Inputs {
                cameras: r.texts("camera_names").iter().map(|name| camera(&r, name)).collect(),
                max_joint_state_age: r.ms("max_joint_state_age_ms"),
                max_camera_skew: r.ms("max_camera_skew_ms"),
                on_camera_loss: OnCameraLoss::from_name(r.text("on_camera_loss")).unwrap_or(OnCameraLoss::Stop),
                images_qos: r.qos("images"),
                joint_states_qos: r.qos("joint_states"),
            },
            joints: names.iter().map(|name| joint(&r, name)).collect(),
            outputs: r.texts("outputs.names").iter().map(|name| group(&r, name, names)).collect(),
            output_window: r.ms("output_window_ms"),
            timing: Timing {
                policy_rate_hz: r.double("policy_rate_hz"),
                control_rate_hz: r.double("control_rate_hz"),
                deadline: match r.ms("deadline_ms") {
                    Duration::ZERO => Duration::try_from_secs_f64(period).unwrap_or_default(),
                    given => given,
                },
                chunk_budget: r.ms("chunk_budget_ms"),
                miss_policy: MissPolicy::from_name(r.text("miss_policy")).unwrap_or(MissPolicy::Stop),
            },
            gpu: Gpu {
                pipeline_mode: PipelineMode::from_name(r.text("pipeline_mode")).unwrap_or(PipelineMode::Sequential),
                split: Split {
                    backend: Backend::from_name(r.text("partition")).unwrap_or(Backend::Auto),
                    encoder: r.int("mps_encoder_percentage"),
                    decoder: r.int("mps_decoder_percentage"),
                },
            },
            chunks: Chunks {
                replan_steps: r.int("replan_steps"),
                seam: Seam::from_name(r.text("seam")).unwrap_or(Seam::Crossfade),
                rtc_schedule: GuidanceSchedule::from_name(r.text("rtc_schedule")).unwrap_or(GuidanceSchedule::Exp),
                rtc_execution_horizon: r.int("rtc_execution_horizon"),
                rtc_max_guidance_weight: r.double("rtc_max_guidance_weight"),
                action_mode: ActionMode::from_name(r.text("action_mode")).unwrap_or(ActionMode::Auto),
            },
            safety: Safety {
                missing_limits: names
                    .iter()
                    .flat_map(|joint| LIMITS.map(|limit| (joint, limit)))
                    .filter(|(joint, limit)| params.limit(joint, limit).0.is_nan())
                    .map(|(joint, limit)| format!("limits.{joint}.{limit}"))
                    .collect(),
                description_problems: params.description_problems(),
                stop_time: r.ms("stop_time_ms"),
                ramp_time: r.ms("ramp_time_ms"),
            },
            recorder: Recorder {
                enabled: r.flag("recorder.enabled"),
                seconds: r.double("recorder.seconds"),
                folder: r.path("recorder.folder"),
                keep: r.int("recorder.keep"),
                image_width: r.int("recorder.image_width"),
                image_rate_hz: r.double("recorder.image_rate_hz"),
                on_shutdown: r.flag("recorder.on_shutdown"),
            },
            process: Process {
                autostart: r.flag("autostart"),
                rt_priority: Some(r.int("rt_priority")).filter(|p| *p > 0),
                cpu_affinity: r.indices("cpu_affinity"),
                lock_memory: r.flag("lock_memory"),
                use_sim_time: r.flag("use_sim_time"),
            },
        }
    }
}

fn camera(r: &Reader<'_>, name: &str) -> Camera {
    let of = |what: &str| format!("cameras.{name}.{what}");
    Camera {
        name: name.into(),
        topic: r.text(&of("topic")).into(),
        transport: Transport::from_name(r.text(&of("transport"))).unwrap_or(Transport::Raw),
        model_key: r.text(&of("model_key")).into(),
        max_age: r.ms(&of("max_age_ms")),
    }
}

fn joint(r: &Reader<'_>, name: &str) -> Joint {
    let of = |what: &str| format!("joints.{name}.{what}");
    let limits = LIMITS.map(|limit| r.0.limit(name, limit));
    let [min_position, max_position, max_velocity, max_acceleration] = limits.map(|(value, _)| value);
    let complete = !limits.iter().any(|(value, _)| value.is_nan());
    let sources = LIMITS.iter().zip(&limits).map(|(limit, (value, described))| {
        format!("{limit} {value} ({})", if *described { "robot_description" } else { "parameter" })
    });
    Joint {
        name: name.into(),
        index: r.int(&of("index")),
        scale: r.double(&of("scale")),
        offset: r.double(&of("offset")),
        limits: complete.then_some(JointLimits { min_position, max_position, max_velocity, max_acceleration }),
        limits_from: if complete { sources.collect::<Vec<_>>().join(", ") } else { String::new() },
        max_tracking_error: [r.double(&format!("limits.{name}.max_tracking_error")), r.double("max_tracking_error")]
            .into_iter()
            .find(|e| !e.is_nan())
            .unwrap_or(f64::NAN),
        action_absolute: r.texts("action_absolute_joints").iter().any(|j| j == name),
    }
}

fn group(r: &Reader<'_>, name: &str, joint_names: &[String]) -> OutputGroup {
    let of = |what: &str| format!("outputs.{name}.{what}");
    OutputGroup {
        name: name.into(),
        joints: r.texts(&of("joints")).iter().filter_map(|j| joint_names.iter().position(|n| n == j)).collect(),
        topic: r.text(&of("topic")).into(),
        kind: OutputKind::from_name(r.text(&of("type"))).unwrap_or(OutputKind::Trajectory),
    }
}
