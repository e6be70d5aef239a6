//! Normalisation statistics, wherever the training stacks leave them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Map, Value};

use super::norm::LEROBOT_EPS;
use super::{Checkpoint, ModelError};

/// Statistics of one feature by name: `mean`, `std`, `q01`, …
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FeatureStats {
    /// The file they came from.
    pub source: PathBuf,
    /// The feature's name there.
    pub name: String,
    /// One vector for each statistic.
    pub values: BTreeMap<String, Vec<f64>>,
}

impl FeatureStats {
    /// The first `len` values of a statistic, all finite.
    pub fn finite(&self, statistic: &str, len: usize) -> Result<&[f64], ModelError> {
        let refuse = |reason| ModelError::File { path: self.source.clone(), reason };
        let all = self.values.get(statistic).ok_or_else(|| {
            let has: Vec<&str> = self.values.keys().map(String::as_str).collect();
            refuse(format!("{}.{statistic} is missing (there is {})", self.name, has.join(", ")))
        })?;
        let cut = all.get(..len).ok_or_else(|| {
            refuse(format!("{}.{statistic}: expected at least {len} values, found {}", self.name, all.len()))
        })?;
        match cut.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(refuse(format!(
                "{}.{statistic}[{i}] is {}: these statistics were never computed; give others",
                self.name, cut[i]
            ))),
            None => Ok(cut),
        }
    }
}

/// Statistics of state and actions.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NormStats {
    /// Of the joint state.
    pub state: FeatureStats,
    /// Of the actions (of the differences, where actions are relative).
    pub action: FeatureStats,
}

/// The step of LeRobot's processor that makes actions relative.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RelativeStep {
    /// Whether it does.
    pub enabled: bool,
    /// Name fragments of joints that stay absolute.
    pub exclude_joints: Vec<String>,
    /// Names of the action dimensions.
    pub action_names: Option<Vec<String>>,
}

/// What `policy_preprocessor.json` says, which is what LeRobot executes.
#[derive(Debug, Clone, PartialEq)]
pub struct Processors {
    /// Feature kind to normalisation mode.
    pub norm_map: Vec<(String, String)>,
    /// Guard against a division by zero.
    pub eps: f64,
    /// The relative-actions step, if there is one.
    pub relative: Option<RelativeStep>,
    /// File with the statistics.
    pub state_file: Option<PathBuf>,
}

impl Default for Processors {
    fn default() -> Self {
        Self { norm_map: Vec::new(), eps: LEROBOT_EPS, relative: None, state_file: None }
    }
}

const PREPROCESSOR: &str = "policy_preprocessor.json";
const POSTPROCESSOR: &str = "policy_postprocessor.json";
/// Names of the two features: LeRobot's, openpi's.
const NAMES: [[&str; 2]; 2] = [["observation.state", "action"], ["state", "actions"]];
/// How deep an asset id such as `physical-intelligence/libero` may lie below `assets/`.
const ASSET_DEPTH: usize = 4;

impl Processors {
    /// Reads `policy_preprocessor.json` of a directory; the defaults if there is none.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join(PREPROCESSOR);
        if !path.is_file() {
            return Ok(Self::default());
        }
        Self::parse(&path, "normalizer_processor")
    }

    fn parse(path: &Path, normalizer: &str) -> Result<Self, ModelError> {
        let refuse = |reason: String| ModelError::File { path: path.into(), reason };
        let root = read_json(path)?;
        let steps = root.get("steps").and_then(Value::as_array);
        let steps = steps.ok_or_else(|| refuse("'steps': expected an array".into()))?;
        let mut found = Self::default();
        for step in steps {
            let config = step.get("config").and_then(Value::as_object);
            let Some(config) = config else { continue };
            let name = step.get("registry_name").and_then(Value::as_str).unwrap_or_default();
            if name == normalizer {
                for (kind, mode) in config.get("norm_map").and_then(Value::as_object).into_iter().flatten() {
                    let mode = mode.as_str();
                    let mode = mode.ok_or_else(|| refuse(format!("'norm_map.{kind}': expected a string")))?;
                    found.norm_map.push((kind.clone(), mode.into()));
                }
                if let Some(eps) = config.get("eps") {
                    let eps = eps.as_f64().filter(|e| *e >= 0.0 && e.is_finite());
                    found.eps = eps.ok_or_else(|| refuse("'eps': expected a number of zero or more".into()))?;
                }
                if let Some(file) = step.get("state_file").filter(|f| !f.is_null()) {
                    let plain = file.as_str().filter(|f| Path::new(f).file_name().is_some_and(|n| n == *f));
                    let plain =
                        plain.ok_or_else(|| refuse(format!("'state_file': expected a file name, found {file}")))?;
                    found.state_file = Some(path.with_file_name(plain));
                }
            } else if name == "relative_actions_processor" {
                found.relative = Some(RelativeStep {
                    enabled: config.get("enabled").and_then(Value::as_bool).unwrap_or(false),
                    exclude_joints: strings(config.get("exclude_joints")).unwrap_or_default(),
                    action_names: strings(config.get("action_names")),
                });
            }
        }
        Ok(found)
    }
}

impl NormStats {
    /// The statistics of a checkpoint: those `given` (a file or a directory) or, without that, those beside or inside
    /// the checkpoint. An error lists where was looked.
    pub fn find(checkpoint: &Checkpoint, dir: &Path, given: Option<&Path>) -> Result<Self, ModelError> {
        let mut looked = Vec::new();
        if let Some(path) = given {
            if !path.is_dir() {
                return Self::read(path);
            }
            if let Some(stats) = Self::in_dir(path, &mut looked)? {
                return Ok(stats);
            }
            return Err(nothing(path, &looked));
        }
        if let Some(stats) = Self::in_dir(dir, &mut looked)? {
            return Ok(stats);
        }
        if let Some(stats) = Self::in_weights(checkpoint)? {
            return Ok(stats);
        }
        looked.push(format!("buffers 'normalize_inputs.*' in {}", checkpoint.file().display()));
        Err(nothing(dir, &looked))
    }

    /// Reads one file: openpi's `norm_stats.json`, LeRobot's processor JSON or its state file, or a dataset's
    /// `stats.json`.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        if path.extension().is_some_and(|e| e == "safetensors") {
            return Self::from_flat(path, &read_vectors(path)?);
        }
        let root = read_json(path)?;
        if root.contains_key("steps") {
            let file = Processors::parse(path, "normalizer_processor")?.state_file;
            let reason = "its 'normalizer_processor' names no 'state_file': it was saved without statistics".into();
            return Self::read(&file.ok_or_else(|| ModelError::File { path: path.into(), reason })?);
        }
        let nested = root.get("norm_stats").and_then(Value::as_object);
        Self::from_json(path, nested.unwrap_or(&root))
    }

    fn in_dir(dir: &Path, looked: &mut Vec<String>) -> Result<Option<Self>, ModelError> {
        let processor = dir.join(PREPROCESSOR);
        if processor.is_file() {
            if let Some(file) = Processors::parse(&processor, "normalizer_processor")?.state_file {
                let mut stats = Self::read(&file)?;
                // What un-normalises is the other file's business, should it differ.
                let post = dir.join(POSTPROCESSOR);
                if post.is_file()
                    && let Some(file) = Processors::parse(&post, "unnormalizer_processor")?.state_file
                {
                    stats.action = feature(&file, &read_vectors(&file)?, NAMES[0][1])?;
                }
                return Ok(Some(stats));
            }
            looked.push(format!("{PREPROCESSOR} (its normalizer names no 'state_file')"));
        } else {
            looked.push(PREPROCESSOR.into());
        }
        for name in ["norm_stats.json", "stats.json", "meta/stats.json"] {
            let path = dir.join(name);
            if path.is_file() {
                return Self::read(&path).map(Some);
            }
            looked.push(name.into());
        }
        let mut assets = Vec::new();
        find_assets(&dir.join("assets"), ASSET_DEPTH, &mut assets);
        assets.sort();
        looked.push("assets/**/norm_stats.json".into());
        match assets.as_slice() {
            [] => Ok(None),
            [one] => Self::read(one).map(Some),
            many => {
                let many: Vec<String> = many.iter().map(|p| p.display().to_string()).collect();
                let reason = format!("holds statistics of several robots; give one of them: {}", many.join(", "));
                Err(ModelError::File { path: dir.into(), reason })
            }
        }
    }

    /// Buffers inside the weights, as LeRobot saved them before September 2025.
    fn in_weights(checkpoint: &Checkpoint) -> Result<Option<Self>, ModelError> {
        let read = |modules: &[&str], name: &str| -> Result<FeatureStats, ModelError> {
            let mut stats =
                FeatureStats { source: checkpoint.file().into(), name: modules[0].into(), values: BTreeMap::new() };
            for module in modules {
                for statistic in ["mean", "std", "min", "max", "q01", "q99"] {
                    if let Some(t) = checkpoint.extra_tensor(&format!("{module}.{name}.{statistic}"))? {
                        stats.name = format!("{module}.{name}");
                        let values = t.to_f32().iter().map(|v| f64::from(*v)).collect();
                        stats.values.entry(statistic.into()).or_insert(values);
                    }
                }
            }
            Ok(stats)
        };
        let state = read(&["normalize_inputs"], "buffer_observation_state")?;
        let action = read(&["unnormalize_outputs", "normalize_targets"], "buffer_action")?;
        Ok((!state.values.is_empty() && !action.values.is_empty()).then_some(Self { state, action }))
    }

    fn from_flat(path: &Path, vectors: &BTreeMap<String, Vec<f64>>) -> Result<Self, ModelError> {
        Ok(Self { state: feature(path, vectors, NAMES[0][0])?, action: feature(path, vectors, NAMES[0][1])? })
    }

    fn from_json(path: &Path, root: &Map<String, Value>) -> Result<Self, ModelError> {
        let refuse = |reason: String| ModelError::File { path: path.into(), reason };
        let names = NAMES.into_iter().find(|[state, _]| root.contains_key(*state)).ok_or_else(|| {
            refuse(format!("no statistics: expected '{}' (openpi) or '{}' (LeRobot)", NAMES[1][0], NAMES[0][0]))
        })?;
        let read = |name: &str| -> Result<FeatureStats, ModelError> {
            let map = root.get(name).and_then(Value::as_object);
            let map = map.ok_or_else(|| refuse(format!("'{name}': expected an object of statistics")))?;
            let mut values = BTreeMap::new();
            for (statistic, list) in map.iter().filter(|(_, v)| !v.is_null()) {
                // Counts and the like are no vectors; what a mode needs and is not here is missed by its name.
                if let Ok(list) = serde_json::from_value::<Vec<Option<f64>>>(list.clone()) {
                    values.insert(statistic.clone(), list.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect());
                }
            }
            Ok(FeatureStats { source: path.into(), name: name.into(), values })
        };
        Ok(Self { state: read(names[0])?, action: read(names[1])? })
    }
}

fn feature(path: &Path, vectors: &BTreeMap<String, Vec<f64>>, name: &str) -> Result<FeatureStats, ModelError> {
    let of = |(key, v): (&String, &Vec<f64>)| {
        let statistic = key.strip_prefix(name)?.strip_prefix('.')?;
        Some((statistic.to_owned(), v.clone()))
    };
    let values: BTreeMap<_, _> = vectors.iter().filter_map(of).collect();
    if values.is_empty() {
        return Err(ModelError::File { path: path.into(), reason: format!("no tensor '{name}.*' of statistics") });
    }
    Ok(FeatureStats { source: path.into(), name: name.into(), values })
}

fn nothing(dir: &Path, looked: &[String]) -> ModelError {
    ModelError::File {
        path: dir.into(),
        reason: format!(
            "no normalisation statistics, without which actions have no unit; looked for {}. Name them by \
             the parameter norm_stats (openpi's norm_stats.json, LeRobot's processor JSON or its \
             .safetensors, or the training dataset's meta/stats.json)",
            looked.join(", ")
        ),
    }
}

fn find_assets(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        if path.is_dir() && depth > 0 {
            find_assets(&path, depth - 1, found);
        } else if path.file_name().is_some_and(|n| n == "norm_stats.json") {
            found.push(path);
        }
    }
}

fn strings(value: Option<&Value>) -> Option<Vec<String>> {
    value?.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect()
}

fn read_json(path: &Path) -> Result<Map<String, Value>, ModelError> {
    let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
    serde_json::from_str(&text).map_err(|e| {
        // Python writes these two, JSON has neither.
        let hint = if text.contains("NaN") || text.contains("Infinity") {
            "; it holds NaN or Infinity: compute the statistics again"
        } else {
            ""
        };
        ModelError::File { path: path.into(), reason: format!("not a JSON object: {e}{hint}") }
    })
}

/// Every floating-point tensor of a small safetensors file, flattened.
fn read_vectors(path: &Path) -> Result<BTreeMap<String, Vec<f64>>, ModelError> {
    let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| ModelError::File { path: path.into(), reason: format!("not a safetensors file: {e}") })?;
    let mut vectors = BTreeMap::new();
    for (name, tensor) in file.iter() {
        let data = tensor.data();
        let values: Vec<f64> = match tensor.dtype() {
            safetensors::Dtype::F64 => data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            safetensors::Dtype::F32 => {
                data.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            }
            safetensors::Dtype::BF16 => {
                data.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f64()).collect()
            }
            _ => continue,
        };
        vectors.insert(name.to_owned(), values);
    }
    Ok(vectors)
}
