//! A policy as the pipeline sees it: robot units and text outside, normalised vectors and token ids inside.

use std::path::{Path, PathBuf};

use super::actions::{self, ActionMode, ActionTransform};
use super::norm::{NormMode, Normalizer};
use super::stats::{FeatureStats, NormStats, Processors};
use super::{Checkpoint, Dims, Family, ModelError, Origin, PolicyConfig, Preprocessor, PromptTokenizer};

/// What a user may say about a policy beside its checkpoint.
#[derive(Debug, Clone, Default)]
pub struct PolicyOptions {
    /// `tokenizer.json` or its directory; beside the checkpoint if not given.
    pub tokenizer: Option<PathBuf>,
    /// Statistics, a file or a directory; beside or inside the checkpoint if not given.
    pub norm_stats: Option<PathBuf>,
    /// Whether actions are relative to the state.
    pub action_mode: ActionMode,
    /// Dimensions of the action that are absolute whatever the others are.
    pub absolute_actions: Vec<usize>,
}

/// openpi's camera slots, in the model's order.
const OPENPI_SLOTS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];

/// Everything between the robot and the engine except the arithmetic of the model.
#[derive(Debug)]
pub struct Policy {
    dims: Dims,
    origin: Origin,
    cameras: Vec<String>,
    action_names: Option<Vec<String>>,
    tokenizer: PromptTokenizer,
    state_in_prompt: bool,
    state: Normalizer,
    actions: ActionTransform,
}

impl Policy {
    /// The policy of a checkpoint; `dir` is where tokenizer and statistics are looked for.
    pub fn open(checkpoint: &Checkpoint, dir: &Path, options: &PolicyOptions) -> Result<Self, ModelError> {
        let (dims, config, origin) = (checkpoint.dims(), checkpoint.config(), checkpoint.origin());
        let processors = Processors::read(dir)?;
        let [state_mode, action_mode] = ["STATE", "ACTION"].map(|kind| mode(kind, config, &processors, dims, origin));
        let (state_mode, action_mode) = (state_mode?, action_mode?);
        let stats = if (state_mode, action_mode) == (NormMode::Identity, NormMode::Identity) {
            NormStats::default()
        } else {
            NormStats::find(checkpoint, dir, options.norm_stats.as_deref())?
        };
        let state_len = length(config.state_len(), &stats.state, state_mode, dims.state_dim, "observation.state", dir)?;
        let action_len = length(config.action_len(), &stats.action, action_mode, dims.action_dim, "action", dir)?;
        let norm = |stats, mode, len| Normalizer::new(stats, mode, len, origin, processors.eps);
        let relative = actions::relative_mask(
            config,
            &processors,
            origin,
            options.action_mode,
            &options.absolute_actions,
            action_len,
        )?;
        if checkpoint.state_in_prompt_is_assumed() {
            tracing::warn!(
                "{}: 'discrete_state_input' is not given: the state is written into the prompt; write false there if the \
                 policy was trained without",
                dir.join("config.json").display()
            );
        }
        Ok(Self {
            dims: *dims,
            origin,
            cameras: cameras(config, origin, dir)?,
            action_names: actions::action_names(config, &processors).map(<[String]>::to_vec),
            tokenizer: PromptTokenizer::open(&tokenizer_file(dir, options.tokenizer.as_deref())?)?,
            state_in_prompt: dims.family == Family::Pi05 && config.discrete_state_input != Some(false),
            state: norm(&stats.state, state_mode, state_len)?,
            actions: ActionTransform::new(
                norm(&stats.action, action_mode, action_len)?,
                relative,
                dims.action_dim,
                state_len,
            )?,
        })
    }

    /// The model's dimensions.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// Who trained it.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Image keys in the model's order; a view that is not there is left out, the others keep their order.
    pub fn cameras(&self) -> &[String] {
        &self.cameras
    }

    /// Names of the action dimensions, where the checkpoint has them.
    pub fn action_names(&self) -> Option<&[String]> {
        self.action_names.as_deref()
    }

    /// Values of the robot's state, before padding.
    pub fn state_len(&self) -> usize {
        self.state.len()
    }

    /// Values of one robot action, before padding.
    pub fn action_len(&self) -> usize {
        self.actions.len()
    }

    /// Which actions are relative to the state at the chunk's start.
    pub fn relative_actions(&self) -> &[bool] {
        self.actions.relative()
    }

    /// A preprocessor for this policy's images; each camera wants its own.
    pub fn preprocessor(&self) -> Preprocessor {
        Preprocessor::new(self.dims.vision.image, self.origin.into())
    }

    /// Whether [`tokens`](Self::tokens) depends on the state, so that a prompt must be tokenised for each observation.
    pub fn state_in_prompt(&self) -> bool {
        self.state_in_prompt
    }

    /// Token ids of a prompt, cut at the right to the longest prompt of the policy. `state` is in robot units; π0.5
    /// writes it into the prompt, π0 does not read it.
    pub fn tokens(&self, prompt: &str, state: &[f64]) -> Result<Vec<u32>, ModelError> {
        let mut ids = if self.state_in_prompt {
            self.check_state(state)?;
            let normalized: Vec<f64> = state.iter().enumerate().map(|(i, x)| self.state.normalize(i, *x)).collect();
            self.tokenizer.pi05(prompt, &normalized)?
        } else {
            self.tokenizer.pi0(prompt, self.origin)?
        };
        if ids.len() > self.dims.max_tokens {
            tracing::warn!("the prompt has {} tokens and is cut to {}", ids.len(), self.dims.max_tokens);
            ids.truncate(self.dims.max_tokens);
        }
        match ids.iter().find(|id| **id as usize >= self.dims.vocab) {
            Some(id) => Err(ModelError::File {
                path: self.tokenizer.path().into(),
                reason: format!(
                    "gives token {id}, but the policy has {} rows of embeddings: it is another model's tokenizer",
                    self.dims.vocab
                ),
            }),
            None => Ok(ids),
        }
    }

    /// Writes the normalised state into `out` (`state_dim` values), zeros after the real ones. Does not allocate.
    pub fn normalize_state(&self, state: &[f64], out: &mut [f32]) -> Result<(), ModelError> {
        self.check_state(state)?;
        if out.len() != self.dims.state_dim {
            let (expected, found) = (self.dims.state_dim, out.len());
            return Err(ModelError::Length { what: "normalised state", expected, found });
        }
        out.fill(0.0);
        for (i, (x, y)) in state.iter().zip(out).enumerate() {
            *y = self.state.normalize(i, *x) as f32;
        }
        Ok(())
    }

    /// `[n, action_dim]` of the model to `[n, action_len]` in robot units, absolute; `state` is the one the chunk was
    /// decoded from. Values are not checked: what is not finite stays so. Does not allocate.
    pub fn to_robot(&self, actions: &[f32], state: &[f64], out: &mut [f64]) -> Result<(), ModelError> {
        self.check_state(state)?;
        self.actions.to_robot(actions, state, out)
    }

    /// `[n, action_len]` in robot units, absolute, to `[n, action_dim]` of the model, zero-padded; relative actions are
    /// anchored at `state`. Does not allocate.
    pub fn to_model(&self, actions: &[f64], state: &[f64], out: &mut [f32]) -> Result<(), ModelError> {
        self.check_state(state)?;
        self.actions.to_model(actions, state, out)
    }

    fn check_state(&self, state: &[f64]) -> Result<(), ModelError> {
        if state.len() != self.state.len() {
            return Err(ModelError::Length { what: "joint state", expected: self.state.len(), found: state.len() });
        }
        match state.iter().position(|x| !x.is_finite()) {
            Some(index) => Err(ModelError::NotFinite { what: "joint state", index, value: state[index] }),
            None => Ok(()),
        }
    }
}

/// The normalisation mode of a feature kind: the processor's, config.json's, or the family's default.
fn mode(
    kind: &str,
    config: &PolicyConfig,
    processors: &Processors,
    dims: &Dims,
    origin: Origin,
) -> Result<NormMode, ModelError> {
    let default = match dims.family {
        Family::Pi0 => NormMode::MeanStd,
        Family::Pi05 => NormMode::Quantiles,
    };
    if origin == Origin::OpenPi {
        return Ok(default);
    }
    let executed = processors.norm_map.iter().find(|(k, _)| k == kind).map(|(_, m)| m.as_str());
    match executed.or_else(|| config.normalization_of(kind)) {
        None => Ok(default),
        Some(name) => NormMode::from_name(name).ok_or_else(|| ModelError::Setting {
            setting: "normalization_mapping",
            reason: format!("'{name}' of {kind} is not one of IDENTITY, MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10"),
        }),
    }
}

/// Real values of a vector: as config.json says, else as long as its statistics.
fn length(
    configured: Option<usize>,
    stats: &FeatureStats,
    mode: NormMode,
    padded: usize,
    feature: &str,
    dir: &Path,
) -> Result<usize, ModelError> {
    let from_stats = || {
        let [first, second] = mode.statistics()?;
        let (low, high) = (stats.values.get(first)?, stats.values.get(second)?);
        let mut len = low.len().min(high.len());
        // Statistics computed after padding: the padding is what is zero throughout.
        if len >= padded {
            len = padded;
            while len > 0 && low[len - 1] == 0.0 && high[len - 1] == 0.0 {
                len -= 1;
            }
        }
        Some(len)
    };
    match configured.or_else(from_stats) {
        Some(n) if (1..=padded).contains(&n) => Ok(n),
        other => Err(ModelError::File {
            path: dir.join("config.json"),
            reason: format!(
                "the length of '{feature}' is {}: expected 1 to {padded}, from config.json's features or the statistics",
                other.map_or("not given".into(), |n| n.to_string())
            ),
        }),
    }
}

fn cameras(config: &PolicyConfig, origin: Origin, dir: &Path) -> Result<Vec<String>, ModelError> {
    match (config.cameras(), origin) {
        (names, _) if !names.is_empty() => Ok(names),
        (_, Origin::OpenPi) => Ok(OPENPI_SLOTS.map(Into::into).into()),
        (_, Origin::LeRobot) => Err(ModelError::File {
            path: dir.join("config.json"),
            reason: "'input_features' lists no VISUAL feature: which cameras the policy sees is not known".into(),
        }),
    }
}

fn tokenizer_file(dir: &Path, given: Option<&Path>) -> Result<PathBuf, ModelError> {
    let candidates = match given {
        Some(path) if path.is_dir() => vec![path.join("tokenizer.json")],
        Some(path) => return Ok(path.into()),
        None => vec![dir.join("tokenizer.json"), dir.join("tokenizer/tokenizer.json")],
    };
    candidates.iter().find(|p| p.is_file()).cloned().ok_or_else(|| {
        let looked: Vec<String> = candidates.iter().map(|p| p.display().to_string()).collect();
        ModelError::File {
            path: given.unwrap_or(dir).into(),
            reason: format!(
                "no tokenizer; looked for {}. Put the tokenizer.json of google/paligemma-3b-pt-224 there (accept its \
                 licence on huggingface.co once), or name it by the parameter tokenizer",
                looked.join(", ")
            ),
        }
    })
}
