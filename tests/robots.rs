//! The files of `config/robots` through the loader of the node, and the controllers of `config/controllers` beside them.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::path::{Path, PathBuf};

use pi0_mps::params::choice::OutputKind;
use pi0_mps::params::{Params, Settings, Value, yaml};
use pi0_mps::pipeline::joint_map::{JointBinding, JointMap};
use yaml_rust2::{Yaml, YamlLoader};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn settings(robot: &str) -> Settings {
    let text = std::fs::read_to_string(folder("robots").join(format!("{robot}.yaml"))).unwrap();
    let mut given = yaml::overrides(&text, "pi0_mps").unwrap();
    given.push(("checkpoint".into(), Value::String("/policy".into())));
    Params::from_overrides(given).unwrap_or_else(|errors| panic!("{robot}: {errors:?}")).settings()
}

/// The robots that have controllers: everything but the simulated one.
fn robots() -> Vec<String> {
    let files = std::fs::read_dir(folder("controllers")).unwrap().map(|f| f.unwrap().path());
    let mut names: Vec<_> = files.map(|f| f.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn map(s: &Settings) -> JointMap {
    let names: Vec<_> = s.joints.iter().map(|j| j.name.clone()).collect();
    let bindings = s.joints.iter().map(|j| JointBinding { index: j.index, scale: j.scale, offset: j.offset }).collect();
    JointMap::new(&names, bindings, s.joints.len(), "action").unwrap()
}

#[test]
fn every_robot_can_be_armed_and_stopped_in_time() {
    assert_eq!(robots(), ["aloha", "fr3", "panda", "so101", "ur5e"]);
    for robot in &robots() {
        let s = settings(robot);
        assert!(s.safety.missing_limits.is_empty(), "{robot}: {:?}", s.safety.missing_limits);
        for j in &s.joints {
            let l = j.limits.unwrap();
            let braking = l.max_velocity / l.max_acceleration;
            assert!(braking <= s.safety.stop_time.as_secs_f64(), "{robot} {}: brakes in {braking} s", j.name);
            l.check(&j.name).unwrap();
            let grips = j.name.contains("gripper") || j.name.contains("finger");
            let travel = l.max_position - l.min_position;
            let bound = if grips { travel } else { 0.25 };
            assert!((j.max_tracking_error - bound).abs() < 0.01, "{robot} {}: {}", j.name, j.max_tracking_error);
        }
        assert!(s.outputs.iter().all(|o| !o.topic.starts_with('/')), "{robot}: absolute names leave the namespace");
    }
}

#[test]
fn every_output_has_a_controller_that_takes_it() {
    let strings = |y: &Yaml| -> Vec<String> {
        y.as_vec().into_iter().flatten().filter_map(|s| s.as_str().map(str::to_owned)).collect()
    };
    for robot in &robots() {
        let s = settings(robot);
        let text = std::fs::read_to_string(folder("controllers").join(format!("{robot}.yaml"))).unwrap();
        let file = &YamlLoader::load_from_str(&text).unwrap()[0];
        let mut types: BTreeMap<String, String> = BTreeMap::new();
        for (name, entry) in file["controller_manager"]["ros__parameters"].as_hash().unwrap() {
            if let Some(of_type) = entry["type"].as_str() {
                types.insert(name.as_str().unwrap().into(), of_type.into());
            }
        }
        assert_eq!(types.len(), s.outputs.len(), "{robot}: {types:?}");
        for o in &s.outputs {
            let (controller, rest) = o.topic.split_once('/').unwrap();
            let parameters = &file[controller]["ros__parameters"];
            let joints: Vec<_> = o.joints.iter().map(|j| s.joints[*j].name.clone()).collect();
            assert_eq!(strings(&parameters["joints"]), joints, "{robot} {controller}");
            let (topic, of_type) = match o.kind {
                OutputKind::Trajectory => ("joint_trajectory", "joint_trajectory_controller/JointTrajectoryController"),
                OutputKind::Command => ("commands", "forward_command_controller/ForwardCommandController"),
            };
            assert_eq!((rest, types[controller].as_str()), (topic, of_type), "{robot} {controller}");
            if o.kind == OutputKind::Trajectory {
                assert_eq!(parameters["interpolate_from_desired_state"].as_bool(), Some(true));
                assert_eq!(strings(&parameters["command_interfaces"]), ["position"]);
            } else {
                assert_eq!(parameters["interface_name"].as_str(), Some("position"));
            }
        }
    }
}

#[test]
fn so101_speaks_degrees_and_percent() {
    let settings = settings("so101");
    let map = map(&settings);
    let mut robot = [0.0; 6];
    map.to_robot(&[90.0, -45.0, 0.0, 30.0, -90.0, 0.0], &mut robot);
    let expected = [PI / 2.0, -PI / 4.0, 0.0, PI / 6.0, -PI / 2.0, -0.174533];
    assert!(robot.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{robot:?}");
    let mut policy = [0.0; 6];
    map.to_policy(&[PI / 2.0, -PI / 4.0, 0.0, PI / 6.0, -PI / 2.0, 1.745_33], &mut policy);
    let expected = [90.0, -45.0, 0.0, 30.0, -90.0, 100.0];
    assert!(policy.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3), "{policy:?}");

    // Closed and open are within the limits: a gripper that rests at a stop would be refused otherwise.
    let gripper = settings.joints[5].limits.unwrap();
    for (percent, limit) in [(0.0, gripper.min_position), (100.0, gripper.max_position)] {
        map.to_robot(&[0.0, 0.0, 0.0, 0.0, 0.0, percent], &mut robot);
        assert!((robot[5] - limit).abs() < 1e-6, "{percent} %: {} is not {limit}", robot[5]);
    }
}

#[test]
fn aloha_turns_shoulders_and_elbows_and_shifts_grippers() {
    let map = map(&settings("aloha"));
    let one_arm = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7];
    let mut robot = [0.0; 14];
    map.to_robot(&[one_arm, one_arm].concat(), &mut robot);
    let expected = [0.1, -0.2, -0.3, 0.4, 0.5, 0.6, 1.2476];
    for (arm, side) in robot.chunks(7).zip(["left", "right"]) {
        assert!(arm.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{side}: {arm:?}");
    }
    let mut policy = [0.0; 14];
    map.to_policy(&robot, &mut policy);
    assert!(policy.iter().zip([one_arm, one_arm].concat()).all(|(a, b)| (a - b).abs() < 1e-12), "{policy:?}");
}
