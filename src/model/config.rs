//! config.json of a checkpoint, of either origin; keys this project does not use are tolerated.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::ModelError;

/// Who wrote a checkpoint, which decides image resampling, prompt text and the names of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Hugging Face LeRobot.
    LeRobot,
    /// openpi's PyTorch port.
    OpenPi,
}

/// One entry of `input_features` or `output_features`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Full name, such as `observation.images.front`.
    pub name: String,
    /// `VISUAL`, `STATE` or `ACTION`.
    pub kind: String,
    /// Shape without the batch dimension.
    pub shape: Vec<usize>,
}

/// What config.json says; `None` or empty where it says nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PolicyConfig {
    /// LeRobot's `type`: `pi0` or `pi05`.
    pub kind: Option<String>,
    /// Actions a chunk: `chunk_size` (LeRobot) or `action_horizon` (openpi).
    pub horizon: Option<usize>,
    /// Padded state dimension: `max_state_dim`.
    pub max_state_dim: Option<usize>,
    /// Padded action dimension: `max_action_dim` (LeRobot) or `action_dim` (openpi).
    pub max_action_dim: Option<usize>,
    /// Flow-matching steps the policy was configured for.
    pub num_inference_steps: Option<usize>,
    /// Shortest period of the time embedding.
    pub min_period: Option<f64>,
    /// Longest period of the time embedding.
    pub max_period: Option<f64>,
    /// Height and width of the images the model sees.
    pub image_resolution: Option<[usize; 2]>,
    /// Longest prompt in tokens: `tokenizer_max_length` (LeRobot) or `max_token_len` (openpi).
    pub max_tokens: Option<usize>,
    /// Attention heads of SigLIP.
    pub vision_heads: Option<usize>,
    /// Feature kind (`STATE`, `ACTION`, `VISUAL`) to normalisation mode (`MEAN_STD`, `QUANTILES`, `IDENTITY`, …).
    pub normalization: Vec<(String, String)>,
    /// Inputs in the file's order, which is the model's camera order.
    pub inputs: Vec<Feature>,
    /// Outputs in the file's order.
    pub outputs: Vec<Feature>,
    /// Whether actions are relative to the state at the chunk's start.
    pub use_relative_actions: bool,
    /// Joints (name fragments) that stay absolute under `use_relative_actions`.
    pub relative_exclude_joints: Option<Vec<String>>,
    /// Joint names of the action vector.
    pub action_feature_names: Option<Vec<String>>,
    /// Whether a π0.5 policy reads the state in its prompt (openpi's `discrete_state_input`); unset means it does.
    pub discrete_state_input: Option<bool>,
}

/// Flags that mean a different computation; a checkpoint that sets one cannot be run rightly.
const REFUSED_FLAGS: [(&str, &str); 4] = [
    ("use_visual_memory", "it adds memory tokens to the prefix"),
    ("use_proprioceptive_memory", "it adds memory tokens to the prefix"),
    ("adapt_to_pi_aloha", "it flips and remaps the Aloha joints inside the policy"),
    ("use_delta_joint_actions_aloha", "LeRobot never implemented it"),
];

impl PolicyConfig {
    /// Reads and checks one file.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Parses the text of the file at `path` (used in messages only).
    pub fn parse(text: &str, path: &Path) -> Result<Self, ModelError> {
        let root: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| ModelError::File { path: path.into(), reason: format!("not a JSON object: {e}") })?;
        let keys = Keys { root: &root, path };
        for (flag, why) in REFUSED_FLAGS {
            if keys.get::<bool>(flag)? == Some(true) {
                return Err(keys.refuse(format!("'{flag}' is true: {why}, which is not supported")));
            }
        }
        let kind: Option<String> = keys.get("type")?;
        if let Some(kind) = kind.as_deref().filter(|k| !["pi0", "pi05"].contains(k)) {
            return Err(keys.refuse(format!("'type' is '{kind}': expected a 'pi0' or 'pi05' policy")));
        }
        let config = Self {
            kind,
            horizon: keys.either("chunk_size", "action_horizon")?,
            max_state_dim: keys.get("max_state_dim")?,
            max_action_dim: keys.either("max_action_dim", "action_dim")?,
            num_inference_steps: keys.get("num_inference_steps")?,
            min_period: keys.get("min_period")?,
            max_period: keys.get("max_period")?,
            image_resolution: keys.get("image_resolution")?,
            max_tokens: keys.either("tokenizer_max_length", "max_token_len")?,
            vision_heads: keys.get("vision_num_attention_heads")?,
            normalization: keys.normalization()?,
            inputs: keys.features("input_features")?,
            outputs: keys.features("output_features")?,
            use_relative_actions: keys.get("use_relative_actions")?.unwrap_or(false),
            relative_exclude_joints: keys.get("relative_exclude_joints")?,
            action_feature_names: keys.get("action_feature_names")?,
            discrete_state_input: keys.get("discrete_state_input")?,
        };
        for (key, value) in [
            ("chunk_size or action_horizon", config.horizon),
            ("tokenizer_max_length", config.max_tokens),
            ("max_state_dim", config.max_state_dim),
            ("max_action_dim", config.max_action_dim),
            ("vision_num_attention_heads", config.vision_heads),
        ] {
            if value.is_some_and(|n| n == 0 || n > MAX_COUNT) {
                return Err(keys.refuse(format!("'{key}' is {}: expected 1 to {MAX_COUNT}", value.unwrap_or(0))));
            }
        }
        let (min, max) = (config.min_period.unwrap_or(MIN_PERIOD), config.max_period.unwrap_or(MAX_PERIOD));
        if !(min > 0.0 && max > min && max.is_finite()) {
            return Err(keys.refuse(format!("'min_period' {min} and 'max_period' {max}: expected 0 < min < max")));
        }
        Ok(config)
    }

    /// Images in the model's order, without LeRobot's placeholders for cameras that are never there.
    pub fn cameras(&self) -> Vec<String> {
        let images = self.inputs.iter().filter(|f| f.kind == "VISUAL").map(|f| f.name.clone());
        images.filter(|n| !n.starts_with("observation.images.empty_camera_")).collect()
    }

    /// Length of the robot's state vector, before padding.
    pub fn state_len(&self) -> Option<usize> {
        let f = self.inputs.iter().find(|f| f.name == "observation.state");
        f.and_then(|f| f.shape.first().copied())
    }

    /// Length of the robot's action vector, before padding.
    pub fn action_len(&self) -> Option<usize> {
        self.outputs.iter().find(|f| f.name == "action").and_then(|f| f.shape.first().copied())
    }

    /// The normalisation mode of a feature kind.
    pub fn normalization_of(&self, kind: &str) -> Option<&str> {
        self.normalization.iter().find(|(k, _)| k == kind).map(|(_, mode)| mode.as_str())
    }
}

/// The reference's shortest period of the time embedding.
pub(super) const MIN_PERIOD: f64 = 0.004;
/// The reference's longest period of the time embedding.
pub(super) const MAX_PERIOD: f64 = 4.0;
/// A count above this is a broken file, not a policy.
const MAX_COUNT: usize = 65_536;

/// Typed look-ups whose errors name file and key.
struct Keys<'a> {
    root: &'a Map<String, Value>,
    path: &'a Path,
}

impl Keys<'_> {
    fn refuse(&self, reason: String) -> ModelError {
        ModelError::File { path: PathBuf::from(self.path), reason }
    }

    fn typed<T: DeserializeOwned>(&self, key: &str, value: &Value) -> Result<T, ModelError> {
        serde_json::from_value(value.clone()).map_err(|e| self.refuse(format!("'{key}': {e}")))
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, ModelError> {
        match self.root.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => self.typed(key, value).map(Some),
        }
    }

    fn either<T: DeserializeOwned>(&self, key: &str, other: &str) -> Result<Option<T>, ModelError> {
        match self.get(key)? {
            Some(value) => Ok(Some(value)),
            None => self.get(other),
        }
    }

    fn normalization(&self) -> Result<Vec<(String, String)>, ModelError> {
        let map: Map<String, Value> = self.get("normalization_mapping")?.unwrap_or_default();
        map.iter().map(|(k, v)| Ok((k.clone(), self.typed("normalization_mapping", v)?))).collect()
    }

    fn features(&self, key: &str) -> Result<Vec<Feature>, ModelError> {
        let map: Map<String, Value> = self.get(key)?.unwrap_or_default();
        map.iter()
            .map(|(name, v)| {
                let key = format!("{key}.{name}");
                Ok(Feature {
                    name: name.clone(),
                    kind: self.typed(&format!("{key}.type"), v.get("type").unwrap_or(&Value::Null))?,
                    shape: self.typed(&format!("{key}.shape"), v.get("shape").unwrap_or(&Value::Null))?,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<PolicyConfig, ModelError> {
        PolicyConfig::parse(text, Path::new("config.json"))
    }

    #[test]
    fn both_origins_and_unknown_keys_are_read() {
        let lerobot = parse(
            r#"{"type":"pi0","chunk_size":8,"nobody_knows":[1],"tokenizer_max_length":12,
                "normalization_mapping":{"STATE":"MEAN_STD"},
                "input_features":{"observation.images.z":{"type":"VISUAL","shape":[3,2,2]},
                                  "observation.images.a":{"type":"VISUAL","shape":[3,2,2]},
                                  "observation.images.empty_camera_0":{"type":"VISUAL","shape":[3,2,2]},
                                  "observation.state":{"type":"STATE","shape":[7]}},
                "output_features":{"action":{"type":"ACTION","shape":[6]}}}"#,
        )
        .unwrap();
        assert_eq!(lerobot.cameras(), ["observation.images.z", "observation.images.a"], "the file's order, not a-z");
        assert_eq!((lerobot.state_len(), lerobot.action_len()), (Some(7), Some(6)));
        assert_eq!((lerobot.horizon, lerobot.max_tokens), (Some(8), Some(12)));
        assert_eq!(lerobot.normalization_of("STATE"), Some("MEAN_STD"));
        let openpi = parse(r#"{"action_dim":32,"action_horizon":10,"precision":"bfloat16"}"#).unwrap();
        assert_eq!((openpi.kind, openpi.horizon, openpi.max_action_dim), (None, Some(10), Some(32)));
    }

    #[test]
    fn a_bad_value_is_refused_by_its_key() {
        for (text, says) in [
            ("[]", "not a JSON object"),
            (r#"{"type":"act"}"#, "'type' is 'act'"),
            (r#"{"chunk_size":"8"}"#, "'chunk_size'"),
            (r#"{"chunk_size":0}"#, "'chunk_size or action_horizon' is 0"),
            (r#"{"max_state_dim":1000000000000}"#, "'max_state_dim' is 1000000000000"),
            (r#"{"min_period":4.0,"max_period":4.0}"#, "'min_period' 4"),
            (r#"{"use_visual_memory":true}"#, "'use_visual_memory' is true"),
            (r#"{"use_proprioceptive_memory":true}"#, "'use_proprioceptive_memory' is true"),
            (
                r#"{"input_features":{"observation.state":{"type":"STATE"}}}"#,
                "'input_features.observation.state.shape'",
            ),
        ] {
            let e = parse(text).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("config.json"), "{text}: {e}");
        }
    }
}
