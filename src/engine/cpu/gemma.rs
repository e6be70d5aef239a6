//! One Gemma layer over some rows: the same for the prefix trunk and the action expert.

use super::workers::Parallelism;

use super::attention::{Heads, KeyValues, attention};
use super::grow;
use super::math::{Modulation, Rope, add_gated, gelu_times, rms_norm};
use super::weights::GemmaLayer;
use crate::model::StackDims;

/// Keys (after rotation) and values of one layer, `[capacity, head_dim]` each.
#[derive(Clone)]
pub(super) struct LayerKv {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

impl LayerKv {
    /// Zeroed room for `capacity` rows.
    pub(super) fn new(capacity: usize, head_dim: usize) -> Self {
        Self { keys: vec![0.0; capacity * head_dim], values: vec![0.0; capacity * head_dim] }
    }

    /// The first `rows` rows.
    pub(super) fn first(&self, rows: usize, head_dim: usize) -> KeyValues<'_> {
        KeyValues { keys: &self.keys[..rows * head_dim], values: &self.values[..rows * head_dim] }
    }
}

/// What a stack of layers works with; grows to what is needed and is then reused.
pub(super) struct Scratch {
    dims: StackDims,
    /// Positions of both stacks.
    pub(super) rope: Rope,
    normed: Vec<f32>,
    queries: Vec<f32>,
    attended: Vec<f32>,
    sublayer: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    scores: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(dims: StackDims) -> Self {
        let empty = Vec::new;
        Self {
            dims,
            rope: Rope::new(dims.head_dim),
            normed: empty(),
            queries: empty(),
            attended: empty(),
            sublayer: empty(),
            gate: empty(),
            up: empty(),
            scores: empty(),
        }
    }

    /// Room for `rows` rows at positions below `positions`.
    pub(super) fn reserve(&mut self, rows: usize, positions: usize) {
        let d = self.dims;
        self.rope.extend_to(positions);
        grow(&mut self.normed, rows * d.width);
        grow(&mut self.queries, rows * d.heads * d.head_dim);
        grow(&mut self.attended, rows * d.heads * d.head_dim);
        grow(&mut self.sublayer, rows * d.width);
        grow(&mut self.gate, rows * d.mlp);
        grow(&mut self.up, rows * d.mlp);
    }
}

/// The rows a layer works on: their hidden states and where they stand.
pub(super) struct Rows<'a> {
    /// `[rows, width]`, updated in place.
    pub(super) hidden: &'a mut [f32],
    /// Position of the first row; the others follow.
    pub(super) position: usize,
}

impl GemmaLayer {
    /// First norm, then keys and values of these rows into `kv` from row `at` on.
    pub(super) fn write_keys_values(
        &self,
        threads: Parallelism,
        rows: &Rows<'_>,
        norm: Modulation<'_>,
        kv: &mut LayerKv,
        at: usize,
        scratch: &mut Scratch,
    ) {
        let d = scratch.dims;
        let n = rows.hidden.len() / d.width;
        let normed = &mut scratch.normed[..n * d.width];
        rms_norm(threads, rows.hidden, norm, normed);
        let range = at * d.head_dim..(at + n) * d.head_dim;
        let keys = &mut kv.keys[range.clone()];
        self.k.apply(threads, n, normed, keys);
        scratch.rope.rotate(threads, keys, 1, rows.position);
        self.v.apply(threads, n, normed, &mut kv.values[range]);
    }

    /// The rest of the layer: queries from the norm that [`write_keys_values`](Self::write_keys_values) has just made,
    /// attention over `visible`, and the MLP.
    pub(super) fn attend_and_feed(
        &self,
        threads: Parallelism,
        rows: &mut Rows<'_>,
        norms: [Modulation<'_>; 2],
        visible: &[KeyValues<'_>],
        scratch: &mut Scratch,
    ) {
        let d = scratch.dims;
        let n = rows.hidden.len() / d.width;
        let normed = &mut scratch.normed[..n * d.width];
        let queries = &mut scratch.queries[..n * d.heads * d.head_dim];
        let attended = &mut scratch.attended[..n * d.heads * d.head_dim];
        let sublayer = &mut scratch.sublayer[..n * d.width];

        self.q.apply(threads, n, normed, queries);
        scratch.rope.rotate(threads, queries, d.heads, rows.position);
        // All query heads share the keys, so a row's heads are rows of one head.
        attention(threads, Heads { count: 1, dim: d.head_dim }, queries, visible, attended, &mut scratch.scores);
        self.join(threads, &self.o, n, attended, norms[0], rows.hidden, sublayer);

        rms_norm(threads, rows.hidden, norms[1], normed);
        let (gate, up) = (&mut scratch.gate[..n * d.mlp], &mut scratch.up[..n * d.mlp]);
        self.gate.apply(threads, n, normed, gate);
        self.up.apply(threads, n, normed, up);
        gelu_times(threads, gate, up, d.mlp);
        self.join(threads, &self.down, n, gate, norms[1], rows.hidden, sublayer);
    }

    /// The sublayer's output joins the residual stream, gated where the norm is adaptive.
    #[allow(clippy::too_many_arguments)]
    fn join(
        &self,
        threads: Parallelism,
        output: &super::weights::Linear,
        rows: usize,
        x: &[f32],
        norm: Modulation<'_>,
        hidden: &mut [f32],
        sublayer: &mut [f32],
    ) {
        match norm.adaptive {
            None => output.add_to(threads, rows, x, hidden),
            Some(adaptive) => {
                output.apply(threads, rows, x, sublayer);
                add_gated(threads, hidden, adaptive.gate, sublayer);
            }
        }
    }
}
