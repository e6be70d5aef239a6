//! Which tensors a policy is made of: canonical names, dimensions from shapes, and the full list with shapes.
//!
//! Canonical names are those of openpi's PyTorch port without LeRobot's leading `model.`.

use std::path::Path;

use super::config::{MAX_PERIOD, MIN_PERIOD};
use super::{Dims, Family, ModelError, PolicyConfig, StackDims, VisionDims};

/// Prefix of the SigLIP tower's tensors.
pub const VISION: &str = "paligemma_with_expert.paligemma.model.vision_tower.vision_model";
/// Prefix of the linear layer between tower and trunk.
pub const PROJECTOR: &str = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear";
/// Prefix of the prefix trunk's tensors.
pub const TRUNK: &str = "paligemma_with_expert.paligemma.model.language_model";
/// Prefix of the action expert's tensors.
pub const EXPERT: &str = "paligemma_with_expert.gemma_expert.model";
/// The token table under its two names; the first that is there is used. They are tied in every known file.
pub const TOKEN_TABLES: [&str; 2] = [
    "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
    "paligemma_with_expert.paligemma.lm_head.weight",
];

/// SigLIP heads where config.json is silent (So400m).
const VISION_HEADS: usize = 16;
/// Chunk length where config.json is silent.
const HORIZON: usize = 50;

/// The canonical form of a name in a file: LeRobot's `model.` stripped, older trees moved to today's places.
pub(super) fn canonical(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    const PALIGEMMA: &str = "paligemma_with_expert.paligemma.";
    let Some(rest) = name.strip_prefix(PALIGEMMA) else { return name.into() };
    if let Some(head) = rest.strip_prefix("language_model.lm_head.") {
        return format!("{PALIGEMMA}lm_head.{head}");
    }
    let rest = rest.strip_prefix("model.").unwrap_or(rest);
    for (module, dropped) in [("vision_tower.", "vision_model."), ("language_model.", "model.")] {
        let Some(inner) = rest.strip_prefix(module) else { continue };
        let inner = inner.strip_prefix(dropped).unwrap_or(inner);
        let kept = if module == "vision_tower." { dropped } else { "" };
        return format!("{PALIGEMMA}model.{module}{kept}{inner}");
    }
    if rest.starts_with("multi_modal_projector.") {
        return format!("{PALIGEMMA}model.{rest}");
    }
    name.into()
}

/// The other name of a time MLP tensor: LeRobot files exist with either for both families.
pub(super) fn time_alias(name: &str, family: Family) -> Option<String> {
    match family {
        Family::Pi0 => name.strip_prefix("time_mlp_").map(|rest| format!("action_time_mlp_{rest}")),
        Family::Pi05 => name.strip_prefix("action_time_mlp_").map(|rest| format!("time_mlp_{rest}")),
    }
}

/// What becomes of a tensor that the graph does not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extra {
    /// Known to be unused by the policy.
    Junk,
    /// Unknown and outside the graph.
    Unknown,
    /// Inside the graph: the checkpoint computes something else.
    ChangesGraph,
}

/// Judges a canonical name that is not in [`expected_tensors`].
pub(super) fn extra(name: &str, family: Family) -> Extra {
    const JUNK: [&str; 5] = [
        "paligemma_with_expert.gemma_expert.lm_head.",
        "paligemma_with_expert.gemma_expert.model.embed_tokens.",
        "normalize_",
        "unnormalize_",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.head.",
    ];
    const GRAPH: [&str; 6] = [VISION, PROJECTOR, TRUNK, EXPERT, "action_", "time_mlp_"];
    let unused_norm = [TRUNK, "norm.weight"].join(".");
    let no_state_token = family == Family::Pi05 && name.starts_with("state_proj.");
    if TOKEN_TABLES.contains(&name)
        || name == unused_norm
        || no_state_token
        || JUNK.iter().any(|j| name.starts_with(j))
        || name.ends_with(".rotary_emb.inv_freq")
        || name.ends_with(".position_ids")
    {
        Extra::Junk
    } else if name.contains("lora_") || name.starts_with("state_proj") || GRAPH.iter().any(|g| name.starts_with(g)) {
        Extra::ChangesGraph
    } else {
        Extra::Unknown
    }
}

/// How the graph asks a file for the shape of a tensor.
pub(super) struct Shapes<'a> {
    /// The file that messages name.
    pub(super) path: &'a Path,
    /// Shape of a canonical name.
    pub(super) shape: &'a dyn Fn(&str) -> Option<&'a [usize]>,
    /// Every canonical name.
    pub(super) names: &'a [&'a str],
}

impl<'a> Shapes<'a> {
    fn refuse(&self, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> ModelError {
        let (expected, found) = (expected.into(), found.into());
        ModelError::Tensor { path: self.path.into(), tensor: tensor.into(), expected, found }
    }

    /// The shape of `name`, of rank `N` and without a zero.
    fn probe<const N: usize>(&self, name: &str) -> Result<[usize; N], ModelError> {
        let found = (self.shape)(name).ok_or_else(|| self.refuse(name, format!("{N} dimensions"), "no such tensor"))?;
        match <[usize; N]>::try_from(found) {
            Ok(shape) if !shape.contains(&0) => Ok(shape),
            _ => Err(self.refuse(name, format!("{N} non-zero dimensions"), format!("shape {found:?}"))),
        }
    }

    /// Layers under `prefix`, numbered from zero without a gap.
    fn layers(&self, prefix: &str) -> Result<usize, ModelError> {
        let number = |n: &&str| n.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        let numbers: std::collections::BTreeSet<usize> = self.names.iter().filter_map(number).collect();
        match numbers.iter().enumerate().find(|(i, n)| i != *n) {
            Some((i, next)) => {
                let expected = format!("a layer {i}, because there is a layer {next}");
                Err(self.refuse(&format!("{prefix}{i}"), expected, "no such tensors"))
            }
            None => Ok(numbers.len()),
        }
    }

    fn stack(&self, prefix: &str) -> Result<StackDims, ModelError> {
        let attention = format!("{prefix}.layers.0.self_attn");
        let (q, k) = (format!("{attention}.q_proj.weight"), format!("{attention}.k_proj.weight"));
        let [q_rows, width] = self.probe(&q)?;
        let [head_dim, _] = self.probe(&k)?;
        let [mlp, _] = self.probe(&format!("{prefix}.layers.0.mlp.gate_proj.weight"))?;
        if head_dim % 2 != 0 {
            return Err(self.refuse(&k, "an even number of rows (one rotary key head)", format!("{head_dim} rows")));
        }
        if q_rows % head_dim != 0 {
            let expected = format!("rows in multiples of the head dimension {head_dim}");
            return Err(self.refuse(&q, expected, format!("{q_rows} rows")));
        }
        Ok(StackDims {
            layers: self.layers(&format!("{prefix}.layers."))?,
            width,
            mlp,
            heads: q_rows / head_dim,
            head_dim,
        })
    }

    /// π0.5 is known by the adaptive norms of its expert.
    pub(super) fn family(&self) -> Family {
        let adaptive = |n: &&str| n.starts_with(EXPERT) && n.contains("norm.dense.");
        if self.names.iter().any(adaptive) { Family::Pi05 } else { Family::Pi0 }
    }

    /// Every dimension, from shapes first and config.json where shapes cannot say.
    pub(super) fn dims(&self, family: Family, config: &PolicyConfig) -> Result<Dims, ModelError> {
        let patches = format!("{VISION}.embeddings.patch_embedding.weight");
        let [width, channels, patch, patch_w] = self.probe(&patches)?;
        if channels != 3 || patch != patch_w {
            return Err(self.refuse(&patches, "[width, 3, p, p]", format!("{:?}", [width, channels, patch, patch_w])));
        }
        let heads = config.vision_heads.unwrap_or(VISION_HEADS);
        if width % heads != 0 {
            let expected = format!("a width that {heads} heads divide (config.json: vision_num_attention_heads)");
            return Err(self.refuse(&patches, expected, format!("width {width}")));
        }
        let positions = format!("{VISION}.embeddings.position_embedding.weight");
        let [rows, _] = self.probe(&positions)?;
        let side = rows.isqrt();
        let image = side.checked_mul(patch).filter(|i| side * side == rows && *i <= super::Frame::MAX_SIDE);
        let image = image.ok_or_else(|| self.refuse(&positions, "a square number of rows", format!("{rows} rows")))?;
        let [mlp, _] = self.probe(&format!("{VISION}.encoder.layers.0.mlp.fc1.weight"))?;
        let layers = self.layers(&format!("{VISION}.encoder.layers."))?;
        let vision = VisionDims { layers, width, mlp, heads, patch, image };

        let (trunk, expert) = (self.stack(TRUNK)?, self.stack(EXPERT)?);
        if (trunk.layers, trunk.heads, trunk.head_dim) != (expert.layers, expert.heads, expert.head_dim) {
            let say = |s: &StackDims| format!("{} layers, {} heads of {}", s.layers, s.heads, s.head_dim);
            return Err(self.refuse(EXPERT, format!("as the trunk: {}", say(&trunk)), say(&expert)));
        }
        let table = TOKEN_TABLES.into_iter().find(|t| self.names.contains(t));
        let [vocab, _] = self.probe(table.unwrap_or(TOKEN_TABLES[1]))?;
        let [expert_width, action_dim] = self.probe("action_in_proj.weight")?;
        if expert_width % 2 != 0 || expert_width < 4 {
            let found = format!("{expert_width} rows");
            return Err(self.refuse("action_in_proj.weight", "an even number of rows, at least 4", found));
        }
        let state_dim = match family {
            Family::Pi0 => self.probe::<2>("state_proj.weight")?[1],
            Family::Pi05 => config.max_state_dim.unwrap_or(action_dim),
        };
        Ok(Dims {
            family,
            vision,
            trunk,
            expert,
            vocab,
            state_dim,
            action_dim,
            horizon: config.horizon.unwrap_or(HORIZON),
            max_tokens: config.max_tokens.unwrap_or(match family {
                Family::Pi0 => 48,
                Family::Pi05 => 200,
            }),
            min_period: config.min_period.unwrap_or(MIN_PERIOD),
            max_period: config.max_period.unwrap_or(MAX_PERIOD),
        })
    }
}

/// Every tensor a policy of these dimensions needs, canonical name and shape; the token table under its `lm_head` name.
pub fn expected_tensors(dims: &Dims) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    let mut add = |name: String, shape: &[usize]| all.push((name, shape.to_vec()));

    let v = &dims.vision;
    add(format!("{VISION}.embeddings.patch_embedding.weight"), &[v.width, 3, v.patch, v.patch]);
    add(format!("{VISION}.embeddings.patch_embedding.bias"), &[v.width]);
    add(format!("{VISION}.embeddings.position_embedding.weight"), &[v.tokens(), v.width]);
    for i in 0..v.layers {
        let layer = format!("{VISION}.encoder.layers.{i}");
        for norm in ["layer_norm1", "layer_norm2"] {
            add(format!("{layer}.{norm}.weight"), &[v.width]);
            add(format!("{layer}.{norm}.bias"), &[v.width]);
        }
        for (module, rows, columns) in [
            ("self_attn.q_proj", v.width, v.width),
            ("self_attn.k_proj", v.width, v.width),
            ("self_attn.v_proj", v.width, v.width),
            ("self_attn.out_proj", v.width, v.width),
            ("mlp.fc1", v.mlp, v.width),
            ("mlp.fc2", v.width, v.mlp),
        ] {
            add(format!("{layer}.{module}.weight"), &[rows, columns]);
            add(format!("{layer}.{module}.bias"), &[rows]);
        }
    }
    add(format!("{VISION}.post_layernorm.weight"), &[v.width]);
    add(format!("{VISION}.post_layernorm.bias"), &[v.width]);
    add(format!("{PROJECTOR}.weight"), &[dims.trunk.width, v.width]);
    add(format!("{PROJECTOR}.bias"), &[dims.trunk.width]);
    add(TOKEN_TABLES[1].into(), &[dims.vocab, dims.trunk.width]);

    for (prefix, s, adaptive) in [(TRUNK, &dims.trunk, false), (EXPERT, &dims.expert, dims.family == Family::Pi05)] {
        let mut norm = |name: String| {
            if adaptive {
                add(format!("{name}.dense.weight"), &[3 * s.width, s.width]);
                add(format!("{name}.dense.bias"), &[3 * s.width]);
            } else {
                add(format!("{name}.weight"), &[s.width]);
            }
        };
        for i in 0..s.layers {
            norm(format!("{prefix}.layers.{i}.input_layernorm"));
            norm(format!("{prefix}.layers.{i}.post_attention_layernorm"));
        }
        // The trunk's final norm is never computed.
        if prefix == EXPERT {
            norm(format!("{prefix}.norm"));
        }
        for i in 0..s.layers {
            for (module, rows, columns) in [
                ("self_attn.q_proj", s.heads * s.head_dim, s.width),
                ("self_attn.k_proj", s.head_dim, s.width),
                ("self_attn.v_proj", s.head_dim, s.width),
                ("self_attn.o_proj", s.width, s.heads * s.head_dim),
                ("mlp.gate_proj", s.mlp, s.width),
                ("mlp.up_proj", s.mlp, s.width),
                ("mlp.down_proj", s.width, s.mlp),
            ] {
                add(format!("{prefix}.layers.{i}.{module}.weight"), &[rows, columns]);
            }
        }
    }

    let w = dims.expert.width;
    let mut linear = |name: &str, rows: usize, columns: usize| {
        add(format!("{name}.weight"), &[rows, columns]);
        add(format!("{name}.bias"), &[rows]);
    };
    linear("action_in_proj", w, dims.action_dim);
    linear("action_out_proj", dims.action_dim, w);
    match dims.family {
        Family::Pi0 => {
            linear("state_proj", w, dims.state_dim);
            linear("action_time_mlp_in", w, 2 * w);
            linear("action_time_mlp_out", w, w);
        }
        Family::Pi05 => {
            linear("time_mlp_in", w, w);
            linear("time_mlp_out", w, w);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_trees_come_to_todays_names() {
        let p = "paligemma_with_expert.paligemma";
        for (old, now) in [
            ("model.state_proj.bias".into(), "state_proj.bias".into()),
            (format!("model.{p}.model.language_model.norm.weight"), format!("{TRUNK}.norm.weight")),
            (format!("{p}.language_model.model.layers.0.x"), format!("{TRUNK}.layers.0.x")),
            (format!("{p}.language_model.layers.0.x"), format!("{TRUNK}.layers.0.x")),
            (format!("{p}.language_model.lm_head.weight"), format!("{p}.lm_head.weight")),
            (format!("{p}.vision_tower.vision_model.post_layernorm.bias"), format!("{VISION}.post_layernorm.bias")),
            (format!("{p}.model.vision_tower.post_layernorm.bias"), format!("{VISION}.post_layernorm.bias")),
            (format!("{p}.multi_modal_projector.linear.bias"), format!("{PROJECTOR}.bias")),
            (format!("{EXPERT}.norm.weight"), format!("{EXPERT}.norm.weight")),
        ] {
            assert_eq!(canonical(&old), now, "{old}");
            assert_eq!(canonical(&now), now, "a canonical name stays");
        }
    }

    #[test]
    fn the_published_models_have_the_published_tensor_counts() {
        let mut dims = Dims::published(50);
        // The files hold two more that no policy computes with: the trunk's final norm and the expert's head.
        assert_eq!(expected_tensors(&dims).len(), 777 - 2);
        dims.family = Family::Pi05;
        assert_eq!(expected_tensors(&dims).len(), 812 - 2);
    }

    #[test]
    fn an_extra_tensor_is_judged_by_where_it_sits() {
        for (name, verdict) in [
            ("paligemma_with_expert.gemma_expert.lm_head.weight".into(), Extra::Junk),
            (format!("{TRUNK}.norm.weight"), Extra::Junk),
            (format!("{TRUNK}.layers.0.self_attn.rotary_emb.inv_freq"), Extra::Junk),
            ("normalize_inputs.buffer_observation_state.mean".into(), Extra::Junk),
            ("value_head.weight".into(), Extra::Unknown),
            (format!("{TRUNK}.layers.0.self_attn.q_proj.bias"), Extra::ChangesGraph),
            (format!("{EXPERT}.layers.0.self_attn.q_proj.lora_A.weight"), Extra::ChangesGraph),
            ("action_in_proj.scale".into(), Extra::ChangesGraph),
        ] {
            assert_eq!(extra(&name, Family::Pi0), verdict, "{name}");
        }
    }
}
