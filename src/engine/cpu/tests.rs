//! Planted faults: what the golden comparison must notice, done to the insides of the engine.

#[path = "../../../tests/common/golden.rs"]
#[allow(dead_code, missing_docs)]
mod golden;

use golden::{ACTION_TOLERANCE, CASES, Golden, PREFIX_TOLERANCE, VELOCITY_TOLERANCE, relative_l2};

use super::*;
use crate::engine::{DecodeInput, Decoder, EncodeInput, Encoder, View};

struct Run {
    golden: Golden,
    encoder: CpuEncoder,
    decoder: CpuDecoder,
    cache: CpuCache,
}

impl Run {
    fn encoded(case: &str) -> Self {
        let golden = Golden::read(case);
        let checkpoint = Checkpoint::open(&golden.dir).unwrap();
        let engine = CpuEngine::load(&checkpoint, Resampler::from(checkpoint.origin()), 1).unwrap();
        let (encoder, decoder) = engine.stages().unwrap();
        let cache = engine.cache(golden.views.len(), golden.tokens.len()).unwrap();
        let mut run = Self { golden, encoder, decoder, cache };
        run.encode();
        run
    }

    fn encode(&mut self) -> Vec<f32> {
        let views: Vec<View<'_>> = self.golden.views.iter().map(|v| View::Planes(v)).collect();
        let input = EncodeInput { views: &views, tokens: &self.golden.tokens };
        self.encoder.encode_with_embeddings(&input, &mut self.cache).unwrap()
    }

    /// Distances of velocities and actions to the golden ones.
    fn distances(&mut self) -> (f64, f64) {
        let g = &self.golden;
        let input = DecodeInput { state: &g.state, noise: &g.noise, steps: 10, guidance: None };
        let mut actions = vec![0.0; g.noise.len()];
        let velocities = self.decoder.decode_with_velocities(&self.cache, &input, &mut actions).unwrap();
        (relative_l2(&velocities, &g.velocities), relative_l2(&actions, &g.actions))
    }

    fn agrees(&mut self) -> bool {
        let (velocities, actions) = self.distances();
        velocities <= VELOCITY_TOLERANCE && actions <= ACTION_TOLERANCE
    }
}

#[test]
fn without_a_fault_all_cases_agree() {
    for case in CASES {
        assert!(Run::encoded(case).agrees(), "{case}");
    }
}

#[test]
fn positions_shifted_by_one_are_noticed() {
    for case in CASES {
        let mut run = Run::encoded(case);
        // One position more, so that the shifted table still reaches the last row.
        run.decoder.suffix.scratch.rope.extend_to(1000);
        run.decoder.suffix.scratch.rope.shift_by_one();
        assert!(!run.agrees(), "{case}: the suffix one position late");
    }
}

#[test]
fn one_dropped_key_is_noticed() {
    for case in CASES {
        let mut run = Run::encoded(case);
        // The last prompt token: its key and value stand in for those of the row before, the positions stay.
        let (rows, dim) = (run.cache.rows, run.cache.head_dim);
        for layer in &mut run.cache.layers {
            layer.keys.copy_within((rows - 2) * dim..(rows - 1) * dim, (rows - 1) * dim);
            layer.values.copy_within((rows - 2) * dim..(rows - 1) * dim, (rows - 1) * dim);
        }
        assert!(!run.agrees(), "{case}");
    }
}

#[test]
fn a_prefix_one_row_short_is_noticed() {
    for case in CASES {
        let mut run = Run::encoded(case);
        run.cache.rows -= 1;
        assert!(!run.agrees(), "{case}");
    }
}

#[test]
fn an_omitted_state_row_is_noticed() {
    for case in ["pi0_tiny", "pi0_tiny_masked"] {
        let mut run = Run::encoded(case);
        run.decoder.suffix.state_rows = 0;
        assert!(!run.agrees(), "{case}");
    }
}

#[test]
fn keys_of_another_layer_are_noticed() {
    for case in CASES {
        let mut run = Run::encoded(case);
        let last = run.cache.layers.len() - 1;
        run.cache.layers.swap(0, last);
        assert!(!run.agrees(), "{case}");
    }
}

#[test]
fn views_in_the_wrong_order_are_noticed() {
    let mut run = Run::encoded("pi0_tiny");
    run.golden.views.swap(0, 1);
    let embeddings = run.encode();
    assert!(relative_l2(&embeddings, &run.golden.prefix_embs) > PREFIX_TOLERANCE);
    assert!(!run.agrees());
}
