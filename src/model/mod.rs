//! Everything about a checkpoint that is not arithmetic on a device: dimensions, tensors, tokenizer, image
//! preprocessing, normalisation and action transforms.

mod actions;
mod checkpoint;
mod compressed;
mod config;
mod error;
mod frame;
mod graph;
mod norm;
mod pixels;
mod policy;
mod preprocess;
mod stats;
pub mod synthetic;
mod tensor;
mod tokenizer;
mod yuv;

pub use actions::{ActionMode, ActionTransform};
pub use checkpoint::Checkpoint;
pub use config::{Feature, Origin, PolicyConfig};
pub use error::ModelError;
pub use frame::{Encoding, Frame};
pub use graph::{EXPERT, PROJECTOR, TRUNK, VISION, expected_tensors};
pub use norm::{NormMode, Normalizer};
pub use pixels::{Bytes, FrameMemory, Pixels};
pub use policy::{Policy, PolicyOptions};
pub use preprocess::{Preprocessor, Resampler};
pub use stats::{FeatureStats, NormStats, Processors};
pub use tensor::{Dtype, Tensor, Weight};
pub use tokenizer::PromptTokenizer;

/// The two model families, told apart by their tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// State as a token in the suffix; time mixed into the action tokens.
    Pi0,
    /// State in the prompt; time through adaptive norms.
    Pi05,
}

/// Dimensions of the SigLIP tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VisionDims {
    /// Transformer layers.
    pub layers: usize,
    /// Embedding width.
    pub width: usize,
    /// MLP width.
    pub mlp: usize,
    /// Attention heads; the head dimension is `width / heads`.
    pub heads: usize,
    /// Pixels a side of one patch.
    pub patch: usize,
    /// Pixels a side of the square input image.
    pub image: usize,
}

impl VisionDims {
    /// Tokens of one view.
    pub fn tokens(&self) -> usize {
        (self.image / self.patch).pow(2)
    }
}

/// Dimensions of one Gemma stack (prefix trunk or action expert). Keys and values have one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackDims {
    /// Transformer layers.
    pub layers: usize,
    /// Residual width.
    pub width: usize,
    /// MLP width.
    pub mlp: usize,
    /// Query heads.
    pub heads: usize,
    /// Dimension of one head, the same in both stacks.
    pub head_dim: usize,
}

/// Every dimension of a policy, read from tensor shapes and config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// π0 or π0.5.
    pub family: Family,
    /// SigLIP tower.
    pub vision: VisionDims,
    /// Prefix trunk ("Gemma-2B").
    pub trunk: StackDims,
    /// Action expert ("Gemma-300M").
    pub expert: StackDims,
    /// Rows of the token embedding table.
    pub vocab: usize,
    /// Padded state dimension of the model.
    pub state_dim: usize,
    /// Padded action dimension of the model.
    pub action_dim: usize,
    /// Actions a chunk.
    pub horizon: usize,
    /// Longest prompt in tokens.
    pub max_tokens: usize,
    /// Shortest period of the time embedding.
    pub min_period: f64,
    /// Longest period of the time embedding.
    pub max_period: f64,
}

impl Dims {
    /// Those of the published π0, with chunks of `horizon` actions.
    pub fn published(horizon: usize) -> Self {
        let stack = |width, mlp| StackDims { layers: 18, width, mlp, heads: 8, head_dim: 256 };
        Self {
            family: Family::Pi0,
            vision: VisionDims { layers: 27, width: 1152, mlp: 4304, heads: 16, patch: 14, image: 224 },
            trunk: stack(2048, 16384),
            expert: stack(1024, 4096),
            vocab: 257_152,
            state_dim: 32,
            action_dim: 32,
            horizon,
            max_tokens: 48,
            min_period: 0.004,
            max_period: 4.0,
        }
    }
}
