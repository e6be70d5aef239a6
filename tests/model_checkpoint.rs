//! Golden checkpoints open with the dimensions they were made with.

use std::path::{Path, PathBuf};

use pi0_mps::model::{Checkpoint, Family, Origin, expected_tensors};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

#[test]
fn golden_checkpoints_open_with_their_dimensions() {
    for (name, family, state) in
        [("pi0_tiny", Family::Pi0, 8), ("pi0_tiny_masked", Family::Pi0, 8), ("pi05_tiny", Family::Pi05, 8)]
    {
        let c = Checkpoint::open(&golden(name)).unwrap();
        let d = c.dims();
        assert_eq!((c.origin(), d.family), (Origin::LeRobot, family));
        assert_eq!(
            (d.vision.layers, d.vision.width, d.vision.mlp, d.vision.heads, d.vision.patch, d.vision.image),
            (2, 32, 48, 4, 14, 56)
        );
        assert_eq!((d.trunk.layers, d.trunk.width, d.trunk.mlp, d.trunk.heads, d.trunk.head_dim), (3, 32, 64, 4, 8));
        assert_eq!(
            (d.expert.layers, d.expert.width, d.expert.mlp, d.expert.heads, d.expert.head_dim),
            (3, 16, 32, 4, 8)
        );
        assert_eq!((d.vocab, d.state_dim, d.action_dim, d.horizon, d.max_tokens), (96, state, 8, 8, 12));
        for (tensor, shape) in expected_tensors(d) {
            let t = c.tensor(&tensor, &shape).unwrap();
            assert!(t.to_f32().is_mapped(), "{tensor} is copied");
        }
    }
}
