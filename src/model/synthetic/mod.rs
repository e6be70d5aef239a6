//! A small random policy in LeRobot's layout, complete with tokenizer and statistics: for demos and tests.
//!
//! It knows nothing about any task, but what it does looks like control: it moves a six-joint arm and its gripper
//! along smooth closed paths that depend on the joint state and, by a few percent, on images and prompt. The same
//! seed gives the same bytes.

mod orbit;
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

/// Whether `dir` holds a checkpoint made by [`write`].
pub fn is_synthetic(dir: &Path) -> bool {
    let config = std::fs::read(dir.join("config.json")).ok();
    let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    config.is_some_and(|c| c.get(MARK).is_some())
}

/// Writes the checkpoint of `seed` into `dir`, which is made if need be; files of the same names are replaced, each
/// in one step. Returns the names and sizes in bytes.
pub fn write(dir: &Path, seed: u64) -> Result<Vec<(&'static str, usize)>, ModelError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ModelError::Io { path, source }
    };
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    let mut written = Vec::new();
    for (name, bytes) in files(seed)? {
        let path = dir.join(name);
        // A reader that has the old file mapped keeps the old file.
        let unfinished = dir.join(format!(".{name}.unfinished"));
        std::fs::write(&unfinished, &bytes).map_err(io(&unfinished))?;
        std::fs::rename(&unfinished, &path).map_err(io(&path))?;
        written.push((name, bytes.len()));
    }
    Ok(written)
}

fn files(seed: u64) -> Result<Vec<(&'static str, Vec<u8>)>, ModelError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let orbit = Orbit::draw(&mut rng, &POSE_STD);
    let weights = weights::build(&TINY, &orbit, &mut rng);
    // LeRobot's files prepend `model.` to every name.
    let weights = weights.into_iter().map(|(name, (shape, values))| (format!("model.{name}"), shape, values));
    let mut stats = Vec::new();
    for feature in [STATE_KEY, ACTION_KEY] {
        for (statistic, values) in [("mean", MEAN_POSE), ("std", POSE_STD)] {
            stats.push((format!("{feature}.{statistic}"), vec![JOINTS], values.map(|v| v as f32).to_vec()));
        }
    }
    let stats = safetensors("the statistics", stats)?;
    Ok(vec![
        ("model.safetensors", safetensors("the weights", weights.collect())?),
        ("tokenizer.json", pretty(&tokenizer::json())),
        (STATS_FILES[0], stats.clone()),
        (STATS_FILES[1], stats),
        ("policy_preprocessor.json", pretty(&preprocessor())),
        ("policy_postprocessor.json", pretty(&postprocessor())),
        // Last: a directory with this file is complete.
        ("config.json", pretty(&config(seed))),
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

fn config(seed: u64) -> Value {
    let image = json!({ "type": "VISUAL", "shape": [3, TINY.vision.image, TINY.vision.image] });
    json!({
        "type": "pi0",
        MARK: { "preset": "tiny", "seed": seed, "warning": "random weights: for demos and tests only" },
        "n_obs_steps": 1,
        "chunk_size": TINY.horizon,
        "n_action_steps": TINY.horizon,
        "max_state_dim": TINY.state_dim,
        "max_action_dim": TINY.action_dim,
        "num_inference_steps": 10,
        "min_period": TINY.min_period,
        "max_period": TINY.max_period,
        "image_resolution": [TINY.vision.image, TINY.vision.image],
        "empty_cameras": 0,
        "tokenizer_max_length": TINY.max_tokens,
        "vision_num_attention_heads": TINY.vision.heads,
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

fn preprocessor() -> Value {
    json!({
        "name": "policy_preprocessor",
        "steps": [
            { "registry_name": "rename_observations_processor", "config": { "rename_map": {} } },
            { "registry_name": "to_batch_processor", "config": {} },
            { "registry_name": "pi0_new_line_processor", "config": {} },
            {
                "registry_name": "tokenizer_processor",
                "config": {
                    "max_length": TINY.max_tokens,
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

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        assert!(files(7).unwrap() == files(7).unwrap());
        let (seven, eight) = (files(7).unwrap(), files(8).unwrap());
        assert!(seven[0].1 != eight[0].1, "the weights differ");
        assert!(seven[1..6] == eight[1..6], "nothing else does, but the seed in config.json");
    }
}
