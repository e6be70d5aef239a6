//! Initial noise of the flow: standard normal, from a seed, the same on every machine.

use rand::SeedableRng;
use rand::distr::Distribution;
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// Where the noise of the next chunk comes from.
#[derive(Debug)]
pub struct NoiseSource {
    rng: ChaCha8Rng,
    noise: Vec<f32>,
}

impl NoiseSource {
    /// `len` values a chunk.
    pub fn new(seed: u64, len: usize) -> Self {
        let mut source = Self { rng: ChaCha8Rng::seed_from_u64(seed), noise: vec![0.0; len] };
        source.draw();
        source
    }

    fn draw(&mut self) {
        for x in &mut self.noise {
            *x = StandardNormal.sample(&mut self.rng);
        }
    }

    /// The noise of the chunk decoded now.
    pub fn current(&self) -> &[f32] {
        &self.noise
    }

    /// Draws the noise of the next chunk. Without it the noise is held, which keeps chunks on one mode of the policy.
    pub fn advance(&mut self) {
        self.draw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_repeatable_fresh_and_standard_normal() {
        let mut fresh = NoiseSource::new(3, 20_000);
        let first = fresh.current().to_vec();
        assert_eq!(first, NoiseSource::new(3, 20_000).current());
        fresh.advance();
        assert_ne!(first, fresh.current());
        let mean = first.iter().sum::<f32>() / 20_000.0;
        let var = first.iter().map(|x| x * x).sum::<f32>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.05, "mean {mean}, variance {var}");
    }
}
