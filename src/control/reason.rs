//! Why: small values on the control thread, text with names, values and remedies for people.

use super::mode::{Level, Mode};

/// What the texts call things; never touched by the control thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Joints in the controller's order.
    pub joints: Vec<String>,
    /// Cameras in the order of `camera_names`.
    pub cameras: Vec<String>,
    /// Output groups in the order of `outputs.names`.
    pub outputs: Vec<OutputNames>,
}

/// What the texts call an output group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutputNames {
    /// As in `outputs.names`.
    pub name: String,
    /// Its topic, by its full name where that is known.
    pub topic: String,
    /// Full names of the other nodes that publish on it, where they are known.
    pub others: Vec<String>,
}

fn name(names: &[String], i: usize, kind: &str) -> String {
    names.get(i).map_or_else(|| format!("{kind} {i}"), |n| format!("{kind} '{n}'"))
}

/// What is wrong with an input or an output; indices follow the parameters' order, times are in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InputFault {
    /// No image ever came.
    CameraMissing {
        /// Which.
        camera: usize,
    },
    /// The newest image is too old.
    CameraStale {
        /// Which.
        camera: usize,
        /// Its age.
        age: f64,
        /// `max_age_ms`.
        max: f64,
    },
    /// Stamps go on, bytes do not.
    CameraFrozen {
        /// Which.
        camera: usize,
        /// For how long.
        age: f64,
    },
    /// Images cannot be used (encoding, size).
    CameraUnusable {
        /// Which.
        camera: usize,
    },
    /// Images are too far apart in time.
    CameraSkew {
        /// The largest difference.
        skew: f64,
        /// `max_camera_skew_ms`.
        max: f64,
    },
    /// No prompt.
    PromptMissing,
    /// Nobody listens to an output.
    OutputUnconnected {
        /// Which.
        output: usize,
    },
    /// Somebody else publishes on an output's topic.
    OutputContested {
        /// Which.
        output: usize,
    },
    /// Commands could not be sent for so long that the robot braked by itself.
    OutputBlocked,
    /// Encoder or decoder failed.
    InferenceFailed,
    /// Encoder or decoder has not answered for too long.
    InferenceStalled {
        /// For how long.
        age: f64,
    },
}

/// Whether everything but the joint state is as it must be.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum InputHealth {
    /// It is.
    #[default]
    Ok,
    /// This is not.
    Bad(InputFault),
}

impl InputFault {
    /// One sentence: what, which value, what to do.
    pub fn text(&self, names: &Names) -> String {
        let camera = |i: usize| name(&names.cameras, i, "camera");
        let output = |i: usize| match names.outputs.get(i) {
            Some(o) => format!("{}, the topic of output '{}'", o.topic, o.name),
            None => format!("the topic of output {i}"),
        };
        match *self {
            Self::CameraMissing { camera: c } => {
                format!("no image from {} yet: check its driver, topic and QoS", camera(c))
            }
            Self::CameraStale { camera: c, age, max } => format!(
                "{} is {:.0} ms old (limit {:.0} ms): check its driver and the network",
                camera(c),
                age * 1e3,
                max * 1e3
            ),
            Self::CameraFrozen { camera: c, age } => {
                format!("{} sends the same picture for {age:.1} s: restart its driver", camera(c))
            }
            Self::CameraUnusable { camera: c } => {
                format!("images of {} cannot be used: check encoding and size", camera(c))
            }
            Self::CameraSkew { skew, max } => format!(
                "cameras are {:.0} ms apart (limit {:.0} ms): synchronise them or raise max_camera_skew_ms",
                skew * 1e3,
                max * 1e3
            ),
            Self::PromptMissing => "no prompt: set the parameter or publish on ~/prompt".into(),
            Self::OutputUnconnected { output: o } => {
                let name = names.outputs.get(o).map_or("<name>", |o| &o.name);
                format!(
                    "nobody listens to {}: activate its controller, or set outputs.{name}.topic to the one it listens to",
                    output(o)
                )
            }
            Self::OutputContested { output: o } => {
                let others = names.outputs.get(o).map_or(&[][..], |o| &o.others);
                let stop = if others.is_empty() { "the other node".into() } else { others.join(", ") };
                format!("somebody else publishes on {}: stop {stop}", output(o))
            }
            Self::OutputBlocked => {
                "commands could not be sent in time and the robot braked by itself: check network and \
                                    middleware, then call ~/enable"
                    .into()
            }
            Self::InferenceFailed => "inference failed: see the log, then ~/reset".into(),
            Self::InferenceStalled { age } => format!("inference has not answered for {age:.1} s: see the log"),
        }
    }
}

/// Why a chunk is not executed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ChunkRefusal {
    /// Of another reset epoch.
    Epoch {
        /// Its epoch.
        chunk: u64,
        /// The controller's.
        current: u64,
    },
    /// Not newer than the last one.
    Sequence {
        /// Its sequence.
        chunk: u64,
        /// The last accepted one.
        last: u64,
    },
    /// For a prompt that has been replaced.
    OldPrompt {
        /// Its prompt generation.
        chunk: u64,
        /// The newest seen.
        current: u64,
    },
    /// For another joint set.
    Joints {
        /// Its joints.
        found: usize,
        /// The controller's.
        expected: usize,
    },
    /// Wrong number of actions.
    Horizon {
        /// Its actions.
        found: usize,
        /// The controller's.
        expected: usize,
    },
    /// Wrong time between actions, seconds.
    TimeStep {
        /// Its dt.
        found: f64,
        /// 1 / `policy_rate_hz`.
        expected: f64,
    },
    /// Its state stamp, or the clock, is not set.
    NoStamp,
    /// Its observation is older than `max_chunk_age`, seconds.
    TooOld {
        /// Its age.
        age: f64,
        /// Allowed.
        max: f64,
    },
    /// Its observation is in the future, seconds.
    FromFuture {
        /// By how much.
        ahead: f64,
        /// Allowed.
        max: f64,
    },
    /// A value is NaN or infinite; the whole chunk is dropped.
    NonFinite {
        /// Joint of the first one.
        joint: usize,
        /// Action of the first one.
        step: usize,
    },
    /// All its actions were due before now, by this many seconds.
    Past {
        /// Since the last action was due.
        late: f64,
    },
    /// Its oldest image is older than `max_image_age`, however fresh its joint state, seconds.
    ImagesTooOld {
        /// Its age.
        age: f64,
        /// Allowed.
        max: f64,
    },
}

impl ChunkRefusal {
    /// Number of kinds, for counters.
    pub const KINDS: usize = 12;

    /// Names of the kinds, by [`kind`](Self::kind).
    pub const NAMES: [&'static str; Self::KINDS] = [
        "old_epoch",
        "sequence",
        "old_prompt",
        "joints",
        "horizon",
        "time_step",
        "no_stamp",
        "too_old",
        "from_future",
        "non_finite",
        "past",
        "images_too_old",
    ];

    /// Index of its kind.
    pub fn kind(&self) -> usize {
        match self {
            Self::Epoch { .. } => 0,
            Self::Sequence { .. } => 1,
            Self::OldPrompt { .. } => 2,
            Self::Joints { .. } => 3,
            Self::Horizon { .. } => 4,
            Self::TimeStep { .. } => 5,
            Self::NoStamp => 6,
            Self::TooOld { .. } => 7,
            Self::FromFuture { .. } => 8,
            Self::NonFinite { .. } => 9,
            Self::Past { .. } => 10,
            Self::ImagesTooOld { .. } => 11,
        }
    }

    /// One sentence: what, which value, what to do.
    pub fn text(&self, names: &Names) -> String {
        match *self {
            Self::Epoch { chunk, current } => {
                format!("chunk of epoch {chunk}, current is {current}: computed before a stop or reset")
            }
            Self::Sequence { chunk, last } => format!("chunk {chunk} after chunk {last}: duplicate or out of order"),
            Self::OldPrompt { chunk, current } => {
                format!("chunk for prompt {chunk}, current is {current}: computed before the prompt changed")
            }
            Self::Joints { found, expected } => {
                format!("chunk with {found} joints, expected {expected}: check joint_names")
            }
            Self::Horizon { found, expected } => {
                format!("chunk with {found} actions, expected {expected}: check the checkpoint")
            }
            Self::TimeStep { found, expected } => {
                format!("chunk with dt {found} s, expected {expected} s: check policy_rate_hz")
            }
            Self::NoStamp => "chunk or clock without a time: check header stamps, and /clock under use_sim_time".into(),
            Self::TooOld { age, max } => format!(
                "observation {:.0} ms old (limit {:.0} ms): inference too slow, or clocks differ",
                age * 1e3,
                max * 1e3
            ),
            Self::FromFuture { ahead, max } => format!(
                "observation {:.0} ms in the future (limit {:.0} ms): synchronise the clocks",
                ahead * 1e3,
                max * 1e3
            ),
            Self::NonFinite { joint, step } => format!(
                "action {step} of {} is not finite: check the checkpoint and its statistics",
                name(&names.joints, joint, "joint")
            ),
            Self::Past { late } => format!(
                "all actions were due {:.0} ms ago or earlier: inference slower than the chunk is long",
                late * 1e3
            ),
            Self::ImagesTooOld { age, max } => {
                format!("images {:.0} ms old (limit {:.0} ms): the encoder is stuck or too slow", age * 1e3, max * 1e3)
            }
        }
    }
}

/// Why arming was refused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Refusal {
    /// The mode does not allow it.
    Mode(Mode),
    /// ROS time is not set.
    NoClock,
    /// A joint has no limits.
    NoLimits {
        /// Which.
        joint: usize,
    },
    /// A joint state is missing or not finite.
    StateMissing {
        /// Which.
        joint: usize,
    },
    /// A joint state is too old, seconds.
    StateStale {
        /// Which.
        joint: usize,
        /// Its age.
        age: f64,
        /// Allowed.
        max: f64,
    },
    /// The measured pose is outside the limits.
    OutsideLimits {
        /// Which.
        joint: usize,
        /// Measured.
        position: f64,
        /// Lower limit.
        min: f64,
        /// Upper limit.
        max: f64,
    },
    /// An input or an output is not as it must be.
    Input(InputFault),
    /// No chunk of this epoch is waiting.
    NoChunk,
    /// The chunk that waits cannot be used.
    Chunk(ChunkRefusal),
}

impl Refusal {
    /// One sentence: what, which value, what to do.
    pub fn text(&self, names: &Names) -> String {
        let joint = |i: usize| name(&names.joints, i, "joint");
        match *self {
            Self::Mode(Mode::Unconfigured) => "no policy is loaded: configure and activate first".into(),
            Self::Mode(Mode::Warmup) => "the policy is still warming up: try again when mode is 'active'".into(),
            Self::Mode(Mode::Stopping) => "the robot is still stopping: try again when mode is 'active'".into(),
            Self::Mode(Mode::Stopped) => "stopped: call ~/reset first".into(),
            Self::Mode(Mode::Fault) => "fault: see the reason in ~/status, then call ~/reset".into(),
            Self::Mode(mode) => format!("not possible in mode '{mode}'"),
            Self::NoClock => "ROS time is not set: is /clock published, or use_sim_time wrong?".into(),
            Self::NoLimits { joint: j } => format!(
                "{} has no limits: set limits.<joint>.min_position, max_position, max_velocity, max_acceleration; \
                 all but the last may come from a URDF on robot_description",
                joint(j)
            ),
            Self::StateMissing { joint: j } => {
                format!("no usable position of {}: check joint_states for its name and for NaN", joint(j))
            }
            Self::StateStale { joint: j, age, max } => format!(
                "position of {} is {:.0} ms old (limit {:.0} ms): check its joint_states publisher",
                joint(j),
                age * 1e3,
                max * 1e3
            ),
            Self::OutsideLimits { joint: j, position, min, max } => format!(
                "{} is at {position:.4}, outside its limits {min:.4} to {max:.4}: move it inside or correct the limits",
                joint(j)
            ),
            Self::Input(fault) => fault.text(names),
            Self::NoChunk => "no action chunk yet: wait for inference, or see its diagnostics".into(),
            Self::Chunk(refusal) => format!("no usable action chunk: {}", refusal.text(names)),
        }
    }
}

/// Why the robot is not following the policy (any more).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason {
    /// `~/enable` with false.
    Disabled,
    /// `~/stop`.
    StopRequested,
    /// ROS time jumped back by this many seconds.
    ClockJumpedBack {
        /// How far.
        seconds: f64,
    },
    /// No chunk in time.
    Starved,
    /// A joint state is missing or not finite.
    StateMissing {
        /// Which.
        joint: usize,
    },
    /// A joint state is too old, seconds.
    StateStale {
        /// Which.
        joint: usize,
        /// Its age.
        age: f64,
        /// Allowed.
        max: f64,
    },
    /// The robot is not where it was told to be.
    TrackingError {
        /// Which.
        joint: usize,
        /// Told.
        command: f64,
        /// Measured.
        measured: f64,
        /// `max_tracking_error`.
        max: f64,
    },
    /// An input or an output is not as it must be.
    Input(InputFault),
    /// The node was deactivated or cleaned up.
    Deactivated,
    /// Encoder, decoder or another part of the node failed.
    Failed,
    /// A finished window did not pass the last check and was not published.
    Internal {
        /// Joint that failed it.
        joint: usize,
    },
}

impl Reason {
    /// How serious it is while it is the reason for standing still.
    pub fn level(&self) -> Level {
        match self {
            Self::Disabled | Self::Deactivated => Level::Ok,
            Self::StopRequested | Self::Starved | Self::ClockJumpedBack { .. } => Level::Warn,
            _ => Level::Error,
        }
    }

    /// One sentence: what, which value, what to do.
    pub fn text(&self, names: &Names) -> String {
        let joint = |i: usize| name(&names.joints, i, "joint");
        match *self {
            Self::Disabled => "disarmed by ~/enable".into(),
            Self::StopRequested => "stopped by ~/stop: call ~/reset, then ~/enable".into(),
            Self::ClockJumpedBack { seconds } => {
                format!("ROS time jumped back by {seconds:.3} s: disarmed; call ~/enable when the robot is ready")
            }
            Self::Starved => "no action chunk in time: inference too slow, see its diagnostics".into(),
            Self::StateMissing { joint: j } => {
                format!("no usable position of {}: check joint_states for its name and for NaN", joint(j))
            }
            Self::StateStale { joint: j, age, max } => format!(
                "position of {} is {:.0} ms old (limit {:.0} ms): check its joint_states publisher",
                joint(j),
                age * 1e3,
                max * 1e3
            ),
            Self::TrackingError { joint: j, command, measured, max } => format!(
                "{} was told {command:.4} and is at {measured:.4} (limit {max:.4} apart): \
                 look for a hardware stop, a collision or a wrong controller, then call ~/enable",
                joint(j)
            ),
            Self::Input(fault) => fault.text(names),
            Self::Deactivated => "deactivated".into(),
            Self::Failed => "inference failed: see the log, then call ~/reset".into(),
            Self::Internal { joint: j } => {
                format!("internal check failed on {}: please report it with the recording, then ~/reset", joint(j))
            }
        }
    }
}
