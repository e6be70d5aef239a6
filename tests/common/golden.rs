//! Golden cases: inputs and outputs of the published PyTorch policies on random weights.

use std::path::{Path, PathBuf};

use safetensors::tensor::SafeTensors;

/// The cases of tests/fixtures/golden.
pub const CASES: [&str; 3] = ["pi0_tiny", "pi0_tiny_masked", "pi05_tiny"];

/// Relative L2 the engines are held to.
pub const PREFIX_TOLERANCE: f64 = 1e-5;
pub const VELOCITY_TOLERANCE: f64 = 1e-4;
pub const ACTION_TOLERANCE: f64 = 1e-4;

/// Inputs and outputs of one case; masked views and padding are left out.
pub struct Golden {
    pub dir: PathBuf,
    pub views: Vec<Vec<f32>>,
    pub tokens: Vec<u32>,
    pub state: Vec<f32>,
    pub noise: Vec<f32>,
    pub prefix_embs: Vec<f32>,
    pub velocities: Vec<f32>,
    pub actions: Vec<f32>,
    pub rtc: Option<GoldenRtc>,
}

/// Guided real-time chunking of a case: what is left of the previous chunk, and the actions per schedule.
pub struct GoldenRtc {
    pub previous: Vec<f32>,
    pub inference_delay: usize,
    pub execution_horizon: usize,
    /// linear, exp, ones, zeros.
    pub actions: [Vec<f32>; 4],
}

pub const SCHEDULES: [&str; 4] = ["linear", "exp", "ones", "zeros"];

/// tests/fixtures, or where `PI0_FIXTURES` says they were carried to.
pub fn fixtures() -> PathBuf {
    std::env::var_os("PI0_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
}

impl Golden {
    pub fn read(name: &str) -> Self {
        let dir = fixtures().join("golden").join(name);
        let bytes = std::fs::read(dir.join("case.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
        let floats = |name: &str| -> Vec<f32> { words(name).into_iter().map(f32::from_le_bytes).collect() };
        let mask = |name: &str| -> Vec<bool> { floats(name).into_iter().map(|v| v != 0.0).collect() };

        let (image_mask, token_mask) = (mask("in.image_mask"), mask("in.token_mask"));
        let valid_views = (0..image_mask.len()).filter(|n| image_mask[*n]);
        let tokens = words("in.tokens").into_iter().map(|b| i32::from_le_bytes(b) as u32);
        let embeddings = file.tensor("out.prefix_embs").unwrap();
        let (rows, width) = (embeddings.shape()[0], embeddings.shape()[1]);
        let tokens_per_view = (rows - token_mask.len()) / image_mask.len();
        let valid = |row: usize| match row.checked_sub(image_mask.len() * tokens_per_view) {
            None => image_mask[row / tokens_per_view],
            Some(token) => token_mask[token],
        };
        let prefix_embs = floats("out.prefix_embs");
        let case: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap();
        let rtc = case["rtc"].as_object().map(|rtc| GoldenRtc {
            previous: floats("in.rtc.prev_chunk_left_over"),
            inference_delay: rtc["d"].as_u64().unwrap() as usize,
            execution_horizon: rtc["eh"].as_u64().unwrap() as usize,
            actions: SCHEDULES.map(|s| floats(&format!("out.rtc.{s}"))),
        });
        Self {
            views: valid_views.map(|n| floats(&format!("in.image.{n}"))).collect(),
            tokens: tokens.zip(&token_mask).filter(|(_, valid)| **valid).map(|(id, _)| id).collect(),
            state: floats("in.state"),
            noise: floats("in.noise"),
            prefix_embs: prefix_embs
                .chunks(width)
                .enumerate()
                .filter(|(row, _)| valid(*row))
                .flat_map(|(_, row)| row.to_vec())
                .collect(),
            velocities: floats("out.v"),
            actions: floats("out.actions"),
            rtc,
            dir,
        }
    }
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    (difference / norm).sqrt()
}
