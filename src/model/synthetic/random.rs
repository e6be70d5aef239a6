//! Random weights of any size: each tensor is drawn when it is written, in pieces of which each has its own stream of
//! random numbers, so that the bytes do not depend on the number of threads.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::View;

use super::weights::random_scale;
use crate::model::{Dims, expected_tensors};

/// Elements of a piece.
const PIECE: usize = 1 << 16;

/// A tensor of a policy that is not there yet.
struct Drawn {
    name: String,
    shape: Vec<usize>,
    seed: u64,
    /// Its place among the tensors.
    index: u64,
}

impl View for Drawn {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let (centre, spread) = random_scale(&self.name, &self.shape);
        let mut bytes = vec![0; self.data_len()];
        bytes.par_chunks_mut(2 * PIECE).enumerate().for_each(|(piece, bytes)| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(self.index << 32 | piece as u64);
            for to in bytes.chunks_exact_mut(2) {
                let value = centre + spread * rng.sample::<f32, _>(StandardNormal);
                to.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
        });
        bytes.into()
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// Writes every tensor of a policy of these dimensions as bf16, with LeRobot's names.
pub(super) fn write(path: &Path, dims: &Dims, seed: u64) -> std::io::Result<()> {
    let tensors = expected_tensors(dims).into_iter().zip(0..).map(|((name, shape), index)| {
        let named = format!("model.{name}");
        (named, Drawn { name, shape, seed, index })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(std::io::Error::other)
}
