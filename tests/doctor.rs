//! `pi0 doctor` over a checkpoint and parameter files: what it says is what the node would do.

use std::process::Command;

fn doctor(arguments: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_pi0"))
        .arg("doctor")
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    (out.status.success(), String::from_utf8(out.stdout).unwrap())
}

#[test]
fn a_checkpoint_is_checked_against_the_parameters_it_would_run_with() {
    let robot = ["--params-file", "config/robots/sim_arm.yaml"];
    let touch = ["--checkpoint", "checkpoints/touch", "--params-file", "config/robots/sim_arm_touch.yaml"];
    let (sound, says) = doctor(&[&robot[..], &touch[..]].concat());
    assert!(sound && says.contains("cameras and joints of the parameter file fit"), "{says}");
    assert!(says.contains("SCHED_FIFO") && says.contains("memory locking"), "{says}");

    let dir = tempfile::tempdir().unwrap();
    let mine = dir.path().join("mine.yaml");
    let with = |line: &str| {
        std::fs::write(&mine, format!("/**:\n  ros__parameters:\n    {line}\n")).unwrap();
        doctor(&[&robot[..], &touch[..], &["--params-file", mine.to_str().unwrap()]].concat())
    };
    let (sound, says) = with("joints.elbow.index: 0");
    assert!(!sound && says.contains("0 is the index of joints.shoulder_pan.index too"), "{says}");
    let (sound, says) = with("cameras.base.model_key: observation.images.nose");
    assert!(!sound && says.contains("observation.images.nose"), "a camera that the policy does not have: {says}");
    let (sound, says) = with("tokenizer: /nowhere/tokenizer.json");
    assert!(!sound && says.contains("/nowhere/tokenizer.json"), "a file that a parameter names: {says}");
    let (sound, says) = with("rt_priority: 0");
    assert!(sound && !says.contains("SCHED_FIFO"), "asked for none: {says}");
}
