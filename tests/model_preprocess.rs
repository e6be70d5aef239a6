//! Both image resamplers against what the two Python stacks made of the same frames.

use std::path::Path;

use pi0_mps::model::{Frame, Preprocessor, Resampler};
use safetensors::SafeTensors;

/// Runs `check(name, frame, size, openpi bytes [size,size,3], lerobot values [size,size,3])` for each golden frame.
fn each_case(mut check: impl FnMut(&str, &Frame, usize, &[u8], &[f32])) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/preprocess.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    for case in 0..4 {
        let input = all.tensor(&format!("{case}.in.rgb8")).unwrap();
        let openpi = all.tensor(&format!("{case}.openpi.rgb8")).unwrap();
        let lerobot = all.tensor(&format!("{case}.lerobot.minus1_1")).unwrap();
        let [h, w, 3] = *input.shape() else { panic!("{:?}", input.shape()) };
        let frame = Frame::new(w, h, 3 * w, "rgb8", input.data().to_vec()).unwrap();
        let values: Vec<f32> = lerobot.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        check(&format!("{case}: {w}x{h}"), &frame, openpi.shape()[0], openpi.data(), &values);
    }
}

#[test]
fn openpi_bytes_are_equal() {
    each_case(|name, frame, size, openpi, _| {
        let mut p = Preprocessor::new(size, Resampler::OpenPi);
        let mut bytes = vec![7; openpi.len()];
        p.rgb8(frame, &mut bytes).unwrap();
        assert!(bytes == openpi, "{name}: {} bytes differ", bytes.iter().zip(openpi).filter(|(a, b)| a != b).count());

        let mut planes = vec![0.0; openpi.len()];
        p.planes(frame, &mut planes).unwrap();
        for (i, byte) in openpi.iter().enumerate() {
            let value = planes[(i % 3) * size * size + i / 3];
            assert_eq!(value, *byte as f32 / 255.0 * 2.0 - 1.0, "{name} at {i}");
        }
    });
}

#[test]
fn lerobot_values_agree() {
    each_case(|name, frame, size, _, lerobot| {
        let mut planes = vec![0.0; lerobot.len()];
        Preprocessor::new(size, Resampler::LeRobot).planes(frame, &mut planes).unwrap();
        let worst = lerobot.iter().enumerate().map(|(i, v)| (planes[(i % 3) * size * size + i / 3] - v).abs());
        let worst = worst.fold(0.0, f32::max);
        println!("{name}: largest difference {worst:e}");
        assert!(worst <= 1e-5, "{name}: {worst}");
    });
}
