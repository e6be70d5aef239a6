//! The weights both stages read, shared by reference count; F32 weights stay in the mapped file.

use super::workers::Parallelism;

use super::math::{Adaptive, Modulation};
use super::matrix::{Into, Mat, MatMut, matmul};
use crate::engine::EngineError;
use crate::model::{Checkpoint, Dims, EXPERT, Family, ModelError, PROJECTOR, StackDims, TRUNK, Tensor, VISION, Weight};

/// `y = x · Wᵀ + b` with W `[outputs, inputs]`.
pub(super) struct Linear {
    pub(super) weight: Weight,
    pub(super) bias: Option<Weight>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

impl Linear {
    fn load(from: &Checkpoint, name: &str, outputs: usize, inputs: usize, bias: bool) -> Result<Self, ModelError> {
        let weight = from.tensor(&format!("{name}.weight"), &[outputs, inputs])?.to_f32();
        let bias = if bias { Some(vector(from, &format!("{name}.bias"), outputs)?) } else { None };
        Ok(Self { weight, bias, inputs, outputs })
    }

    /// Writes `y` `[rows, outputs]` from `x` `[rows, inputs]`.
    pub(super) fn apply(&self, threads: Parallelism, rows: usize, x: &[f32], y: &mut [f32]) {
        self.product(threads, rows, x, y, Into::Set);
        if let Some(bias) = &self.bias {
            add_bias(y, bias);
        }
    }

    /// Adds `x · Wᵀ + b` to `y`.
    pub(super) fn add_to(&self, threads: Parallelism, rows: usize, x: &[f32], y: &mut [f32]) {
        self.product(threads, rows, x, y, Into::Add);
        if let Some(bias) = &self.bias {
            add_bias(y, bias);
        }
    }

    fn product(&self, threads: Parallelism, rows: usize, x: &[f32], y: &mut [f32], into: Into) {
        matmul(
            MatMut::new(y, rows, self.outputs),
            into,
            1.0,
            Mat::new(x, rows, self.inputs),
            Mat::new(&self.weight, self.outputs, self.inputs).t(),
            threads,
        );
    }
}

/// Adds `bias` to every row of `y`.
pub(super) fn add_bias(y: &mut [f32], bias: &[f32]) {
    for row in y.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

fn vector(from: &Checkpoint, name: &str, len: usize) -> Result<Weight, ModelError> {
    Ok(from.tensor(name, &[len])?.to_f32())
}

/// LayerNorm of the vision tower.
pub(super) struct LayerNorm {
    pub(super) weight: Weight,
    pub(super) bias: Weight,
}

impl LayerNorm {
    fn load(from: &Checkpoint, name: &str, width: usize) -> Result<Self, ModelError> {
        Ok(Self {
            weight: vector(from, &format!("{name}.weight"), width)?,
            bias: vector(from, &format!("{name}.bias"), width)?,
        })
    }
}

/// One SigLIP layer.
pub(super) struct VisionLayer {
    pub(super) norm1: LayerNorm,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) out: Linear,
    pub(super) norm2: LayerNorm,
    pub(super) fc1: Linear,
    pub(super) fc2: Linear,
}

/// The SigLIP tower and the projector into the trunk.
pub(super) struct VisionWeights {
    /// The patch convolution as a product: inputs in the order (channel, y, x).
    pub(super) patch: Linear,
    /// `[tokens, width]`.
    pub(super) positions: Weight,
    pub(super) layers: Vec<VisionLayer>,
    pub(super) post_norm: LayerNorm,
    pub(super) projector: Linear,
}

impl VisionWeights {
    fn load(from: &Checkpoint, dims: &Dims) -> Result<Self, ModelError> {
        let d = dims.vision;
        let patch_name = format!("{VISION}.embeddings.patch_embedding");
        let patch = Linear {
            weight: from.tensor(&format!("{patch_name}.weight"), &[d.width, 3, d.patch, d.patch])?.to_f32(),
            bias: Some(vector(from, &format!("{patch_name}.bias"), d.width)?),
            inputs: 3 * d.patch * d.patch,
            outputs: d.width,
        };
        let layer = |n: usize| -> Result<VisionLayer, ModelError> {
            let at = format!("{VISION}.encoder.layers.{n}.");
            let square = |name| Linear::load(from, &format!("{at}self_attn.{name}"), d.width, d.width, true);
            Ok(VisionLayer {
                norm1: LayerNorm::load(from, &format!("{at}layer_norm1"), d.width)?,
                q: square("q_proj")?,
                k: square("k_proj")?,
                v: square("v_proj")?,
                out: square("out_proj")?,
                norm2: LayerNorm::load(from, &format!("{at}layer_norm2"), d.width)?,
                fc1: Linear::load(from, &format!("{at}mlp.fc1"), d.mlp, d.width, true)?,
                fc2: Linear::load(from, &format!("{at}mlp.fc2"), d.width, d.mlp, true)?,
            })
        };
        Ok(Self {
            patch,
            positions: from
                .tensor(&format!("{VISION}.embeddings.position_embedding.weight"), &[d.tokens(), d.width])?
                .to_f32(),
            layers: (0..d.layers).map(layer).collect::<Result<_, _>>()?,
            post_norm: LayerNorm::load(from, &format!("{VISION}.post_layernorm"), d.width)?,
            projector: Linear::load(from, PROJECTOR, dims.trunk.width, d.width, true)?,
        })
    }
}

/// A norm of a Gemma stack.
pub(super) enum GemmaNorm {
    /// Its weight w; the norm multiplies with 1 + w.
    Plain(Weight),
    /// `[scale | shift | gate]` from the time condition (π0.5's expert).
    Adaptive(Linear),
}

impl GemmaNorm {
    fn load(from: &Checkpoint, name: &str, width: usize, adaptive: bool) -> Result<Self, ModelError> {
        Ok(if adaptive {
            GemmaNorm::Adaptive(Linear::load(from, &format!("{name}.dense"), 3 * width, width, true)?)
        } else {
            GemmaNorm::Plain(vector(from, &format!("{name}.weight"), width)?)
        })
    }

    /// What this norm does; `row` is the `[scale | shift | gate]` worked out for it, unused by a plain norm.
    pub(super) fn modulation<'a>(&'a self, row: &'a [f32]) -> Modulation<'a> {
        match self {
            GemmaNorm::Plain(weight) => Modulation { scale: weight, adaptive: None },
            GemmaNorm::Adaptive(dense) => {
                let (scale, rest) = row.split_at(dense.inputs);
                let (shift, gate) = rest.split_at(dense.inputs);
                Modulation { scale, adaptive: Some(Adaptive { shift, gate }) }
            }
        }
    }
}

/// One Gemma layer: multi-query attention and a gated MLP.
pub(super) struct GemmaLayer {
    pub(super) input_norm: GemmaNorm,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    pub(super) post_norm: GemmaNorm,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

fn gemma_layers(from: &Checkpoint, stack: &str, d: StackDims, adaptive: bool) -> Result<Vec<GemmaLayer>, ModelError> {
    let layer = |n: usize| -> Result<GemmaLayer, ModelError> {
        let at = format!("{stack}.layers.{n}.");
        let linear = |name: &str, outputs, inputs| Linear::load(from, &format!("{at}{name}"), outputs, inputs, false);
        let norm = |name| GemmaNorm::load(from, &format!("{at}{name}"), d.width, adaptive);
        let queries = d.heads * d.head_dim;
        Ok(GemmaLayer {
            input_norm: norm("input_layernorm")?,
            q: linear("self_attn.q_proj", queries, d.width)?,
            k: linear("self_attn.k_proj", d.head_dim, d.width)?,
            v: linear("self_attn.v_proj", d.head_dim, d.width)?,
            o: linear("self_attn.o_proj", d.width, queries)?,
            post_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", d.mlp, d.width)?,
            up: linear("mlp.up_proj", d.mlp, d.width)?,
            down: linear("mlp.down_proj", d.width, d.mlp)?,
        })
    };
    (0..d.layers).map(layer).collect()
}

/// How time and state enter the suffix.
pub(super) enum SuffixWeights {
    /// π0: the state is a token, time is mixed into the action tokens.
    Pi0 { state: Linear, mlp_in: Linear, mlp_out: Linear },
    /// π0.5: time goes through the adaptive norms.
    Pi05 { mlp_in: Linear, mlp_out: Linear },
}

/// Everything the encoder reads.
pub(super) struct EncoderWeights {
    pub(super) vision: VisionWeights,
    /// Rows are fetched from the file when a prompt needs them.
    pub(super) token_table: Tensor,
    pub(super) trunk: Vec<GemmaLayer>,
}

impl EncoderWeights {
    pub(super) fn load(from: &Checkpoint) -> Result<Self, ModelError> {
        let dims = from.dims();
        Ok(Self {
            vision: VisionWeights::load(from, dims)?,
            token_table: from.token_table()?,
            trunk: gemma_layers(from, TRUNK, dims.trunk, false)?,
        })
    }
}

/// Everything the decoder reads.
pub(super) struct DecoderWeights {
    pub(super) action_in: Linear,
    pub(super) suffix: SuffixWeights,
    pub(super) expert: Vec<GemmaLayer>,
    pub(super) final_norm: GemmaNorm,
    pub(super) action_out: Linear,
}

impl DecoderWeights {
    pub(super) fn load(from: &Checkpoint) -> Result<Self, ModelError> {
        let dims = from.dims();
        let (width, action_dim) = (dims.expert.width, dims.action_dim);
        let adaptive = dims.family == Family::Pi05;
        let linear = |name, outputs, inputs| Linear::load(from, name, outputs, inputs, true);
        Ok(Self {
            action_in: linear("action_in_proj", width, action_dim)?,
            suffix: match dims.family {
                Family::Pi0 => SuffixWeights::Pi0 {
                    state: linear("state_proj", width, dims.state_dim)?,
                    mlp_in: linear("action_time_mlp_in", width, 2 * width)?,
                    mlp_out: linear("action_time_mlp_out", width, width)?,
                },
                Family::Pi05 => SuffixWeights::Pi05 {
                    mlp_in: linear("time_mlp_in", width, width)?,
                    mlp_out: linear("time_mlp_out", width, width)?,
                },
            },
            expert: gemma_layers(from, EXPERT, dims.expert, adaptive)?,
            final_norm: GemmaNorm::load(from, &format!("{EXPERT}.norm"), width, adaptive)?,
            action_out: linear("action_out_proj", action_dim, width)?,
        })
    }
}

/// What the product relies on and the tensors alone do not promise.
pub(super) fn check(dims: &Dims) -> Result<(), EngineError> {
    let refuse = |what, expected: String, found: String| Err(EngineError::Shape { what, expected, found });
    let (trunk, expert, vision) = (dims.trunk, dims.expert, dims.vision);
    if (trunk.layers, trunk.head_dim) != (expert.layers, expert.head_dim) {
        // Expert layer n reads the keys of trunk layer n.
        return refuse(
            "action expert",
            format!("{} layers with heads of {} as the trunk has", trunk.layers, trunk.head_dim),
            format!("{} layers with heads of {}", expert.layers, expert.head_dim),
        );
    }
    for (what, value) in [
        ("trunk layers", trunk.layers),
        ("trunk heads", trunk.heads),
        ("expert heads", expert.heads),
        ("vision heads", vision.heads),
        ("vision patch", vision.patch),
        ("image tokens", vision.image.checked_div(vision.patch).unwrap_or(0)),
        ("horizon", dims.horizon),
        ("action dimension", dims.action_dim),
    ] {
        if value == 0 {
            return refuse(what, "at least 1".into(), "0".into());
        }
    }
    if !vision.width.is_multiple_of(vision.heads) {
        return refuse("vision heads", format!("a divisor of the width {}", vision.width), vision.heads.to_string());
    }
    if !trunk.head_dim.is_multiple_of(2) || trunk.head_dim == 0 {
        return refuse("head dimension", "an even number (rotary halves)".into(), trunk.head_dim.to_string());
    }
    if !expert.width.is_multiple_of(2) || expert.width < 4 {
        return refuse("expert width", "an even number from 4 (sine and cosine)".into(), expert.width.to_string());
    }
    Ok(())
}
