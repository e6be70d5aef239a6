//! Checkpoints of any size with seeded random weights, written as a LeRobot or openpi user has them.

use std::io::Write;
use std::path::Path;

use half::bf16;
use pi0_mps::model::{Dims, Family, StackDims, VisionDims, expected_tensors};
use rayon::prelude::*;

/// The widths of the published models with `layers` layers each, so that kernels run at their real sizes.
pub fn full_width(family: Family, layers: usize) -> Dims {
    let stack = |width, mlp| StackDims { layers, width, mlp, heads: 8, head_dim: 256 };
    Dims {
        family,
        vision: VisionDims { layers, width: 1152, mlp: 4304, heads: 16, patch: 14, image: 224 },
        trunk: stack(2048, 16384),
        expert: stack(1024, 4096),
        vocab: 64,
        state_dim: 32,
        action_dim: 32,
        horizon: 50,
        max_tokens: 48,
        min_period: 0.004,
        max_period: 4.0,
    }
}

/// Roughly normal numbers of variance one: a counter-based hash, the same for the same seed and index.
pub fn normal(seed: u64, i: u64) -> f32 {
    let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let sum = (z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48);
    (sum as f32 / 65536.0 - 2.0) * 1.732_050_8
}

pub fn normals(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| normal(seed, i)).collect()
}

/// Query weights this much larger make attention peaked: with flat attention a wrong position or mask hides.
pub const PEAK: f32 = 4.0;

fn deviation(name: &str, shape: &[usize], peak: f32) -> f32 {
    let inputs: usize = shape.iter().skip(1).product();
    let base = if shape.len() == 1 { 0.1 } else { 1.0 / (inputs as f32).sqrt() };
    if name.ends_with("q_proj.weight") { base * peak } else { base }
}

/// Writes config.json and model.safetensors (bf16) into `dir`, query weights `peak` times as large as the others.
pub fn write_checkpoint(dir: &Path, dims: &Dims, seed: u64, peak: f32) {
    let kind = if dims.family == Family::Pi0 { "pi0" } else { "pi05" };
    let config = serde_json::json!({
        "type": kind, "chunk_size": dims.horizon, "max_state_dim": dims.state_dim, "max_action_dim": dims.action_dim,
        "num_inference_steps": 10, "min_period": dims.min_period, "max_period": dims.max_period,
        "image_resolution": [dims.vision.image, dims.vision.image], "tokenizer_max_length": dims.max_tokens,
        "vision_num_attention_heads": dims.vision.heads,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tensors = expected_tensors(dims);
    let mut header = serde_json::Map::new();
    let mut at = 0usize;
    for (name, shape) in &tensors {
        let end = at + shape.iter().product::<usize>() * 2;
        header.insert(name.clone(), serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = serde_json::Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = std::io::BufWriter::new(std::fs::File::create(dir.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for (n, (name, shape)) in tensors.iter().enumerate() {
        let (len, deviation) = (shape.iter().product::<usize>(), deviation(name, shape, peak));
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(n as u64) << 20;
        let mut bytes = vec![0u8; len * 2];
        bytes.par_chunks_mut(1 << 16).enumerate().for_each(|(c, piece)| {
            for (i, b) in piece.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *b = bf16::from_f32(normal(seed, ((c << 15) + i) as u64) * deviation).to_le_bytes();
            }
        });
        file.write_all(&bytes).unwrap();
    }
    file.flush().unwrap();
}
