//! The one table of parameters. Declaration, descriptors, validation and its messages, the default YAML, the README
//! table and `--help` all come from it.

use super::choice::*;
use super::value::{Kind, Value};
use crate::control::{MissPolicy, Seam};
use crate::engine::GuidanceSchedule;
use crate::engine::partition::Backend;
use crate::model::ActionMode;
use crate::pipeline::PipelineMode;

/// What a parameter is when nobody gives it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DefaultValue {
    /// It must be given.
    Required,
    /// A bool.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A double; NaN where a parameter may stay unset.
    Double(f64),
    /// Text, in which `<camera>`, `<joint>` and `<group>` stand for the name.
    String(&'static str),
    /// Texts.
    Strings(&'static [&'static str]),
    /// An empty list of the parameter's kind.
    Empty,
    /// The joint's position in `joint_names`.
    JointPosition,
    /// All of `joint_names`.
    AllJoints,
}

/// Values that are allowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allowed {
    /// Every value of the kind.
    Any,
    /// Integers from the first to the last, both included; for a list, each item.
    Ints(i64, i64),
    /// Doubles from the first to the last, both included. NaN only if it is the default.
    Doubles(f64, f64),
    /// One of these names.
    OneOf(&'static [&'static str]),
}

/// When a parameter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Only at start: read-only for a running node.
    Start,
    /// While the node is not armed.
    Unarmed,
    /// At any time.
    Any,
}

impl When {
    /// In words, for tables.
    pub fn name(self) -> &'static str {
        match self {
            When::Start => "start",
            When::Unarmed => "unarmed",
            When::Any => "any time",
        }
    }
}

/// One row of the table: a parameter, or a family of them with a placeholder.
#[derive(Debug, Clone, Copy)]
pub struct ParamSpec {
    /// Group in the README and in the default YAML.
    pub group: &'static str,
    /// Name; `<camera>`, `<joint>` or `<group>` stand for each name in `camera_names`, `joint_names`, `outputs.names`.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// DefaultValue.
    pub default: DefaultValue,
    /// Range or choices.
    pub allowed: Allowed,
    /// Unit, empty if it has none.
    pub unit: &'static str,
    /// When it may change.
    pub when: When,
    /// What it does, one line.
    pub about: &'static str,
}

impl ParamSpec {
    /// Whether it stays as it was at start.
    pub fn read_only(&self) -> bool {
        self.when == When::Start
    }

    /// The placeholder in the name, if it has one.
    pub fn placeholder(&self) -> Option<Placeholder> {
        Placeholder::ALL.into_iter().find(|p| self.name.contains(p.token()))
    }

    /// Whether `value`, already of the right kind, is allowed; else why not.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        let texts: &[String] = match value {
            Value::String(s) => std::slice::from_ref(s),
            Value::Strings(v) => v,
            _ => &[],
        };
        if texts.iter().any(|s| s.contains('\0')) {
            return Err("contains a NUL character".into());
        }
        match (self.allowed, value) {
            (Allowed::Ints(min, max), Value::Int(i)) => self.check_int(*i, min, max),
            (Allowed::Ints(min, max), Value::Ints(v)) => v.iter().try_for_each(|i| self.check_int(*i, min, max)),
            (Allowed::Doubles(min, max), Value::Double(x)) => self.check_double(*x, min, max),
            (Allowed::OneOf(names), Value::String(s)) if !names.contains(&s.as_str()) => {
                Err(format!("{value} is not one of {}", names.join(", ")))
            }
            _ => Ok(()),
        }
    }

    fn check_int(&self, i: i64, min: i64, max: i64) -> Result<(), String> {
        if (min..=max).contains(&i) { Ok(()) } else { Err(format!("{i} is outside {}", self.range_text())) }
    }

    fn check_double(&self, x: f64, min: f64, max: f64) -> Result<(), String> {
        let unset_is_fine = matches!(self.default, DefaultValue::Double(d) if d.is_nan());
        if (min..=max).contains(&x) || (x.is_nan() && unset_is_fine) {
            Ok(())
        } else {
            Err(format!("{} is outside {}", Value::Double(x), self.range_text()))
        }
    }

    /// The range with its unit, or the choices; empty if everything is allowed.
    pub fn range_text(&self) -> String {
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        match self.allowed {
            Allowed::Any => String::new(),
            Allowed::Ints(min, i64::MAX) => format!("{min} or more{unit}"),
            Allowed::Ints(min, max) => format!("{min} to {max}{unit}"),
            Allowed::Doubles(min, max) => format!("{min} to {max}{unit}"),
            Allowed::OneOf(names) => names.join(", "),
        }
    }
}

/// What a name in the table can stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placeholder {
    /// A camera of `camera_names`.
    Camera,
    /// A joint of `joint_names`.
    Joint,
    /// An output group of `outputs.names`.
    Group,
}

impl Placeholder {
    /// All of them.
    pub const ALL: [Placeholder; 3] = [Placeholder::Camera, Placeholder::Joint, Placeholder::Group];

    /// As it stands in the table.
    pub fn token(self) -> &'static str {
        match self {
            Placeholder::Camera => "<camera>",
            Placeholder::Joint => "<joint>",
            Placeholder::Group => "<group>",
        }
    }

    /// The parameter that lists the names.
    pub fn list(self) -> &'static str {
        match self {
            Placeholder::Camera => "camera_names",
            Placeholder::Joint => "joint_names",
            Placeholder::Group => "outputs.names",
        }
    }
}

const NOT_GIVEN: DefaultValue = DefaultValue::Double(f64::NAN);

const fn row(
    group: &'static str,
    name: &'static str,
    (kind, default, allowed, unit): (Kind, DefaultValue, Allowed, &'static str),
    when: When,
    about: &'static str,
) -> ParamSpec {
    ParamSpec { group, name, kind, default, allowed, unit, when, about }
}

const fn flag(default: bool) -> (Kind, DefaultValue, Allowed, &'static str) {
    (Kind::Bool, DefaultValue::Bool(default), Allowed::Any, "")
}

const fn int(default: i64, min: i64, max: i64, unit: &'static str) -> (Kind, DefaultValue, Allowed, &'static str) {
    (Kind::Int, DefaultValue::Int(default), Allowed::Ints(min, max), unit)
}

const fn double(
    default: DefaultValue,
    min: f64,
    max: f64,
    unit: &'static str,
) -> (Kind, DefaultValue, Allowed, &'static str) {
    (Kind::Double, default, Allowed::Doubles(min, max), unit)
}

const fn ms(default: f64, min: f64, max: f64) -> (Kind, DefaultValue, Allowed, &'static str) {
    double(DefaultValue::Double(default), min, max, "ms")
}

const fn text(default: DefaultValue) -> (Kind, DefaultValue, Allowed, &'static str) {
    (Kind::String, default, Allowed::Any, "")
}

const fn texts(default: DefaultValue) -> (Kind, DefaultValue, Allowed, &'static str) {
    (Kind::StringList, default, Allowed::Any, "")
}

const fn one_of(default: &'static str, names: &'static [&'static str]) -> (Kind, DefaultValue, Allowed, &'static str) {
    (Kind::String, DefaultValue::String(default), Allowed::OneOf(names), "")
}

use DefaultValue::{AllJoints, Double, Empty, JointPosition, Required, String as Text, Strings};
use When::{Any, Start, Unarmed};

/// Largest magnitude of a position, velocity or acceleration, and of an offset: far beyond any robot, well inside f64.
const LARGE: f64 = 1e6;

/// Every parameter of the node.
#[rustfmt::skip]
pub const TABLE: &[ParamSpec] = &[
    row("model", "checkpoint", text(Required), Start,
        "Folder of the policy: safetensors in LeRobot or openpi naming and config.json."),
    row("model", "tokenizer", text(Text("")), Start,
        "tokenizer.json; empty: the one in the checkpoint folder."),
    row("model", "norm_stats", text(Text("")), Start,
        "Normalisation statistics; empty: those in the checkpoint folder."),
    row("model", "device", text(Text("auto")), Start,
        "Where the policy runs: auto, cpu or cuda:N. auto takes the first GPU that this build can use, else the CPU."),
    row("model", "prompt", text(Text("")), Any,
        "The task in words, as in training. Also settable on ~/prompt; taken at a chunk boundary."),
    row("model", "num_inference_steps", int(10, 1, 64, "steps"), Unarmed,
        "Flow-matching steps per chunk."),
    row("model", "seed", int(0, 0, i64::MAX, ""), Start,
        "Seed of the initial noise: same inputs and seed, same chunks."),
    row("model", "noise", one_of("held", Noise::NAMES), Unarmed,
        "Initial noise: held keeps it between chunks, so that they agree more; fresh draws it anew."),

    row("inputs", "camera_names", texts(Required), Start,
        "Cameras, in the order of the policy's views."),
    row("inputs", "cameras.<camera>.topic", text(Text("camera/<camera>/image_raw")), Start,
        "Image topic."),
    row("inputs", "cameras.<camera>.transport", one_of("raw", Transport::NAMES), Start,
        "raw is sensor_msgs/Image, compressed is sensor_msgs/CompressedImage."),
    row("inputs", "cameras.<camera>.model_key", text(Text("observation.images.<camera>")), Start,
        "Name of this view in the checkpoint's configuration."),
    row("inputs", "cameras.<camera>.max_age_ms", ms(300.0, 1.0, 60_000.0), Any,
        "An older image counts as lost: the larger of stamp age and arrival age."),
    row("inputs", "joint_names", texts(Required), Start,
        "Joints, by their names in joint_states."),
    row("inputs", "joints.<joint>.index", (Kind::Int, JointPosition, Allowed::Ints(0, 1023), ""), Start,
        "Position of the joint in the policy's state and action vectors; default: its position in joint_names."),
    row("inputs", "joints.<joint>.scale", double(Double(1.0), -LARGE, LARGE, ""), Start,
        "Robot units = policy units x scale + offset; negative turns the sign."),
    row("inputs", "joints.<joint>.offset", double(Double(0.0), -LARGE, LARGE, "rad or m"), Start,
        "Robot units = policy units x scale + offset."),
    row("inputs", "max_joint_state_age_ms", ms(100.0, 1.0, 60_000.0), Unarmed,
        "An older measurement of any joint stops the robot."),
    row("inputs", "max_camera_skew_ms", ms(100.0, 1.0, 60_000.0), Any,
        "Largest difference of stamps within one observation."),
    row("inputs", "on_camera_loss", one_of("stop", OnCameraLoss::NAMES), Unarmed,
        "A camera goes silent: stop decelerates and stops, drop_view goes on without that view."),
    row("inputs", "qos.images.depth", int(1, 1, 100, "messages"), Start,
        "Queue depth of image subscriptions; only the newest image is used."),
    row("inputs", "qos.images.reliability", one_of("best_effort", Reliability::NAMES), Start,
        "best_effort hears every publisher; reliable hears reliable publishers only."),
    row("inputs", "qos.joint_states.depth", int(10, 1, 1000, "messages"), Start,
        "Queue depth of the joint_states subscription."),
    row("inputs", "qos.joint_states.reliability", one_of("best_effort", Reliability::NAMES), Start,
        "best_effort hears every publisher; reliable hears reliable publishers only."),

    row("timing", "policy_rate_hz", double(Required, 0.1, 1000.0, "Hz"), Start,
        "Actions per second of the data that the policy was trained on; it sets how fast the robot moves, so it has no default."),
    row("timing", "control_rate_hz", double(Double(50.0), 1.0, 1000.0, "Hz"), Start,
        "Rate of the control loop and of the published commands."),
    row("timing", "deadline_ms", ms(0.0, 0.0, 1000.0), Unarmed,
        "From the start of a tick to the return of publish; 0 is one control period."),
    row("timing", "chunk_budget_ms", ms(500.0, 1.0, 60_000.0), Any,
        "From observation to finished chunk; what takes longer is counted, and still adopted while its actions are ahead."),
    row("timing", "miss_policy", one_of("coast", MissPolicy::NAMES), Unarmed,
        "A plan that runs out with no new chunk: both decelerate; coast stays armed and goes on with the next chunk, stop disarms."),

    row("GPU", "pipeline_mode", one_of("pipelined", PipelineMode::NAMES), Start,
        "sequential: shortest latency; pipelined: most chunks a second; dual_rate: decodes the newest cache again with the newest joint state."),
    row("GPU", "partition", one_of("auto", Backend::NAMES), Start,
        "How encoder and decoder share the multiprocessors; auto takes mps if it is on, else green, else shared."),
    row("GPU", "mps_encoder_percentage", int(50, 1, 100, "%"), Any,
        "Share of the encoder. Set alone past a sum of 100, it moves the decoder's to the complement."),
    row("GPU", "mps_decoder_percentage", int(50, 1, 100, "%"), Any,
        "Share of the decoder. Set alone past a sum of 100, it moves the encoder's to the complement."),

    row("chunks", "replan_steps", int(10, 1, 1000, "policy steps"), Unarmed,
        "Policy steps between adopted chunks; at least the inference delay, at most the horizon less it."),
    row("chunks", "seam", one_of("rtc", Seam::NAMES), Unarmed,
        "How a new chunk joins the running one: rtc guides it, crossfade blends, none switches."),
    row("chunks", "rtc_schedule", one_of("exp", GuidanceSchedule::NAMES), Unarmed,
        "How the weight of guidance falls from the committed steps on."),
    row("chunks", "rtc_execution_horizon", int(10, 1, 1000, "policy steps"), Unarmed,
        "Step at which guidance ends."),
    row("chunks", "rtc_max_guidance_weight", double(Double(10.0), 0.0, 1000.0, ""), Unarmed,
        "Upper bound of the guidance gain."),
    row("chunks", "action_mode", one_of("auto", ActionMode::NAMES), Start,
        "Whether actions are joint positions or differences to the state; auto asks the checkpoint."),
    row("chunks", "action_absolute_joints", texts(Empty), Start,
        "Joints whose actions are absolute even when action_mode is delta, a gripper most often."),

    row("outputs", "outputs.names", texts(Strings(&["arm"])), Start,
        "Output groups: one command topic each."),
    row("outputs", "outputs.<group>.joints", texts(AllJoints), Start,
        "Joints of the group, in the order of its messages; every joint is in exactly one group."),
    row("outputs", "outputs.<group>.topic", text(Text("~/<group>/joint_trajectory")), Start,
        "Command topic, most often the controller's."),
    row("outputs", "outputs.<group>.type", one_of("trajectory", OutputKind::NAMES), Start,
        "trajectory is JointTrajectory with a braking tail, command is Float64MultiArray of this tick's positions."),
    row("outputs", "output_window_ms", ms(200.0, 1.0, 10_000.0), Start,
        "Plan in each trajectory ahead of the braking tail, two periods at least: how long the robot goes on if this node dies."),

    row("safety", "limits.<joint>.min_position", double(NOT_GIVEN, -LARGE, LARGE, "rad or m"), Unarmed,
        "Lower position limit; required to arm."),
    row("safety", "limits.<joint>.max_position", double(NOT_GIVEN, -LARGE, LARGE, "rad or m"), Unarmed,
        "Upper position limit; required to arm."),
    row("safety", "limits.<joint>.max_velocity", double(NOT_GIVEN, 1e-6, LARGE, "rad/s or m/s"), Unarmed,
        "Velocity limit; required to arm."),
    row("safety", "limits.<joint>.max_acceleration", double(NOT_GIVEN, 1e-6, LARGE, "rad/s² or m/s²"), Unarmed,
        "Acceleration limit; required to arm."),
    row("safety", "max_tracking_error", double(Double(0.25), 1e-6, LARGE, "rad or m"), Unarmed,
        "A measured joint further than this from its command: stop and disarm."),
    row("safety", "limits.<joint>.max_tracking_error", double(NOT_GIVEN, 1e-6, LARGE, "rad or m"), Unarmed,
        "The same for one joint; a gripper that closes on things is far from its command by design."),
    row("safety", "stop_time_ms", ms(300.0, 1.0, 10_000.0), Start,
        "Longest time of a decelerating stop."),
    row("safety", "ramp_time_ms", ms(1000.0, 0.0, 60_000.0), Unarmed,
        "Shortest time from the measured pose to the first action after arming."),

    row("recorder", "recorder.enabled", flag(true), Start,
        "Keep the last seconds, and write them on a stop, on a fault and on ~/save_recording."),
    row("recorder", "recorder.seconds", double(Double(15.0), 1.0, 600.0, "s"), Start,
        "How much is kept; 256 MB at most."),
    row("recorder", "recorder.folder", text(Text("")), Start,
        "Folder of the recordings; empty: pi0_mps in $ROS_HOME, else in ~/.ros."),
    row("recorder", "recorder.keep", int(20, 1, 100_000, "files"), Start,
        "Recordings that stay; the oldest are removed."),
    row("recorder", "recorder.image_width", int(160, 0, 8192, "pixels"), Start,
        "Wider images are recorded smaller; 0 records them as they are."),
    row("recorder", "recorder.image_rate_hz", double(Double(10.0), 0.0, 1000.0, "Hz"), Start,
        "Images recorded a second of each camera; 0 records none."),
    row("recorder", "recorder.on_shutdown", flag(false), Start,
        "Also write when the node is ended in order."),

    row("process", "autostart", flag(true), Start,
        "Load and run the policy at start; arming is never automatic."),
    row("process", "rt_priority", int(40, 0, 99, ""), Start,
        "SCHED_FIFO priority of the control thread; 0 asks for none."),
    row("process", "cpu_affinity", (Kind::IntList, Empty, Allowed::Ints(0, 1023), ""), Start,
        "CPUs of the control, encoder and decoder threads, in this order; those not given run anywhere."),
    row("process", "lock_memory", flag(true), Start,
        "Lock the process into memory, so that no page fault delays a tick."),
    row("process", "use_sim_time", flag(false), Start,
        "Stamps follow /clock; wake-ups stay on the machine's monotonic clock."),
];

/// The row of that name, as it stands in the table.
pub fn spec(name: &str) -> Option<&'static ParamSpec> {
    TABLE.iter().find(|s| s.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_whole_and_its_default_is_allowed() {
        for (i, s) in TABLE.iter().enumerate() {
            assert!(TABLE[..i].iter().all(|t| t.name != s.name), "{} stands twice", s.name);
            assert!(s.about.ends_with('.') && !s.about.contains('|'), "{}: {}", s.name, s.about);
            let value = match s.default {
                DefaultValue::Bool(b) => Value::Bool(b),
                DefaultValue::Int(i) => Value::Int(i),
                DefaultValue::Double(x) => Value::Double(x),
                DefaultValue::String(t) => Value::String(t.into()),
                DefaultValue::Strings(v) => Value::Strings(v.iter().map(|t| (*t).into()).collect()),
                DefaultValue::Empty => Value::Unset,
                DefaultValue::JointPosition => Value::Int(0),
                DefaultValue::AllJoints => Value::Strings(vec![]),
                DefaultValue::Required => continue,
            };
            let value = s.kind.coerce(value).unwrap_or_else(|e| panic!("{}: {e}", s.name));
            assert_eq!(s.check(&value), Ok(()), "{}", s.name);
        }
    }

    #[test]
    fn rows_of_a_group_stand_together() {
        let mut seen: Vec<&str> = vec![];
        for s in TABLE {
            if seen.last() != Some(&s.group) {
                assert!(!seen.contains(&s.group), "{} is away from its group", s.name);
                seen.push(s.group);
            }
        }
    }

    #[test]
    fn refusals_name_value_range_and_unit() {
        let of = |name| spec(name).unwrap();
        assert_eq!(of("control_rate_hz").check(&Value::Double(0.0)), Err("0.0 is outside 1 to 1000 Hz".into()));
        assert_eq!(of("control_rate_hz").check(&Value::Double(f64::NAN)), Err(".nan is outside 1 to 1000 Hz".into()));
        assert_eq!(of("limits.<joint>.max_velocity").check(&Value::Double(f64::NAN)), Ok(()));
        assert_eq!(of("rt_priority").check(&Value::Int(100)), Err("100 is outside 0 to 99".into()));
        assert_eq!(
            of("seam").check(&Value::String("fade".into())),
            Err("\"fade\" is not one of rtc, crossfade, none".into())
        );
        assert!(of("cpu_affinity").check(&Value::Ints(vec![0, -1])).is_err());
        assert!(of("prompt").check(&Value::String("a\0b".into())).is_err());
    }
}
