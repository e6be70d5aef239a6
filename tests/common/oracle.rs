//! π0 and π0.5 once more, as plain as can be, rounding to bf16 wherever the CUDA engine does.
//!
//! With no rounding it is the model itself (`tests/rounding.rs` holds it against the published outputs). With all of
//! them it does the engine's arithmetic but for the order of sums, so a wrong position, mask or weight cannot hide
//! behind the width of bf16: what is left between the two is far below what one key in hundreds is worth.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::bf16;
use pi0_mps::model::{Checkpoint, Dims, EXPERT, Family, PROJECTOR, StackDims, TRUNK, VISION};
use rayon::prelude::*;

/// What is held in bf16 on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Matrices of the three stacks, the projector, π0's second time layer, and the tower's biases before a bf16 store
    /// where no norm is folded in.
    /// Norms, other biases, and the projections of state, actions and velocities stay in float32.
    Weight,
    /// What enters a matrix product: patches, normalised rows, attention's output, the MLP's hidden layer.
    Activation,
    /// What a norm in front of a product of SigLIP's layers or the trunk makes, as
    /// [`Activation`](Self::Activation). Where it does not round, the norm is folded into the product (tower.cu, geglu_wide.cu): what enters is the residual times the norm's weight, and the
    /// sums get mean and deviation. That is the same but for rounding.
    Normed,
    /// Queries, keys and values, before and after rotation; where the trunk's norm is folded in, after it alone.
    QueryKeyValue,
    /// Gate and up projections of the trunk, which a kernel of their own multiplies.
    GateUp,
    /// Softmax weights before they meet the values; their sum is that of the rounded ones.
    Probability,
}

/// Where a point lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    Vision,
    Trunk,
    Expert,
}

/// Whether a point of a stack rounds.
pub type Rounds = fn(Stack, Point) -> bool;

/// A fault to prove that a comparison notices it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Every suffix row stands one position too far.
    PositionShifted,
    /// Every prefix row but the first stands one position too near.
    PrefixPositionShifted,
    /// The action rows do not see this prefix row.
    KeyDropped(usize),
}

/// The model of one checkpoint.
pub struct Oracle {
    checkpoint: Checkpoint,
    dims: Dims,
    rounds: Rounds,
    fault: Fault,
    weights: RefCell<HashMap<String, Rc<Vec<f32>>>>,
}

/// Keys and values of some rows of one layer, `[rows, head_dim]` each.
#[derive(Debug, Clone, Default)]
pub struct KeyValues {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

/// Everything an encode leaves, with the residual after every layer.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// `[views · tokens, width]` after each SigLIP layer.
    pub vision: Vec<Vec<f32>>,
    /// `[rows, width]`.
    pub embeddings: Vec<f32>,
    /// `[rows, width]` after each trunk layer but the last, which makes keys and values only.
    pub trunk: Vec<Vec<f32>>,
    /// By layer.
    pub cache: Vec<KeyValues>,
}

/// Everything a decode leaves.
pub struct Decoded {
    /// By layer: the state row (π0), then the action rows of the last step.
    pub suffix: Vec<KeyValues>,
    /// `[horizon, action_dim]` at each step.
    pub velocities: Vec<Vec<f32>>,
    pub actions: Vec<f32>,
}

/// What a norm of the expert multiplies and adds, and the gate of the residual behind it.
struct Modulation {
    scale: Vec<f32>,
    shift: Option<Vec<f32>>,
    gate: Option<Vec<f32>>,
}

fn round(on: bool, values: &mut [f32]) {
    if on {
        values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
    }
}

/// x·wᵀ for x `[_, k]` and w `[_, k]`; rows of x are shared out among the threads there are.
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / k, w.len() / k);
    let mut y = vec![0.0; rows * outputs];
    let w = MatRef::from_row_major_slice(w, outputs, k);
    let share = rows.div_ceil(rayon::current_num_threads()).max(4);
    y.par_chunks_mut(share * outputs).zip(x.par_chunks(share * k)).for_each(|(y, x)| {
        let rows = x.len() / k;
        let to = MatMut::from_row_major_slice_mut(y, rows, outputs);
        matmul(to, Accum::Replace, MatRef::from_row_major_slice(x, rows, k), w.transpose(), 1.0f32, Par::Seq);
    });
    y
}

fn transposed(x: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| x.iter().skip(c).step_by(columns).copied()).collect()
}

fn add(y: &mut [f32], x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

fn add_rows(y: &mut [f32], row: &[f32]) {
    y.chunks_exact_mut(row.len()).for_each(|y| add(y, row));
}

fn gelu(x: f32) -> f32 {
    let u = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + u.tanh())
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Mean of a row, and 1/√(variance + 1e-6).
fn moments(x: &[f32]) -> (f64, f64) {
    let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / x.len() as f64;
    (mean, 1.0 / (variance + 1e-6).sqrt())
}

fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let row = |x: &[f32]| -> Vec<f32> {
        let (mean, inverse) = moments(x);
        x.iter().zip(weight).zip(bias).map(|((x, w), b)| ((f64::from(*x) - mean) * inverse) as f32 * w + b).collect()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}

/// 1/√(mean(x²) + 1e-6) of every row.
fn inverse_rms(x: &[f32], width: usize) -> Vec<f32> {
    let square = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    x.chunks_exact(width).map(|row| (1.0 / (square(row) / width as f64 + 1e-6).sqrt()) as f32).collect()
}

fn scale_rows(x: &mut [f32], width: usize, by: &[f32]) {
    x.chunks_exact_mut(width).zip(by).for_each(|(row, by)| row.iter_mut().for_each(|v| *v *= by));
}

fn scale_columns(x: &[f32], by: &[f32]) -> Vec<f32> {
    x.chunks_exact(by.len()).flat_map(|row| row.iter().zip(by).map(|(x, s)| x * s)).collect()
}

/// Columns `from..from + width` of every row.
fn columns(x: &[f32], stride: usize, from: usize, width: usize) -> Vec<f32> {
    x.chunks_exact(stride).flat_map(|row| &row[from..from + width]).copied().collect()
}

/// Half-split rotation of `[rows, heads · head_dim]`; row r is at `positions(r)`.
fn rotate(x: &mut [f32], heads: usize, head_dim: usize, position: impl Fn(usize) -> usize) {
    let half = head_dim / 2;
    for (r, row) in x.chunks_exact_mut(heads * head_dim).enumerate() {
        for head in row.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let angle = position(r) as f64 / 10_000f64.powf(i as f64 / half as f64);
                let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
                let (low, high) = (head[i], head[i + half]);
                (head[i], head[i + half]) = (low * cos - high * sin, high * cos + low * sin);
            }
        }
    }
}

/// In which order a kernel takes keys: independent chains of tiles. A weight is rounded relative to the largest score of
/// its chain so far.
type Chains = Vec<Vec<Range<usize>>>;

/// attention_vision.cu: all keys at once. attention_wide.cu: passes of up to nine tiles of 64 where one is enough, else of
/// up to eight. attention.cu: tiles of 64 of which two chains take halves.
fn encoder_chains(keys: usize, head_dim: usize) -> Chains {
    let chain = |first: usize, tile: usize, stride: usize| {
        (first..keys).step_by(stride).map(|at| at..(at + tile).min(keys)).collect()
    };
    if head_dim <= 72 && keys <= 256 {
        return vec![chain(0, 256, 256)];
    }
    if head_dim == 256 {
        let tiles = keys.div_ceil(64);
        let passes = if tiles <= 9 { 1 } else { tiles.div_ceil(8) };
        let pass = tiles.div_ceil(passes) * 64;
        return vec![chain(0, pass, pass)];
    }
    vec![chain(0, 32, 64), chain(32, 32, 64)]
}

/// decode_attention.cu: eight equal slices, taken in tiles of up to 128.
fn decoder_chains(keys: usize) -> Chains {
    let slice = keys.div_ceil(8).next_multiple_of(16);
    let chain = |from: usize| {
        let end = (from + slice).min(keys);
        (from..end).step_by(128).map(|at| at..(at + 128).min(end)).collect()
    };
    (0..keys).step_by(slice).map(chain).collect()
}

/// Softmax attention of one head: q `[rows, dim]` over the keys that `sees` lets through.
fn attend(
    rounds: bool,
    dim: usize,
    q: &[f32],
    kv: &KeyValues,
    chains: &Chains,
    sees: impl Fn(usize) -> bool + Sync,
) -> Vec<f32> {
    let keys = kv.keys.len() / dim;
    let mut scores = product(q, &kv.keys, dim);
    let mut sums = vec![0.0; q.len() / dim];
    scores.par_chunks_exact_mut(keys).zip(&mut sums).for_each(|(row, inverse)| {
        for (key, s) in row.iter_mut().enumerate() {
            *s = if sees(key) { *s / (dim as f32).sqrt() } else { f32::NEG_INFINITY };
        }
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for chain in chains {
            let mut so_far = f32::NEG_INFINITY;
            for tile in chain {
                let tile = &mut row[tile.start.min(keys)..tile.end.min(keys)];
                so_far = tile.iter().copied().fold(so_far, f32::max);
                tile.iter_mut().for_each(|s| *s = if *s == f32::NEG_INFINITY { 0.0 } else { (*s - so_far).exp() });
                round(rounds, tile);
                tile.iter_mut().for_each(|p| *p *= (so_far - top).exp());
            }
        }
        *inverse = 1.0 / row.iter().sum::<f32>();
    });
    let mut out = product(&scores, &transposed(&kv.values, dim), keys);
    scale_rows(&mut out, dim, &sums);
    out
}

impl Oracle {
    /// The model of `checkpoint`, rounding where `rounds` says so.
    pub fn new(checkpoint: Checkpoint, rounds: Rounds) -> Self {
        let dims = *checkpoint.dims();
        Self { checkpoint, dims, rounds, fault: Fault::None, weights: RefCell::default() }
    }

    /// The same with a planted fault from now on.
    pub fn with(mut self, fault: Fault) -> Self {
        self.fault = fault;
        self
    }

    fn exact(&self, name: &str, shape: &[usize]) -> Rc<Vec<f32>> {
        let load = || Rc::new(self.checkpoint.tensor(name, shape).unwrap().to_f32().to_vec());
        Rc::clone(self.weights.borrow_mut().entry(name.into()).or_insert_with(load))
    }

    fn rounded(&self, stack: Stack, name: &str, shape: &[usize]) -> Rc<Vec<f32>> {
        if let Some(weight) = self.weights.borrow().get(name) {
            return Rc::clone(weight);
        }
        let mut values = self.checkpoint.tensor(name, shape).unwrap().to_f32().to_vec();
        self.round(stack, Point::Weight, &mut values);
        let values = Rc::new(values);
        self.weights.borrow_mut().insert(name.into(), Rc::clone(&values));
        values
    }

    fn round(&self, stack: Stack, point: Point, values: &mut [f32]) {
        round((self.rounds)(stack, point), values);
    }

    /// x·wᵀ for rows of `inputs` values, rounded as what enters a product.
    fn linear(&self, stack: Stack, mut x: Vec<f32>, name: &str, outputs: usize, inputs: usize) -> Vec<f32> {
        self.round(stack, Point::Activation, &mut x);
        product(&x, &self.rounded(stack, name, &[outputs, inputs]), inputs)
    }

    /// Images `[3, size, size]` in [-1, 1] and prompt tokens to keys and values.
    pub fn encode(&self, views: &[Vec<f32>], tokens: &[u32]) -> Encoded {
        self.encode_from(views, tokens, None)
    }

    /// As [`encode`](Self::encode), but every layer starts from what another run left before it: rounding makes of a
    /// difference in the last bit of a float32 one of a bf16, so two runs drift apart over some layers however right
    /// both are.
    pub fn encode_from(&self, views: &[Vec<f32>], tokens: &[u32], other: Option<&Encoded>) -> Encoded {
        let (images, vision) = self.vision(views, other.map(|o| &o.vision[..]));
        let width = self.dims.trunk.width;
        let table = self.checkpoint.token_table().unwrap();
        let mut embeddings = images;
        for token in tokens {
            let mut row = vec![0.0; width];
            table.row_f32(*token as usize, &mut row).unwrap();
            embeddings.extend(row.iter().map(|v| v * (width as f32).sqrt()));
        }
        let (trunk, cache) =
            self.trunk(other.map_or(&embeddings, |o| &o.embeddings).clone(), other.map(|o| &o.trunk[..]));
        Encoded { vision, embeddings, trunk, cache }
    }

    /// Projected images, and the residual after each SigLIP layer.
    pub fn vision(&self, views: &[Vec<f32>], other: Option<&[Vec<f32>]>) -> (Vec<f32>, Vec<Vec<f32>>) {
        let v = self.dims.vision;
        let (side, inputs, tokens) = (v.image / v.patch, 3 * v.patch * v.patch, v.tokens());
        let mut patches = Vec::with_capacity(views.len() * tokens * inputs);
        for view in views {
            for token in 0..tokens {
                for i in 0..inputs {
                    let (c, y, x) = (i / (v.patch * v.patch), i / v.patch % v.patch, i % v.patch);
                    let (y, x) = (token / side * v.patch + y, token % side * v.patch + x);
                    patches.push(view[(c * v.image + y) * v.image + x]);
                }
            }
        }
        self.round(Stack::Vision, Point::Activation, &mut patches);
        let name = |rest: &str| format!("{VISION}.{rest}");
        let patch = name("embeddings.patch_embedding");
        let shape = [v.width, 3, v.patch, v.patch];
        let mut h = product(&patches, &self.rounded(Stack::Vision, &format!("{patch}.weight"), &shape), inputs);
        add_rows(&mut h, &self.exact(&format!("{patch}.bias"), &[v.width]));
        add_rows(&mut h, &self.exact(&name("embeddings.position_embedding.weight"), &[tokens, v.width]));

        let vectors = |at: &str| ["weight", "bias"].map(|kind| self.exact(&format!("{at}.{kind}"), &[v.width]));
        let norm = |h: &[f32], at: &str| {
            let [weight, bias] = vectors(at);
            layer_norm(h, &weight, &bias)
        };
        let biased = |x: Vec<f32>, at: &str, outputs: usize, inputs: usize, round_bias: bool| {
            let mut y = self.linear(Stack::Vision, x, &format!("{at}.weight"), outputs, inputs);
            let bias = format!("{at}.bias");
            let bias =
                if round_bias { self.rounded(Stack::Vision, &bias, &[outputs]) } else { self.exact(&bias, &[outputs]) };
            add_rows(&mut y, &bias);
            y
        };
        // A product of the residual behind a norm.
        let behind = |h: &[f32], norm_at: &str, at: &str, outputs: usize| {
            if (self.rounds)(Stack::Vision, Point::Normed) {
                return biased(norm(h, norm_at), at, outputs, v.width, true);
            }
            let (weight, [scale, shift]) = (format!("{at}.weight"), vectors(norm_at));
            let mut y = self.linear(Stack::Vision, scale_columns(h, &scale), &weight, outputs, v.width);
            let weight = self.rounded(Stack::Vision, &weight, &[outputs, v.width]);
            let (fold, mut bias) = (product(&scale, &weight, v.width), product(&shift, &weight, v.width));
            add(&mut bias, &self.exact(&format!("{at}.bias"), &[outputs]));
            for (y, h) in y.chunks_exact_mut(outputs).zip(h.chunks_exact(v.width)) {
                let (mean, inverse) = moments(h);
                for ((y, fold), bias) in y.iter_mut().zip(&fold).zip(&bias) {
                    *y = inverse as f32 * (*y - mean as f32 * fold) + bias;
                }
            }
            y
        };
        let mut taps = Vec::new();
        for l in 0..v.layers {
            let at = |rest: &str| name(&format!("encoder.layers.{l}.{rest}"));
            let [q, k, values] = ["q", "k", "v"].map(|p| {
                let mut y = behind(&h, &at("layer_norm1"), &at(&format!("self_attn.{p}_proj")), v.width);
                self.round(Stack::Vision, Point::QueryKeyValue, &mut y);
                y
            });
            let attended = self.attend_views(views.len(), &q, &k, &values);
            add(&mut h, &biased(attended, &at("self_attn.out_proj"), v.width, v.width, false));
            let mut hidden = behind(&h, &at("layer_norm2"), &at("mlp.fc1"), v.mlp);
            hidden.iter_mut().for_each(|x| *x = gelu(*x));
            add(&mut h, &biased(hidden, &at("mlp.fc2"), v.width, v.mlp, false));
            taps.push(h.clone());
            if let Some(other) = other {
                h.clone_from(&other[l]);
            }
        }
        let normed = norm(&h, &name("post_layernorm"));
        (biased(normed, PROJECTOR, self.dims.trunk.width, v.width, false), taps)
    }

    /// Attention within each view and head.
    fn attend_views(&self, views: usize, q: &[f32], k: &[f32], values: &[f32]) -> Vec<f32> {
        let v = self.dims.vision;
        let (dim, view) = (v.width / v.heads, v.tokens() * v.width);
        let mut out = vec![0.0; views * view];
        let chains = encoder_chains(v.tokens(), dim);
        for n in 0..views {
            let part = |x: &[f32], head: usize| columns(&x[n * view..(n + 1) * view], v.width, head * dim, dim);
            for head in 0..v.heads {
                let kv = KeyValues { keys: part(k, head), values: part(values, head) };
                let rounds = (self.rounds)(Stack::Vision, Point::Probability);
                let attended = attend(rounds, dim, &part(q, head), &kv, &chains, |_| true);
                for (row, values) in attended.chunks_exact(dim).enumerate() {
                    let at = n * view + row * v.width + head * dim;
                    out[at..at + dim].copy_from_slice(values);
                }
            }
        }
        out
    }

    fn trunk(&self, mut h: Vec<f32>, other: Option<&[Vec<f32>]>) -> (Vec<Vec<f32>>, Vec<KeyValues>) {
        let d = self.dims.trunk;
        let (mut taps, mut cache) = (Vec::new(), Vec::new());
        let position =
            |row: usize| if self.fault == Fault::PrefixPositionShifted { row.saturating_sub(1) } else { row };
        for l in 0..d.layers {
            let at = |rest: &str| format!("{TRUNK}.layers.{l}.{rest}");
            // As in the tower: the norm in front of the product, or folded into it.
            let before = (self.rounds)(Stack::Trunk, Point::Normed);
            // The residual times a norm's weight, and behind the norm where that comes before the product; what else the
            // product's sums are to be multiplied by.
            let norm = |h: &[f32], name: &str| {
                let scale: Vec<f32> = self.exact(&at(name), &[d.width]).iter().map(|w| 1.0 + w).collect();
                let (mut x, inverse) = (scale_columns(h, &scale), inverse_rms(h, d.width));
                if before {
                    scale_rows(&mut x, d.width, &inverse);
                }
                (x, if before { vec![1.0; inverse.len()] } else { inverse })
            };
            let (x, inverse) = norm(&h, "input_layernorm.weight");
            let project = |part: &str, heads: usize| {
                let (name, outputs) = (at(&format!("self_attn.{part}_proj.weight")), heads * d.head_dim);
                let mut y = self.linear(Stack::Trunk, x.clone(), &name, outputs, d.width);
                scale_rows(&mut y, outputs, &inverse);
                if before {
                    self.round(Stack::Trunk, Point::QueryKeyValue, &mut y);
                }
                if part != "v" {
                    rotate(&mut y, heads, d.head_dim, position);
                }
                self.round(Stack::Trunk, Point::QueryKeyValue, &mut y);
                y
            };
            let kv = KeyValues { keys: project("k", 1), values: project("v", 1) };
            if l + 1 == d.layers {
                cache.push(kv);
                break;
            }
            let q = project("q", d.heads);
            let chains = encoder_chains(kv.keys.len() / d.head_dim, d.head_dim);
            let rounds = (self.rounds)(Stack::Trunk, Point::Probability);
            let attended = attend(rounds, d.head_dim, &q, &kv, &chains, |_| true);
            cache.push(kv);
            let (queries, out) = (d.heads * d.head_dim, at("self_attn.o_proj.weight"));
            add(&mut h, &self.linear(Stack::Trunk, attended, &out, d.width, queries));
            let (x, inverse) = norm(&h, "post_attention_layernorm.weight");
            let [gate, up] = ["gate", "up"].map(|part| {
                let name = at(&format!("mlp.{part}_proj.weight"));
                let mut y = self.linear(Stack::Trunk, x.clone(), &name, d.mlp, d.width);
                scale_rows(&mut y, d.mlp, &inverse);
                self.round(Stack::Trunk, Point::GateUp, &mut y);
                y
            });
            let hidden = gate.iter().zip(&up).map(|(g, u)| gelu(*g) * u).collect();
            add(&mut h, &self.linear(Stack::Trunk, hidden, &at("mlp.down_proj.weight"), d.width, d.mlp));
            taps.push(h.clone());
            if let Some(other) = other {
                h.clone_from(&other[l]);
            }
        }
        (taps, cache)
    }

    /// Cache, state and noise to actions in `steps` steps.
    pub fn decode(&self, prefix: &Encoded, state: &[f32], noise: &[f32], steps: usize) -> Decoded {
        self.decode_from(prefix, state, noise, steps, None)
    }

    /// As [`decode`](Self::decode), but every step starts from where the velocities of another run lead.
    pub fn decode_from(
        &self,
        prefix: &Encoded,
        state: &[f32],
        noise: &[f32],
        steps: usize,
        other: Option<&Decoded>,
    ) -> Decoded {
        let (d, dims) = (self.dims.expert, self.dims);
        let first = prefix.cache[0].keys.len() / d.head_dim + usize::from(self.fault == Fault::PositionShifted);
        let mut suffix = vec![KeyValues::default(); d.layers];
        let state_rows = usize::from(dims.family == Family::Pi0);
        if state_rows == 1 {
            let mut h = product(state, &self.exact("state_proj.weight", &[d.width, dims.state_dim]), dims.state_dim);
            add(&mut h, &self.exact("state_proj.bias", &[d.width]));
            self.expert(&mut h, first, None, prefix, &mut suffix);
        }
        let mut x = noise.to_vec();
        let mut velocities = Vec::new();
        for step in 0..steps {
            let time = f64::from((1.0 - step as f64 / steps as f64) as f32);
            suffix.iter_mut().for_each(|kv| {
                kv.keys.truncate(state_rows * d.head_dim);
                kv.values.truncate(state_rows * d.head_dim);
            });
            let mut h = self.embed_actions(&x, time);
            self.expert(&mut h, first + state_rows, Some(time), prefix, &mut suffix);
            let norm = self.modulation(&format!("{EXPERT}.norm"), Some(time));
            let mut normed = scale_columns(&h, &norm.scale);
            scale_rows(&mut normed, d.width, &inverse_rms(&h, d.width));
            if let Some(shift) = &norm.shift {
                add_rows(&mut normed, shift);
            }
            let mut v = product(&normed, &self.exact("action_out_proj.weight", &[dims.action_dim, d.width]), d.width);
            add_rows(&mut v, &self.exact("action_out_proj.bias", &[dims.action_dim]));
            let led = other.map_or(&v, |o| &o.velocities[step]);
            x.iter_mut().zip(led).for_each(|(x, v)| *x += (-1.0 / steps as f64) as f32 * v);
            velocities.push(v);
        }
        Decoded { suffix, velocities, actions: x }
    }

    /// Keys over which the decoder's attention lays its slices: the whole suffix, also where a row sees less.
    fn suffix_end(&self, prefix: &KeyValues, d: StackDims) -> usize {
        prefix.keys.len() / d.head_dim + self.dims.horizon + usize::from(self.dims.family == Family::Pi0)
    }

    /// `[sin | cos]` of `width/2` periods.
    fn time_embedding(&self, time: f64) -> Vec<f32> {
        let half = self.dims.expert.width / 2;
        let angle = |j: usize| {
            let ratio = self.dims.max_period / self.dims.min_period;
            std::f64::consts::TAU * time / (self.dims.min_period * ratio.powf(j as f64 / (half - 1) as f64))
        };
        (0..half).map(|j| angle(j).sin() as f32).chain((0..half).map(|j| angle(j).cos() as f32)).collect()
    }

    /// weight·x + bias in float64.
    fn wide(&self, name: &str, x: &[f64], from: usize, inputs: usize) -> Vec<f64> {
        let outputs = self.dims.expert.width;
        let weight = self.exact(&format!("{name}.weight"), &[outputs, inputs]);
        let bias = self.exact(&format!("{name}.bias"), &[outputs]);
        let dot = |row: &[f32]| row[from..].iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        weight.chunks_exact(inputs).zip(bias.iter()).map(|(row, b)| f64::from(*b) + dot(row)).collect()
    }

    fn embed_actions(&self, x: &[f32], time: f64) -> Vec<f32> {
        let (d, dims) = (self.dims.expert, self.dims);
        let mut a = product(x, &self.exact("action_in_proj.weight", &[d.width, dims.action_dim]), dims.action_dim);
        add_rows(&mut a, &self.exact("action_in_proj.bias", &[d.width]));
        if dims.family == Family::Pi05 {
            return a;
        }
        let embedding: Vec<f64> = self.time_embedding(time).into_iter().map(f64::from).collect();
        let bias: Vec<f32> =
            self.wide("action_time_mlp_in", &embedding, d.width, 2 * d.width).iter().map(|v| *v as f32).collect();
        let first = self.exact("action_time_mlp_in.weight", &[d.width, 2 * d.width]);
        let mut u = product(&a, &columns(&first, 2 * d.width, 0, d.width), d.width);
        add_rows(&mut u, &bias);
        u.iter_mut().for_each(|v| *v = silu(f64::from(*v)) as f32);
        let mut token = self.linear(Stack::Expert, u, "action_time_mlp_out.weight", d.width, d.width);
        add_rows(&mut token, &self.exact("action_time_mlp_out.bias", &[d.width]));
        token
    }

    /// The norm `name` at a time; the state row (π0 only) has none.
    fn modulation(&self, name: &str, time: Option<f64>) -> Modulation {
        let width = self.dims.expert.width;
        if self.dims.family == Family::Pi0 {
            let scale = self.exact(&format!("{name}.weight"), &[width]).iter().map(|w| 1.0 + w).collect();
            return Modulation { scale, shift: None, gate: None };
        }
        let embedding = self.time_embedding(time.unwrap()).into_iter().map(f64::from).collect::<Vec<_>>();
        let hidden: Vec<f64> = self.wide("time_mlp_in", &embedding, 0, width).into_iter().map(silu).collect();
        let condition: Vec<f32> =
            self.wide("time_mlp_out", &hidden, 0, width).into_iter().map(|v| silu(v) as f32).collect();
        let mut all = product(&condition, &self.exact(&format!("{name}.dense.weight"), &[3 * width, width]), width);
        add(&mut all, &self.exact(&format!("{name}.dense.bias"), &[3 * width]));
        Modulation {
            scale: all[..width].iter().map(|s| 1.0 + s).collect(),
            shift: Some(all[width..2 * width].to_vec()),
            gate: Some(all[2 * width..].to_vec()),
        }
    }

    /// All expert layers over rows that start at `position`; their keys and values go behind those in `suffix`.
    fn expert(&self, h: &mut [f32], position: usize, time: Option<f64>, prefix: &Encoded, suffix: &mut [KeyValues]) {
        let d: StackDims = self.dims.expert;
        let stack = Stack::Expert;
        for (l, own) in suffix.iter_mut().enumerate() {
            let at = |rest: &str| format!("{EXPERT}.layers.{l}.{rest}");
            // The norm's factor of a row is applied to the product, its shift goes through the product on its own.
            let normed = |h: &[f32], norm: &Modulation, name: &str, outputs: usize| {
                let name = at(&format!("{name}.weight"));
                let mut y = self.linear(stack, scale_columns(h, &norm.scale), &name, outputs, d.width);
                scale_rows(&mut y, outputs, &inverse_rms(h, d.width));
                if let Some(shift) = &norm.shift {
                    add_rows(&mut y, &product(shift, &self.rounded(stack, &name, &[outputs, d.width]), d.width));
                }
                y
            };
            let join = |h: &mut [f32], mut y: Vec<f32>, norm: &Modulation| {
                if let Some(gate) = &norm.gate {
                    y = scale_columns(&y, gate);
                }
                add(h, &y);
            };
            let norm = self.modulation(&at("input_layernorm"), time);
            let project = |part: &str, heads: usize| {
                let mut y = normed(h, &norm, &format!("self_attn.{part}_proj"), heads * d.head_dim);
                if part != "v" {
                    rotate(&mut y, heads, d.head_dim, |row| position + row);
                }
                self.round(stack, Point::QueryKeyValue, &mut y);
                y
            };
            own.keys.extend(project("k", 1));
            own.values.extend(project("v", 1));
            let q = project("q", d.heads);
            let seen = &prefix.cache[l];
            let kv = KeyValues {
                keys: [&seen.keys[..], &own.keys].concat(),
                values: [&seen.values[..], &own.values].concat(),
            };
            let chains = decoder_chains(self.suffix_end(seen, d));
            let rounds = (self.rounds)(stack, Point::Probability);
            let fault = self.fault;
            let sees = move |key: usize| fault != Fault::KeyDropped(key);
            let attended = attend(rounds, d.head_dim, &q, &kv, &chains, sees);
            let (queries, out) = (d.heads * d.head_dim, at("self_attn.o_proj.weight"));
            join(h, self.linear(stack, attended, &out, d.width, queries), &norm);
            let norm = self.modulation(&at("post_attention_layernorm"), time);
            let gate = normed(h, &norm, "mlp.gate_proj", d.mlp);
            let up = normed(h, &norm, "mlp.up_proj", d.mlp);
            let hidden = gate.iter().zip(&up).map(|(g, u)| gelu(*g) * u).collect();
            join(h, self.linear(stack, hidden, &at("mlp.down_proj.weight"), d.width, d.mlp), &norm);
        }
    }
}
