//! Values against the table: what is accepted, what is refused, and in which words.

use std::time::Duration;

use pi0_mps::control::{JointLimits as Limits, Seam};
use pi0_mps::engine::Device;
use pi0_mps::params::choice::OutputKind;
use pi0_mps::params::{Change, ParamError, Params, Value};
use pi0_mps::pipeline::PipelineMode;
use proptest::prelude::*;

fn text(s: &str) -> Value {
    Value::String(s.into())
}

fn texts(v: &[&str]) -> Value {
    Value::Strings(v.iter().map(|s| (*s).into()).collect())
}

/// The least a robot needs: one camera, two joints.
fn least() -> Vec<(String, Value)> {
    [
        ("checkpoint", text("/models/pi0")),
        ("policy_rate_hz", Value::Double(20.0)),
        ("camera_names", texts(&["wrist"])),
        ("joint_names", texts(&["shoulder", "elbow"])),
    ]
    .map(|(n, v)| (n.to_owned(), v))
    .to_vec()
}

fn with(more: &[(&str, Value)]) -> Result<Params, Vec<ParamError>> {
    Params::from_overrides(least().into_iter().chain(more.iter().map(|(n, v)| ((*n).to_owned(), v.clone()))))
}

fn problems(more: &[(&str, Value)]) -> Vec<String> {
    with(more).expect_err("these values are wrong").iter().map(ToString::to_string).collect()
}

fn set(p: &mut Params, armed: bool, changes: &[(&str, Value)]) -> Result<Vec<Change>, String> {
    let changes: Vec<_> = changes.iter().map(|(n, v)| ((*n).to_owned(), v.clone())).collect();
    p.set(&changes, armed).map_err(|e| e.to_string())
}

#[test]
fn the_least_a_robot_needs_gives_sensible_settings() {
    let s = with(&[]).unwrap().settings();
    assert_eq!(s.inputs.cameras[0].topic, "camera/wrist/image_raw");
    assert_eq!(s.inputs.cameras[0].model_key, "observation.images.wrist");
    assert_eq!(s.inputs.cameras[0].max_age, Duration::from_millis(300));
    assert_eq!(s.joints.iter().map(|j| j.index).collect::<Vec<_>>(), [0, 1]);
    assert_eq!((s.joints[0].scale, s.joints[0].offset, s.joints[0].limits), (1.0, 0.0, None));
    assert_eq!(s.safety.missing_limits.len(), 8);
    assert_eq!(s.outputs[0].topic, "~/arm/joint_trajectory");
    assert_eq!((s.outputs[0].joints.as_slice(), s.outputs[0].kind), (&[0, 1][..], OutputKind::Trajectory));
    assert_eq!(s.timing.deadline, Duration::from_millis(20));
    assert_eq!(s.timing.dt(), 0.05);
    assert_eq!(s.model.device, Device::Auto);
    assert_eq!(s.gpu.pipeline_mode, PipelineMode::Pipelined);
    assert_eq!(s.chunks.seam, Seam::Rtc);
    assert_eq!(s.process.rt_priority, Some(40));
    assert!(s.process.autostart && s.process.cpu_affinity.is_empty());
}

#[test]
fn what_is_given_arrives_in_the_settings() {
    let s = with(&[
        ("device", text("cuda:1")),
        ("tokenizer", text("/t.json")),
        ("deadline_ms", Value::Int(5)),
        ("rt_priority", Value::Int(0)),
        ("cpu_affinity", Value::Ints(vec![1, 3])),
        ("outputs.names", texts(&["left", "right"])),
        ("outputs.left.joints", texts(&["elbow"])),
        ("outputs.left.type", text("command")),
        ("outputs.right.joints", texts(&["shoulder"])),
        ("outputs.right.topic", text("/right/joint_trajectory")),
        ("action_absolute_joints", texts(&["elbow"])),
        ("joints.shoulder.index", Value::Int(1)),
        ("joints.elbow.index", Value::Int(0)),
        ("joints.elbow.scale", Value::Int(-1)),
        ("limits.elbow.min_position", Value::Double(-1.5)),
        ("limits.elbow.max_position", Value::Double(1.5)),
        ("limits.elbow.max_velocity", Value::Int(2)),
        ("limits.elbow.max_acceleration", Value::Double(8.0)),
        ("limits.shoulder.max_velocity", Value::Double(1.0)),
    ])
    .unwrap()
    .settings();
    assert_eq!(s.model.device, Device::Cuda(1));
    assert_eq!(s.model.tokenizer.as_deref(), Some(std::path::Path::new("/t.json")));
    assert_eq!(s.timing.deadline, Duration::from_millis(5));
    assert_eq!((s.process.rt_priority, s.process.cpu_affinity.as_slice()), (None, &[1, 3][..]));
    assert_eq!((s.outputs[0].joints.as_slice(), s.outputs[0].kind), (&[1][..], OutputKind::Command));
    assert_eq!((s.outputs[1].joints.as_slice(), s.outputs[1].topic.as_str()), (&[0][..], "/right/joint_trajectory"));
    assert_eq!(s.joints.iter().map(|j| (j.index, j.action_absolute)).collect::<Vec<_>>(), [(1, false), (0, true)]);
    assert_eq!(s.joints[1].scale, -1.0);
    let limits = Limits { min_position: -1.5, max_position: 1.5, max_velocity: 2.0, max_acceleration: 8.0 };
    assert_eq!((s.joints[0].limits, s.joints[1].limits), (None, Some(limits)));
    assert_eq!(
        s.safety.missing_limits,
        ["min_position", "max_position", "max_acceleration"].map(|l| format!("limits.shoulder.{l}"))
    );
}

#[test]
fn every_problem_is_listed_at_once() {
    let errors = Params::from_overrides([
        ("policy_rate".to_owned(), Value::Double(20.0)),
        ("camera_names".to_owned(), Value::Int(1)),
        ("control_rate_hz".to_owned(), Value::Double(5000.0)),
        ("joint_names".to_owned(), texts(&["a", "a"])),
    ])
    .unwrap_err();
    let names: Vec<&str> = errors.iter().map(|e| e.name.as_str()).collect();
    for name in ["policy_rate", "policy_rate_hz", "camera_names", "control_rate_hz", "checkpoint", "joint_names"] {
        assert_eq!(names.iter().filter(|n| **n == name).count(), 1, "{name} in {errors:#?}");
    }
}

#[test]
fn refusals_at_start_say_what_and_why() {
    for (more, says) in [
        (
            vec![("contol_rate_hz", Value::Double(50.0))],
            "parameter 'contol_rate_hz': is not a parameter of this node; did you mean 'control_rate_hz'?",
        ),
        (
            vec![("cameras.wirst.topic", text("x"))],
            "parameter 'cameras.wirst.topic': there is no 'wirst' in camera_names [\"wrist\"]; did you mean 'cameras.wrist.topic'?",
        ),
        (vec![("control_rate_hz", Value::Double(0.0))], "parameter 'control_rate_hz': 0.0 is outside 1 to 1000 Hz"),
        (vec![("control_rate_hz", text("fast"))], "parameter 'control_rate_hz': expected double, got string \"fast\""),
        (vec![("replan_steps", Value::Int(0))], "parameter 'replan_steps': 0 is outside 1 to 1000 policy steps"),
        (vec![("replan_steps", Value::Double(8.0))], "expected int, got double 8.0"),
        (vec![("seam", text("fade"))], "\"fade\" is not one of rtc, crossfade, none"),
        (vec![("device", text("gpu"))], "parameter 'device': \"gpu\" is not one of auto, cpu, cuda:N"),
        (vec![("checkpoint", text(""))], "parameter 'checkpoint': is empty"),
        (vec![("camera_names", Value::Unset)], "parameter 'camera_names': is empty; name at least one"),
        (vec![("camera_names", texts(&["wrist", "wrist"]))], "parameter 'camera_names': 'wrist' stands twice"),
        (
            vec![("camera_names", texts(&["wrist-1"]))],
            "parameter 'cameras.wrist-1.topic': \"camera/wrist-1/image_raw\" is not a topic name: '-' is not",
        ),
        (
            vec![("camera_names", texts(&["a", "b"])), ("cameras.b.topic", text("camera/a/image_raw"))],
            "is the topic of cameras.a.topic too",
        ),
        (vec![("joints.elbow.index", Value::Int(0))], "0 is the index of joints.shoulder.index too"),
        (vec![("joints.elbow.scale", Value::Int(0))], "0.0 cannot be undone"),
        (
            vec![("outputs.arm.joints", texts(&["shoulder", "elbw", "elbow"]))],
            "joint 'elbw' is not in joint_names; did you mean 'elbow'?",
        ),
        (vec![("outputs.arm.joints", texts(&["shoulder"]))], "no outputs.<group>.joints holds elbow"),
        (vec![("outputs.arm.joints", texts(&["shoulder", "elbow", "elbow"]))], "joint 'elbow' stands twice here"),
        (
            vec![("outputs.names", texts(&["a", "b"]))],
            "parameter 'outputs.b.joints': joint 'shoulder' stands in outputs.a.joints too",
        ),
        (
            vec![("action_absolute_joints", texts(&["gripper"]))],
            "parameter 'action_absolute_joints': joint 'gripper' is not in joint_names",
        ),
        (
            vec![("limits.elbow.min_position", Value::Double(1.0)), ("limits.elbow.max_position", Value::Double(1.0))],
            "1.0 is not below limits.elbow.max_position = 1.0",
        ),
        (vec![("limits.elbow.max_velocity", Value::Double(0.0))], "0.0 is outside 0.000001 to 1000000 rad/s or m/s"),
        (vec![("output_window_ms", Value::Int(10))], "10 ms is shorter than one control period of 20 ms"),
        (vec![("mps_encoder_percentage", Value::Int(100))], "100 % leaves nothing for mps_decoder_percentage"),
        (
            vec![
                ("partition", text("green")),
                ("mps_encoder_percentage", Value::Int(70)),
                ("mps_decoder_percentage", Value::Int(70)),
            ],
            "shares of partition green cannot overlap",
        ),
        (vec![("autostart", Value::Unset)], "expected bool, got no value"),
        (vec![("seed", Value::Other("byte list"))], "expected int, got byte list"),
    ] {
        let found = problems(&more);
        assert!(found.len() == 1 || found[0].contains("outputs."), "{more:?} gave {found:#?}");
        assert!(found.iter().any(|e| e.contains(says)), "{more:?}: expected '{says}' in {found:#?}");
    }
}

#[test]
fn a_missing_rate_is_refused_with_its_meaning() {
    let errors = Params::from_overrides(least().into_iter().filter(|(n, _)| n != "policy_rate_hz")).unwrap_err();
    assert_eq!(errors.len(), 1, "{errors:#?}");
    assert!(errors[0].to_string().starts_with("parameter 'policy_rate_hz': is required and not given"));
}

#[test]
fn a_set_is_all_or_nothing() {
    let mut p = with(&[]).unwrap();
    let e = set(&mut p, false, &[("prompt", text("fold")), ("max_camera_skew_ms", Value::Double(-1.0))]).unwrap_err();
    assert!(e.contains("-1.0 is outside 1 to 60000 ms"), "{e}");
    assert_eq!(p.settings().model.prompt, "");
    let changes = set(&mut p, true, &[("prompt", text("fold")), ("max_camera_skew_ms", Value::Int(50))]).unwrap();
    assert_eq!(changes.len(), 2);
    let change = changes.iter().find(|c| c.name == "prompt").unwrap();
    assert_eq!((&change.old, &change.new, &change.note), (&text(""), &text("fold"), &None));
    assert_eq!(p.settings().inputs.max_camera_skew, Duration::from_millis(50));
}

#[test]
fn what_cannot_change_says_why() {
    let mut p = with(&[]).unwrap();
    let e = set(&mut p, false, &[("control_rate_hz", Value::Int(100))]).unwrap_err();
    assert_eq!(e, "parameter 'control_rate_hz': is read-only; it is 50.0 since start. Restart the node to change it");
    assert_eq!(set(&mut p, true, &[("control_rate_hz", Value::Int(50))]), Ok(vec![]), "the value it has is no change");

    let limit = [("limits.elbow.max_velocity", Value::Double(1.0))];
    let e = set(&mut p, true, &limit).unwrap_err();
    assert!(e.contains("cannot change while armed"), "{e}");
    assert_eq!(set(&mut p, false, &limit).unwrap().len(), 1);

    let e = set(&mut p, false, &[("prompt", text("a")), ("prompt", text("b"))]).unwrap_err();
    assert!(e.contains("given twice"), "{e}");
    let e = set(&mut p, false, &[("prompt", Value::Unset)]).unwrap_err();
    assert!(e.contains("cannot be removed"), "{e}");
    let e = set(&mut p, false, &[("promt", text("a"))]).unwrap_err();
    assert!(e.contains("did you mean 'prompt'?"), "{e}");
    let e = set(
        &mut p,
        false,
        &[("limits.elbow.min_position", Value::Int(2)), ("limits.elbow.max_position", Value::Int(1))],
    );
    assert!(e.unwrap_err().contains("2.0 is not below"));
}

#[test]
fn one_share_alone_moves_the_other_to_the_complement() {
    let mut p = with(&[("mps_encoder_percentage", Value::Int(70))]).unwrap();
    let shares = |p: &Params| {
        let split = p.settings().gpu.split;
        (split.encoder, split.decoder)
    };
    assert_eq!(shares(&p), (70, 30), "at start too");

    let changes = set(&mut p, true, &[("mps_decoder_percentage", Value::Int(40))]).unwrap();
    assert_eq!(shares(&p), (60, 40));
    let moved = changes.iter().find(|c| c.name == "mps_encoder_percentage").unwrap();
    assert_eq!((&moved.old, &moved.new), (&Value::Int(70), &Value::Int(60)));
    assert!(moved.note.as_deref().unwrap().contains("complement of mps_decoder_percentage = 40 %"));

    set(&mut p, true, &[("mps_decoder_percentage", Value::Int(20))]).unwrap();
    assert_eq!(shares(&p), (60, 20), "a sum below 100 moves nothing");

    let both = |e, d| [("mps_encoder_percentage", Value::Int(e)), ("mps_decoder_percentage", Value::Int(d))];
    set(&mut p, true, &both(100, 100)).unwrap();
    assert_eq!(shares(&p), (100, 100), "both together are taken as they are");
    assert_eq!(set(&mut p, true, &[("mps_encoder_percentage", Value::Int(100))]), Ok(vec![]), "no change");
    set(&mut p, true, &[("mps_encoder_percentage", Value::Int(30))]).unwrap();
    assert_eq!(shares(&p), (30, 70));
    assert!(set(&mut p, true, &[("mps_encoder_percentage", Value::Int(100))]).is_err());
    assert_eq!(shares(&p), (30, 70));
}

proptest! {
    /// Whatever is set in whatever order, the shares stay in range, and one alone never leaves more than the GPU has.
    #[test]
    fn shares_stay_in_range(sets in prop::collection::vec((any::<bool>(), -5i64..120), 1..20)) {
        let mut p = with(&[]).unwrap();
        for (encoder, percent) in sets {
            let name = if encoder { "mps_encoder_percentage" } else { "mps_decoder_percentage" };
            let before = p.settings().gpu;
            match set(&mut p, true, &[(name, Value::Int(percent))]) {
                Ok(_) => {
                    let g = p.settings().gpu;
                    prop_assert!(g.split.encoder + g.split.decoder <= 100);
                    prop_assert!(g.split.encoder >= 1 && g.split.decoder >= 1);
                }
                Err(_) => {
                    prop_assert!(!(1..=99).contains(&percent));
                    prop_assert_eq!(p.settings().gpu, before);
                }
            }
        }
    }

    /// No value of any type for any parameter panics, and a refused one changes nothing.
    #[test]
    fn no_value_panics(pick in any::<prop::sample::Index>(), int in any::<i64>(), double in any::<f64>(), s in ".*", n in 0..7) {
        let mut p = with(&[]).unwrap();
        let names: Vec<String> = p.iter().map(|(n, _)| n.to_owned()).collect();
        let name = pick.get(&names);
        let value = match n {
            0 => Value::Int(int),
            1 => Value::Double(double),
            2 => Value::String(s),
            3 => Value::Strings(vec![s]),
            4 => Value::Bool(true),
            5 => Value::Ints(vec![int]),
            _ => Value::Doubles(vec![double]),
        };
        let before = p.settings();
        let _ = with(&[(name, value.clone())]).map(|p| p.settings());
        if set(&mut p, false, &[(name, value)]).is_err() {
            prop_assert_eq!(format!("{:?}", p.settings()), format!("{before:?}"));
        }
    }
}
