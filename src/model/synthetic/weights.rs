//! The weights of a synthetic policy: random, but for the few paths that make it move an arm smoothly.
//!
//! What is built in, all of it in the action expert (π0):
//!
//! - **Time MLP.** SiLU(z) − SiLU(−z) = z makes it linear: the 32 values of an action row land in 32 slots of the
//!   residual stream, C·t in a slot of its own. C·t outweighs everything else, so the final norm divides by t and the
//!   velocity is (x − a)/t, with a whatever the layers subtract: ten Euler steps end at a for any noise.
//! - **State row.** The joint state lies in slots beside a large constant; one MLP works out the feature N of
//!   [`Orbit`].
//! - **Attention.** Action i weighs the state row against the other action rows by a slowly turning rotary pair, so
//!   every head's weight is a smooth step over i. Least squares over these steps give any smooth function of i, and
//!   the output projections carry the coefficients of [`Orbit::action`].
//! - **Prefix.** One head a layer looks at the images or at the prompt instead, with a weight that rises from zero
//!   at action 0: images and prompt bend the motion by a few percent.

use std::collections::BTreeMap;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::orbit::{BRAKE_SHARPNESS, DIRECTIONS, FEATURES, JOINTS, ONE, Orbit, PAIRED, fit};
use crate::model::graph::TOKEN_TABLES;
use crate::model::{Dims, EXPERT, PROJECTOR, TRUNK, VISION, expected_tensors};

// Slots of the expert's residual stream, after the action's own slots from 0 on.
const STATE: usize = 32;
const BRAKE: usize = STATE + JOINTS;
const TIME: usize = BRAKE + PAIRED;
const MARK: usize = TIME + 1;
const SPARE: usize = MARK + 1;

/// C: the time slot holds C·t, large against any action.
const TIME_SCALE: f64 = 100.0;
/// The state row's constant, large against any normalised state.
const STATE_MARK: f64 = 100.0;

// Rotary pairs of a head, from fast to slow; pair p turns by 10000^(−p/16) rad per position.
/// Turns by 1.6 rad over a chunk of 50: what separates early actions from late ones.
const TURNING: usize = 6;
/// Content of prefix rows; barely turns over a prefix.
const CONTENT: usize = 12;
/// Prompt (+) or image (−).
const KIND: usize = 13;
/// Only the state row's keys have it.
const STATE_ONLY: usize = 14;
/// Every suffix row's keys have it, no prefix row's.
const SUFFIX: usize = 15;

/// Values of a head that carry the state's features; the rest carries prefix content.
const PREFIX_VALUES: usize = 16;

/// Score that sets suffix rows apart from prefix rows: e^20 against a few hundred keys.
const APART: f64 = 20.0;
/// Score amplitude of the turning pair: a step over about six actions either side.
const TURNING_SCORE: f64 = 5.3;
/// Score of the kind of prefix row that a head looks for.
const KIND_SCORE: f64 = 3.0;
/// Bend that images or prompt can give the late actions, normalised.
const BEND: f64 = 0.15;

/// Where the steps of the heads lie, in actions; `None` is a weight of one throughout.
const STEPS: [&[Option<f64>]; 4] = [
    &[None, Some(6.0), Some(23.0), Some(40.0)],
    &[None, Some(14.0), Some(35.0)],
    &[Some(0.0), Some(21.0), Some(42.0)],
    &[Some(7.0), Some(28.0), Some(49.0)],
];
/// What the last head of a layer looks at: +1 the prompt, −1 the images.
const LOOKS_AT: [Option<f64>; 4] = [None, Some(-1.0), Some(1.0), Some(-1.0)];

/// Tensors by canonical name: shape and values.
pub(super) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Every tensor of the policy.
pub(super) fn build(dims: &Dims, orbit: &Orbit, rng: &mut ChaCha8Rng) -> Tensors {
    let mut tensors = Tensors::new();
    for (name, shape) in expected_tensors(dims) {
        let len = shape.iter().product();
        let (centre, spread) = random_scale(&name, &shape);
        let values = (0..len).map(|_| centre + spread * rng.sample::<f32, _>(StandardNormal)).collect();
        tensors.insert(name, (shape, values));
    }
    let mut w = Builder { dims, tensors, rng };
    w.prefix();
    w.time_mlp();
    w.state_row();
    for layer in 0..dims.expert.layers {
        w.quiet(layer);
    }
    w.brake(orbit);
    w.attention(orbit);
    w.output();
    w.tensors
}

/// Mean and standard deviation of a random tensor: signals of order one from layer to layer.
pub(super) fn random_scale(name: &str, shape: &[usize]) -> (f32, f32) {
    let inputs: usize = shape.iter().skip(1).product();
    let fan = 1.0 / (inputs as f32).sqrt();
    let is = |part: &str| name.contains(part);
    if name == TOKEN_TABLES[1] || is("patch_embedding.weight") {
        (0.0, fan)
    } else if is("position_embedding") {
        (0.0, 0.2)
    } else if shape.len() == 1 {
        let gain = is("layer_norm") || is("post_layernorm.weight");
        (if gain && name.ends_with(".weight") { 1.0 } else { 0.0 }, 0.02)
    } else if is("out_proj") || is("o_proj") || is("fc2") || is("down_proj") {
        (0.0, 0.5 * fan)
    } else {
        (0.0, fan)
    }
}

struct Builder<'a> {
    dims: &'a Dims,
    tensors: Tensors,
    rng: &'a mut ChaCha8Rng,
}

/// One matrix (or vector, as one column) being written.
struct Entry<'a> {
    columns: usize,
    values: &'a mut [f32],
}

impl Entry<'_> {
    fn set(&mut self, row: usize, column: usize, value: f64) {
        self.values[row * self.columns + column] = value as f32;
    }

    fn zero(&mut self) -> &mut Self {
        self.values.fill(0.0);
        self
    }

    fn zero_row(&mut self, row: usize) {
        self.values[row * self.columns..(row + 1) * self.columns].fill(0.0);
    }

    fn zero_column(&mut self, column: usize) {
        self.values.iter_mut().skip(column).step_by(self.columns).for_each(|v| *v = 0.0);
    }
}

impl Builder<'_> {
    /// The names come from this file and [`expected_tensors`] alone.
    fn entry(&mut self, name: &str) -> Entry<'_> {
        let (shape, values) = self.tensors.entry(name.into()).or_default();
        Entry { columns: shape.iter().skip(1).product::<usize>().max(1), values }
    }

    fn expert(&mut self, layer: usize, name: &str) -> Entry<'_> {
        self.entry(&format!("{EXPERT}.layers.{layer}.{name}.weight"))
    }

    fn normal(&mut self) -> f64 {
        self.rng.sample(StandardNormal)
    }

    /// Root of the expert's width: what a norm makes of a slot that outweighs all others.
    fn root(&self) -> f64 {
        (self.dims.expert.width as f64).sqrt()
    }

    /// Residual slot 0 of the trunk tells prompt rows from image rows; keys and values leave room for the suffix's.
    fn prefix(&mut self) {
        let root = (self.dims.trunk.width as f64).sqrt();
        let mut table = self.entry(TOKEN_TABLES[1]);
        for id in 0..table.values.len() / table.columns {
            table.set(id, 0, 2.0 / root);
        }
        self.entry(&format!("{PROJECTOR}.weight")).zero_row(0);
        self.entry(&format!("{PROJECTOR}.bias")).set(0, 0, -2.0);
        // The mean over a view is what counts: the image must outweigh where in it something is.
        let positions = self.entry(&format!("{VISION}.embeddings.position_embedding.weight"));
        positions.values.iter_mut().for_each(|v| *v *= 0.5);
        let half = self.dims.trunk.head_dim / 2;
        for layer in 0..self.dims.trunk.layers {
            let of = |name: &str| format!("{TRUNK}.layers.{layer}.{name}.weight");
            let (k, v) = (of("self_attn.k_proj"), of("self_attn.v_proj"));
            for name in [of("self_attn.o_proj"), of("mlp.down_proj")] {
                self.entry(&name).zero_row(0);
            }
            for pair in [TURNING, KIND, STATE_ONLY, SUFFIX] {
                let mut keys = self.entry(&k);
                keys.zero_row(pair);
                keys.zero_row(pair + half);
            }
            self.entry(&k).set(KIND, 0, 1.0);
            let mut values = self.entry(&v);
            (0..PREFIX_VALUES).for_each(|row| values.zero_row(row));
            values.zero_column(0);
        }
    }

    /// x into slots 0.., C·t into the time slot.
    fn time_mlp(&mut self) {
        let (width, actions) = (self.dims.expert.width, self.dims.action_dim);
        let mut project = self.entry("action_in_proj.weight");
        project.zero();
        (0..actions).for_each(|k| project.set(k, k, 1.0));
        self.entry("action_in_proj.bias").zero();

        let (time, intercept) = self.linear_time();
        let mut first = self.entry("action_time_mlp_in.weight");
        first.zero();
        for k in 0..actions {
            first.set(2 * k, k, 1.0);
            first.set(2 * k + 1, k, -1.0);
        }
        let unit = 2 * actions;
        for (j, weight) in time.iter().enumerate() {
            first.set(unit, width + j, *weight);
            first.set(unit + 1, width + j, -weight);
        }
        let mut bias = self.entry("action_time_mlp_in.bias");
        bias.zero().set(unit, 0, intercept);
        bias.set(unit + 1, 0, -intercept);

        let mut second = self.entry("action_time_mlp_out.weight");
        second.zero();
        for k in 0..actions {
            second.set(k, 2 * k, 1.0);
            second.set(k, 2 * k + 1, -1.0);
        }
        second.set(TIME, unit, 1.0);
        second.set(TIME, unit + 1, -1.0);
        self.entry("action_time_mlp_out.bias").zero();
    }

    /// Weights on the time embedding, and a constant, that make C·t of it: from the slow periods alone, so that any
    /// number of steps will do.
    fn linear_time(&self) -> (Vec<f64>, f64) {
        let half = self.dims.expert.width / 2;
        let (shortest, longest) = (self.dims.min_period, self.dims.max_period);
        let period = |j: usize| shortest * (longest / shortest).powf(j as f64 / (half - 1) as f64);
        let slow: Vec<usize> = (0..half).filter(|j| period(*j) > 0.25 * longest).collect();
        let times: Vec<f64> = (0..=200).map(|k| f64::from(k) / 200.0).collect();
        let wave = |t: f64, j: usize| std::f64::consts::TAU * t / period(j);
        let basis: Vec<Vec<f64>> = times
            .iter()
            .map(|t| slow.iter().flat_map(|j| [wave(*t, *j).sin(), wave(*t, *j).cos()]).chain([1.0]).collect())
            .collect();
        let target = times.iter().map(|t| TIME_SCALE * t).collect();
        let x = &fit(&basis, &vec![1.0; times.len()], &[target], 1e-6)[0];
        let mut weights = vec![0.0; 2 * half];
        for (n, j) in slow.iter().enumerate() {
            (weights[*j], weights[half + j]) = (x[2 * n], x[2 * n + 1]);
        }
        (weights, x[2 * slow.len()])
    }

    /// The joint state and the mark.
    fn state_row(&mut self) {
        let mut project = self.entry("state_proj.weight");
        project.zero();
        (0..JOINTS).for_each(|k| project.set(STATE + k, k, 1.0));
        self.entry("state_proj.bias").zero().set(MARK, 0, STATE_MARK);
    }

    /// What stays random in a layer must not reach the slots that carry the motion.
    fn quiet(&mut self, layer: usize) {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            self.expert(layer, norm).values[..SPARE].fill(0.0);
        }
        let mut down = self.expert(layer, "mlp.down_proj");
        down.values.iter_mut().for_each(|v| *v *= 0.02);
        (0..SPARE).for_each(|row| down.zero_row(row));
        for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
            self.expert(layer, name).zero();
        }
        let mut out = self.expert(layer, "self_attn.o_proj");
        out.values.iter_mut().for_each(|v| *v *= 0.02);
        (0..SPARE).for_each(|row| out.zero_row(row));
    }

    /// N of [`Orbit`], in the MLP of the first layer: two units a direction make a brake, times the joint.
    fn brake(&mut self, orbit: &Orbit) {
        let root = self.root();
        let (from_state, from_mark) = (STATE_MARK / root, 1.0 / root);
        let mut unit = 0;
        for joint in 0..PAIRED {
            let pair = joint / 2 * 2;
            for direction in DIRECTIONS {
                for sign in [1.0, -1.0] {
                    let mut gate = self.expert(0, "mlp.gate_proj");
                    gate.zero_row(unit);
                    let mut offset = 0.0;
                    for (k, along) in [(pair, direction.0), (pair + 1, direction.1)] {
                        let slope = sign * BRAKE_SHARPNESS * along / orbit.radius[k];
                        gate.set(unit, STATE + k, slope * from_state);
                        offset -= slope * orbit.centre[k];
                    }
                    gate.set(unit, MARK, offset * from_mark);
                    let mut up = self.expert(0, "mlp.up_proj");
                    up.zero_row(unit);
                    up.set(unit, STATE + joint, from_state);
                    up.set(unit, MARK, -orbit.centre[joint] * from_mark);
                    let mut down = self.expert(0, "mlp.down_proj");
                    down.zero_column(unit);
                    down.set(BRAKE + joint, unit, -orbit.brake);
                    unit += 1;
                }
            }
        }
    }

    fn attention(&mut self, orbit: &Orbit) {
        let (root, head_dim) = (self.root(), self.dims.expert.head_dim);
        for layer in 0..self.dims.expert.layers {
            let mut keys = self.expert(layer, "self_attn.k_proj");
            for pair in [TURNING, STATE_ONLY, SUFFIX] {
                keys.set(pair, MARK, 1.0 / root);
            }
            keys.set(SUFFIX, TIME, 1.0 / root);
            let mut values = self.expert(layer, "self_attn.v_proj");
            (0..JOINTS).for_each(|k| values.set(k, STATE + k, STATE_MARK / root));
            values.set(ONE, MARK, 1.0 / root);
            (0..PAIRED).for_each(|k| values.set(ONE + 1 + k, BRAKE + k, STATE_MARK / root));
            for (head, step) in STEPS[layer].iter().enumerate() {
                let query = Query::step(*step, self.dims);
                self.write_query(layer, head, &query);
            }
            if let Some(kind) = LOOKS_AT[layer] {
                let head = STEPS[layer].len();
                let query = Query::look(kind, self.rng.random_range(0.0..std::f64::consts::TAU), self.dims);
                self.write_query(layer, head, &query);
                let spread = BEND / ((head_dim - PREFIX_VALUES) as f64).sqrt();
                for joint in 0..JOINTS {
                    for value in PREFIX_VALUES..head_dim {
                        let coefficient = spread * self.normal();
                        self.expert(layer, "self_attn.o_proj").set(joint, head * head_dim + value, coefficient);
                    }
                }
            }
        }
        self.write_coefficients(orbit);
    }

    fn write_query(&mut self, layer: usize, head: usize, query: &Query) {
        let head_dim = self.dims.expert.head_dim;
        // Scores are divided by √head_dim, and the time slot of an action row is √width after its norm.
        let scale = (head_dim as f64).sqrt() / self.root();
        let mut queries = self.expert(layer, "self_attn.q_proj");
        for (pair, [low, high]) in &query.pairs {
            queries.set(head * head_dim + pair, TIME, low * scale);
            queries.set(head * head_dim + pair + head_dim / 2, TIME, high * scale);
        }
    }

    /// Least squares of [`Orbit::action`] over the steps of all heads; the output projections subtract.
    fn write_coefficients(&mut self, orbit: &Orbit) {
        let (horizon, head_dim) = (self.dims.horizon, self.dims.expert.head_dim);
        let heads: Vec<(usize, usize)> = STEPS
            .iter()
            .enumerate()
            .flat_map(|(layer, steps)| (0..steps.len()).map(move |head| (layer, head)))
            .collect();
        let queries: Vec<Query> = STEPS.iter().flat_map(|s| s.iter()).map(|s| Query::step(*s, self.dims)).collect();
        let basis: Vec<Vec<f64>> =
            (0..horizon).map(|i| queries.iter().map(|q| q.state_weight(i, horizon)).collect()).collect();
        // The actions that are executed before the next plan count most.
        let weights: Vec<f64> = (0..horizon).map(|i| if i < horizon / 2 { 4.0 } else { 1.0 }).collect();
        let actions: Vec<_> = (0..horizon).map(|i| orbit.action(i)).collect();
        // N is there from the second layer on.
        let first_with_brake = STEPS[0].len();
        for (features, first) in [(0..ONE + 1, 0), (ONE + 1..FEATURES, first_with_brake)] {
            let basis: Vec<Vec<f64>> = basis.iter().map(|row| row[first..].to_vec()).collect();
            for feature in features {
                let targets: Vec<Vec<f64>> =
                    (0..JOINTS).map(|joint| actions.iter().map(|a| a[joint][feature]).collect()).collect();
                for (joint, x) in fit(&basis, &weights, &targets, 1e-6).iter().enumerate() {
                    for ((layer, head), coefficient) in heads[first..].iter().zip(x) {
                        let column = head * head_dim + feature;
                        self.expert(*layer, "self_attn.o_proj").set(joint, column, -coefficient);
                    }
                }
            }
        }
    }

    fn output(&mut self) {
        let (root, actions) = (self.root(), self.dims.action_dim);
        self.entry(&format!("{EXPERT}.norm.weight")).zero();
        let mut out = self.entry("action_out_proj.weight");
        out.zero();
        (0..actions).for_each(|k| out.set(k, k, TIME_SCALE / root));
        self.entry("action_out_proj.bias").zero();
    }
}

/// The query of an action row's head, as scores on rotary pairs.
struct Query {
    pairs: Vec<(usize, [f64; 2])>,
    theta: f64,
    state_only: f64,
    turning: Option<f64>,
}

impl Query {
    /// Weight of the state row falls from one to zero around action `at`; the other action rows have the rest.
    fn step(at: Option<f64>, dims: &Dims) -> Self {
        let even = (dims.horizon as f64).ln();
        match at {
            None => Self::new(dims, None, APART, APART, Vec::new()),
            Some(at) => Self::new(dims, Some(at), even, APART, Vec::new()),
        }
    }

    /// Looks at prompt or image rows, with a weight that rises in the second half of the chunk; the state row, whose
    /// values this head ignores, has the rest.
    fn look(kind: f64, angle: f64, dims: &Dims) -> Self {
        let rows: f64 = if kind > 0.0 { 20.0 } else { 512.0 };
        let mass = rows.ln() + 1.5 * KIND_SCORE + 0.5;
        let content = [angle.cos(), angle.sin()];
        let at = 0.6 * dims.horizon as f64;
        let prefix = vec![(CONTENT, content), (KIND, [kind * KIND_SCORE, 0.0])];
        Self::new(dims, Some(at), APART + mass, -APART, prefix)
    }

    fn new(dims: &Dims, at: Option<f64>, state_only: f64, suffix: f64, mut pairs: Vec<(usize, [f64; 2])>) -> Self {
        let theta = 10_000f64.powf(-2.0 * TURNING as f64 / dims.expert.head_dim as f64);
        pairs.extend([(STATE_ONLY, [state_only, 0.0]), (SUFFIX, [suffix, 0.0])]);
        // The state row is i + 1 positions before action i: a quarter turn at `at` is where the score falls fastest.
        let turning = at.map(|at| std::f64::consts::FRAC_PI_2 - theta * (at + 1.0));
        if let Some(phase) = turning {
            pairs.push((TURNING, [TURNING_SCORE * phase.cos(), TURNING_SCORE * phase.sin()]));
        }
        Self { pairs, theta, state_only, turning }
    }

    /// Softmax weight of the state row in action row `i`; prefix rows are too far below to count.
    fn state_weight(&self, i: usize, horizon: usize) -> f64 {
        let turning = self.turning.map_or(0.0, |phase| TURNING_SCORE * (phase + self.theta * (i + 1) as f64).cos());
        let (state, actions) = (self.state_only + turning, (horizon as f64).ln());
        1.0 / (1.0 + (actions - state).exp())
    }
}
