//! What a perfect implementation would take: the larger of operations and bytes, stage by stage.

use crate::model::{Dims, StackDims};

/// Least milliseconds of each stage.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floors {
    pub vision: f64,
    pub trunk: f64,
    pub decoder: f64,
}

/// Multiply-adds of one row through a stack's layer, attention apart; and its weights.
fn layer(s: &StackDims) -> f64 {
    let attention = (2 * s.heads + 2) * s.head_dim * s.width;
    (attention + 3 * s.width * s.mlp) as f64
}

/// Multiply-adds of one query row over `keys` keys.
fn attention(s: &StackDims, keys: f64) -> f64 {
    2.0 * (s.heads * s.head_dim) as f64 * keys
}

impl Floors {
    /// For `views` views and `tokens` prompt tokens, ten steps, bf16, at `tflops` TFLOP/s and `bandwidth` TB/s.
    pub fn new(dims: &Dims, views: usize, tokens: usize, tflops: f64, bandwidth: f64) -> Self {
        let ms = |macs: f64, bytes: f64| (2.0 * macs / tflops / 1e9).max(bytes / bandwidth / 1e9);
        let v = &dims.vision;
        let rows = (views * v.tokens()) as f64;
        let (vw, per_view) = (v.width as f64, v.tokens() as f64);
        let weights = (v.layers * (4 * v.width * v.width + 2 * v.width * v.mlp)
            + 3 * v.patch * v.patch * v.width
            + v.width * dims.trunk.width) as f64;
        let vision = rows * (weights + v.layers as f64 * 2.0 * vw * per_view);

        let t = &dims.trunk;
        let prefix = rows + tokens as f64;
        // The last layer makes keys and values only.
        let last = (2 * t.head_dim * t.width) as f64;
        let full = t.layers.saturating_sub(1) as f64;
        let trunk_weights = full * layer(t) + last;
        let trunk = prefix * (trunk_weights + full * attention(t, prefix));

        let e = &dims.expert;
        let cache = (e.layers * 2 * e.head_dim) as f64 * prefix;
        let expert_weights = e.layers as f64 * layer(e) + (e.width * e.width) as f64;
        let horizon = dims.horizon as f64;
        let expert = horizon * (expert_weights + e.layers as f64 * attention(e, prefix + horizon));
        Self {
            vision: ms(vision, 2.0 * weights),
            trunk: ms(trunk, 2.0 * trunk_weights),
            decoder: 10.0 * ms(expert, 2.0 * (expert_weights + cache)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floors_are_those_of_the_cost_model() {
        for (views, vision, trunk, decoder) in [(1, 0.28, 1.32, 2.10), (2, 0.56, 2.57, 2.12), (3, 0.84, 3.85, 2.14)] {
            let f = Floors::new(&Dims::published(50), views, 20, 790.0, 3.0);
            for (ours, expected) in [(f.vision, vision), (f.trunk, trunk), (f.decoder, decoder)] {
                assert!((ours / expected - 1.0).abs() < 0.02, "{views} views: {ours:.3}, not {expected}");
            }
        }
    }
}
