//! A small random policy in LeRobot's layout, complete with tokenizer and statistics: for demos and tests.
//!
//! It knows nothing about any task, but what it does looks like control: it moves a six-joint arm and its gripper
//! along smooth closed paths that depend on the joint state and, by a few percent, on images and prompt. The same
//! seed gives the same bytes.
//!
//! [`write_random`] writes random weights of any size instead, which move nothing to speak of: for times and soaks.

mod orbit;
mod random;
mod tokenizer;
mod weights;

use std::collections::HashMap;
use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::{Dims, Family, ModelError, StackDims, VisionDims};
use orbit::{JOINTS, Orbit};

/// Joints of the robot it is made for, in the order of state and action.
pub const JOINT_NAMES: [&str; JOINTS] =
    ["shoulder_pan", "shoulder_lift", "elbow", "wrist_pitch", "wrist_yaw", "wrist_roll", "gripper"];
/// Pose in the middle of the motion (rad; gripper in m): elbow up, hand over the table, gripper half open.
pub const MEAN_POSE: [f64; JOINTS] = [0.0, -0.15, 1.45, 1.0, 0.0, 0.0, 0.0175];
/// Standard deviation that the statistics state (rad; gripper in m).
pub const POSE_STD: [f64; JOINTS] = [0.35, 0.35, 0.35, 0.35, 0.35, 0.35, 0.012];

/// Key of config.json that marks such a checkpoint.
const MARK: &str = "synthetic";
const WEIGHTS_FILE: &str = "model.safetensors";
const STATE_KEY: &str = "observation.state";
const ACTION_KEY: &str = "action";
const STATS_FILES: [&str; 2] = [
    "policy_preprocessor_step_5_normalizer_processor.safetensors",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
];

/// Dimensions of the preset `tiny`: two views are encoded and decoded in a fraction of 60 ms on one core.
const TINY: Dims = Dims {
    family: Family::Pi0,
    vision: VisionDims { layers: 2, width: 64, mlp: 128, heads: 4, patch: 14, image: 224 },
    trunk: StackDims { layers: 4, width: 64, mlp: 128, heads: 4, head_dim: 32 },
    expert: StackDims { layers: 4, width: 96, mlp: 128, heads: 4, head_dim: 32 },
    vocab: tokenizer::VOCABULARY,
    state_dim: 32,
    action_dim: 32,
    horizon: 50,
    max_tokens: 96,
    min_period: 0.004,
    max_period: 4.0,
};

/// Standard deviation that the statistics of [`write_random`] state for actions (rad; gripper in m): whatever random
/// weights say, the arm trembles about its mean pose, within any limits.
const TREMBLE: [f64; JOINTS] = [3e-4, 3e-4, 3e-4, 3e-4, 3e-4, 3e-4, 1e-5];

/// Whether `dir` holds a checkpoint made by [`write`] or [`write_random`].
pub fn is_synthetic(dir: &Path) -> bool {
    let config = std::fs::read(dir.join("config.json")).ok();
    let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    config.is_some_and(|c| c.get(MARK).is_some())
}

/// Writes the checkpoint of `seed` into `dir`, which is made if need be; files of the same names are replaced, each
/// in one step. Returns the names and sizes in bytes.
pub fn write(dir: &Path, seed: u64) -> Result<Vec<(&'static str, usize)>, ModelError> {
    make(dir)?;
    files(seed)?.into_iter().map(|(name, bytes)| put(dir, name, |to| std::fs::write(to, &bytes))).collect()
}

/// As [`write`], with the dimensions `dims`, named `preset` in config.json, and random bf16 weights that are drawn as
/// they are written, on every core: a policy of the published size is 6.5 GB on disk and 1 GB in memory.
pub fn write_random(
    dir: &Path,
    preset: &str,
    dims: &Dims,
    seed: u64,
) -> Result<Vec<(&'static str, usize)>, ModelError> {
    make(dir)?;
    let mut written = vec![put(dir, WEIGHTS_FILE, |to| random::write(to, dims, seed))?];
    for (name, bytes) in beside(preset, dims, &TREMBLE, seed)? {
        written.push(put(dir, name, |to| std::fs::write(to, &bytes))?);
    }
    Ok(written)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    let path = path.to_path_buf();
    move |source| ModelError::Io { path, source }
}

fn make(dir: &Path) -> Result<(), ModelError> {
    std::fs::create_dir_all(dir).map_err(io(dir))
}

/// Writes one file of `dir` under another name first: a reader that has the old file mapped keeps the old file.
fn put(
    dir: &Path,
    name: &'static str,
    write: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<(&'static str, usize), ModelError> {
    let path = dir.join(name);
    let unfinished = dir.join(format!(".{name}.unfinished"));
    write(&unfinished).map_err(io(&unfinished))?;
    let bytes = std::fs::metadata(&unfinished).map_err(io(&unfinished))?.len();
    std::fs::rename(&unfinished, &path).map_err(io(&path))?;
    Ok((name, usize::try_from(bytes).unwrap_or(usize::MAX)))
}

fn files(seed: u64) -> Result<Vec<(&'static str, Vec<u8>)>, ModelError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let orbit = Orbit::draw(&mut rng, &POSE_STD);
    let weights = weights::build(&TINY, &orbit, &mut rng);
    // LeRobot's files prepend `model.` to every name.
    let weights = weights.into_iter().map(|(name, (shape, values))| (format!("model.{name}"), shape, values));
    let mut files = vec![(WEIGHTS_FILE, safetensors("the weights", weights.collect())?)];
    files.extend(beside("tiny", &TINY, &POSE_STD, seed)?);
    Ok(files)
}

/// Everything but the weights; `action_std` is what the statistics state for actions.
fn beside(
    preset: &str,
    dims: &Dims,
    action_std: &[f64; JOINTS],
    seed: u64,
) -> Result<Vec<(&'static str, Vec<u8>)>, ModelError> {
    let mut stats = Vec::new();
    for (feature, std) in [(STATE_KEY, &POSE_STD), (ACTION_KEY, action_std)] {
        for (statistic, values) in [("mean", &MEAN_POSE), ("std", std)] {
            stats.push((format!("{feature}.{statistic}"), vec![JOINTS], values.map(|v| v as f32).to_vec()));
        }
    }
    let stats = safetensors("the statistics", stats)?;
    Ok(vec![
        ("tokenizer.json", pretty(&tokenizer::json())),
        (STATS_FILES[0], stats.clone()),
        (STATS_FILES[1], stats),
        ("policy_preprocessor.json", pretty(&preprocessor(dims))),
        ("policy_postprocessor.json", pretty(&postprocessor())),
        // Last: a directory with this file is complete.
        ("config.json", pretty(&config(preset, dims, seed))),
    ])
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn safetensors(what: &str, tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> Result<Vec<u8>, ModelError> {
    let fail = |e: safetensors::SafeTensorError| ModelError::File { path: what.into(), reason: e.to_string() };
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(fail)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(fail)
}

fn config(preset: &str, dims: &Dims, seed: u64) -> Value {
    let size = dims.vision.image;
    let image = json!({ "type": "VISUAL", "shape": [3, size, size] });
    json!({
        "type": "pi0",
        MARK: { "preset": preset, "seed": seed, "warning": "random weights: for demos and tests only" },
        "n_obs_steps": 1,
        "chunk_size": dims.horizon,
        "n_action_steps": dims.horizon,
        "max_state_dim": dims.state_dim,
        "max_action_dim": dims.action_dim,
        "num_inference_steps": 10,
        "min_period": dims.min_period,
        "max_period": dims.max_period,
        "image_resolution": [size, size],
        "empty_cameras": 0,
        "tokenizer_max_length": dims.max_tokens,
        "vision_num_attention_heads": dims.vision.heads,
        "dtype": "float32",
        "normalization_mapping": norm_map(),
        "input_features": {
            "observation.images.base": image,
            "observation.images.wrist": image,
            STATE_KEY: { "type": "STATE", "shape": [JOINTS] },
        },
        "output_features": { ACTION_KEY: { "type": "ACTION", "shape": [JOINTS] } },
        "use_relative_actions": false,
        "action_feature_names": JOINT_NAMES,
    })
}

fn norm_map() -> Value {
    json!({ "VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD" })
}

fn preprocessor(dims: &Dims) -> Value {
    json!({
        "name": "policy_preprocessor",
        "steps": [
            { "registry_name": "rename_observations_processor", "config": { "rename_map": {} } },
            { "registry_name": "to_batch_processor", "config": {} },
            { "registry_name": "pi0_new_line_processor", "config": {} },
            {
                "registry_name": "tokenizer_processor",
                "config": {
                    "max_length": dims.max_tokens,
                    "task_key": "task",
                    "padding_side": "right",
                    "padding": "max_length",
                    "truncation": true,
                    "tokenizer_name": "tokenizer.json",
                },
            },
            { "registry_name": "device_processor", "config": { "device": "cpu", "float_dtype": null } },
            {
                "registry_name": "normalizer_processor",
                "config": {
                    "eps": 1e-8,
                    "features": {
                        STATE_KEY: { "type": "STATE", "shape": [JOINTS] },
                        ACTION_KEY: { "type": "ACTION", "shape": [JOINTS] },
                    },
                    "norm_map": norm_map(),
                },
                "state_file": STATS_FILES[0],
            },
        ],
    })
}

fn postprocessor() -> Value {
    json!({
        "name": "policy_postprocessor",
        "steps": [
            {
                "registry_name": "unnormalizer_processor",
                "config": {
                    "eps": 1e-8,
                    "features": { ACTION_KEY: { "type": "ACTION", "shape": [JOINTS] } },
                    "norm_map": norm_map(),
                },
                "state_file": STATS_FILES[1],
            },
            { "registry_name": "device_processor", "config": { "device": "cpu", "float_dtype": null } },
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Checkpoint, PROJECTOR, Policy, PolicyOptions};

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        assert!(files(7).unwrap() == files(7).unwrap());
        let (seven, eight) = (files(7).unwrap(), files(8).unwrap());
        assert!(seven[0].1 != eight[0].1, "the weights differ");
        assert!(seven[1..6] == eight[1..6], "nothing else does, but the seed in config.json");
    }

    #[test]
    fn random_weights_of_any_size_are_a_whole_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let dims = Dims { vocab: 400, horizon: 30, ..TINY };
        let read = |name: &str, seed| {
            let dir = folder.path().join(name);
            let written = write_random(&dir, "small", &dims, seed).unwrap();
            let weights = std::fs::read(dir.join(WEIGHTS_FILE)).unwrap();
            assert_eq!(written[0], (WEIGHTS_FILE, weights.len()));
            (dir, weights)
        };
        let ((dir, one), (_, again), (_, other)) = (read("one", 5), read("again", 5), read("other", 6));
        assert!(one == again && one != other, "the seed decides, whatever thread drew what");
        assert!(is_synthetic(&dir));
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert_eq!(*checkpoint.dims(), dims);
        Policy::open(&checkpoint, &dir, &PolicyOptions::default()).unwrap();
        let name = format!("{PROJECTOR}.weight");
        let values = checkpoint.tensor(&name, &[dims.trunk.width, dims.vision.width]).unwrap().to_f32().to_vec();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt();
        let expected = 1.0 / (dims.vision.width as f32).sqrt();
        assert!((deviation / expected - 1.0).abs() < 0.05, "{deviation}, expected {expected}");
    }
}
