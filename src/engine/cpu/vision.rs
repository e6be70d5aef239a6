//! The SigLIP tower: all views at once, attention within each view only.

use super::workers::Parallelism;

use super::attention::{Heads, KeyValues, attention};
use super::grow;
use super::math::{gelu_all, layer_norm};
use super::weights::{VisionWeights, add_bias};
use crate::model::VisionDims;

/// The tower's scratch memory; grows to the number of views and is then reused.
pub(super) struct Vision {
    dims: VisionDims,
    patches: Vec<f32>,
    hidden: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    mlp: Vec<f32>,
    scores: Vec<f32>,
}

impl Vision {
    pub(super) fn new(dims: VisionDims) -> Self {
        let empty = Vec::new;
        Self {
            dims,
            patches: empty(),
            hidden: empty(),
            normed: empty(),
            q: empty(),
            k: empty(),
            v: empty(),
            attended: empty(),
            mlp: empty(),
            scores: empty(),
        }
    }

    /// Room for that many views.
    pub(super) fn reserve(&mut self, views: usize) {
        let rows = views * self.dims.tokens();
        grow(&mut self.patches, rows * 3 * self.dims.patch * self.dims.patch);
        for buffer in [&mut self.hidden, &mut self.normed, &mut self.q, &mut self.k, &mut self.v, &mut self.attended] {
            grow(buffer, rows * self.dims.width);
        }
        grow(&mut self.mlp, rows * self.dims.mlp);
    }

    /// Cuts `planes`, `[3, image, image]`, into the rows of view `view`: values in the order (channel, y, x), patches
    /// row by row.
    pub(super) fn set_view(&mut self, view: usize, planes: &[f32]) {
        let VisionDims { patch, image, .. } = self.dims;
        let side = image / patch;
        let row_len = 3 * patch * patch;
        let rows = &mut self.patches[view * side * side * row_len..(view + 1) * side * side * row_len];
        for (token, row) in rows.chunks_exact_mut(row_len).enumerate() {
            let (top, left) = (token / side * patch, token % side * patch);
            for (line, out) in row.chunks_exact_mut(patch).enumerate() {
                let (channel, y) = (line / patch, top + line % patch);
                let at = (channel * image + y) * image + left;
                out.copy_from_slice(&planes[at..at + patch]);
            }
        }
    }

    /// Writes the prefix tokens of the first `views` views, `[views · tokens, trunk width]`.
    pub(super) fn forward(&mut self, threads: Parallelism, weights: &VisionWeights, views: usize, out: &mut [f32]) {
        let d = self.dims;
        let (tokens, rows) = (d.tokens(), views * d.tokens());
        let patches = &self.patches[..rows * 3 * d.patch * d.patch];
        let hidden = &mut self.hidden[..rows * d.width];
        let normed = &mut self.normed[..rows * d.width];
        let [q, k, v, attended] =
            [&mut self.q, &mut self.k, &mut self.v, &mut self.attended].map(|b| &mut b[..rows * d.width]);
        let mlp = &mut self.mlp[..rows * d.mlp];
        let heads = Heads { count: d.heads, dim: d.width / d.heads };
        let view = tokens * d.width;

        weights.patch.apply(threads, rows, patches, hidden);
        hidden.chunks_exact_mut(view).for_each(|view| add_bias(view, &weights.positions));
        for layer in &weights.layers {
            layer_norm(threads, hidden, &layer.norm1.weight, &layer.norm1.bias, normed);
            layer.q.apply(threads, rows, normed, q);
            layer.k.apply(threads, rows, normed, k);
            layer.v.apply(threads, rows, normed, v);
            for (((q, keys), values), attended) in
                q.chunks(view).zip(k.chunks(view)).zip(v.chunks(view)).zip(attended.chunks_mut(view))
            {
                attention(threads, heads, q, &[KeyValues { keys, values }], attended, &mut self.scores);
            }
            layer.out.add_to(threads, rows, attended, hidden);

            layer_norm(threads, hidden, &layer.norm2.weight, &layer.norm2.bias, normed);
            layer.fc1.apply(threads, rows, normed, mlp);
            gelu_all(threads, mlp, d.mlp);
            layer.fc2.add_to(threads, rows, mlp, hidden);
        }
        layer_norm(threads, hidden, &weights.post_norm.weight, &weights.post_norm.bias, normed);
        weights.projector.apply(threads, rows, normed, out);
    }
}
