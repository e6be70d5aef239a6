//! Cosines and sines of the rotary embedding, one table for both stacks.

use std::sync::Arc;

use super::device::{Buffer, Device};
use crate::engine::EngineError;

/// `[positions, head_dim/2]` pairs (cos, sin) in float32, computed in float64 (spec section 4).
pub(super) fn table(device: &Arc<Device>, positions: usize, head_dim: usize) -> Result<Buffer<f32>, EngineError> {
    let half = head_dim / 2;
    let mut values = Vec::with_capacity(positions * head_dim);
    for p in 0..positions {
        for i in 0..half {
            let angle = p as f64 / 10000f64.powf(2.0 * i as f64 / head_dim as f64);
            values.push(angle.cos() as f32);
            values.push(angle.sin() as f32);
        }
    }
    Buffer::from_slice(device, &values)
}
