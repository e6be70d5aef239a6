//! The engines against the published PyTorch policies, as a library and through `pi0 infer`.

#[allow(dead_code)]
#[path = "common/golden.rs"]
mod golden;

use std::path::Path;
use std::process::{Command, Output};

use golden::*;
use pi0_mps::engine::cpu::{CpuCache, CpuDecoder, CpuEncoder, CpuEngine};
use pi0_mps::engine::{
    DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, Guidance, GuidanceSchedule, KvCache, View,
};
use pi0_mps::model::{Checkpoint, Resampler};
use safetensors::SafeTensors;

const GUIDANCE_SCHEDULES: [GuidanceSchedule; 4] =
    [GuidanceSchedule::Linear, GuidanceSchedule::Exp, GuidanceSchedule::Ones, GuidanceSchedule::Zeros];

fn engine(case: &Golden, threads: usize) -> CpuEngine {
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    CpuEngine::load(&checkpoint, Resampler::from(checkpoint.origin()), threads).unwrap()
}

fn stages(case: &Golden, threads: usize) -> (CpuEncoder, CpuDecoder, CpuCache) {
    let engine = engine(case, threads);
    let (encoder, decoder) = engine.stages().unwrap();
    (encoder, decoder, engine.cache(case.views.len(), case.tokens.len()).unwrap())
}

fn encode(case: &Golden, encoder: &mut CpuEncoder, cache: &mut CpuCache) -> Vec<f32> {
    let views: Vec<View<'_>> = case.views.iter().map(|v| View::Planes(v)).collect();
    encoder.encode_with_embeddings(&EncodeInput { views: &views, tokens: &case.tokens }, cache).unwrap()
}

fn decode_input(case: &Golden) -> DecodeInput<'_> {
    DecodeInput { state: &case.state, noise: &case.noise, steps: 10, guidance: None }
}

fn decode(case: &Golden, decoder: &mut CpuDecoder, cache: &CpuCache) -> Vec<f32> {
    let mut actions = vec![f32::NAN; case.noise.len()];
    decoder.decode(cache, &decode_input(case), &mut actions).unwrap();
    actions
}

#[test]
fn embeddings_velocities_and_actions_are_the_published_ones() {
    for name in CASES {
        let case = Golden::read(name);
        let (mut encoder, mut decoder, mut cache) = stages(&case, 1);
        let embeddings = encode(&case, &mut encoder, &mut cache);
        assert_eq!(embeddings.len(), case.prefix_embs.len());
        assert_eq!(embeddings.len(), cache.len() * engine(&case, 1).dims().trunk.width);
        let mut actions = vec![f32::NAN; case.noise.len()];
        let velocities = decoder.decode_with_velocities(&cache, &decode_input(&case), &mut actions).unwrap();
        let distances = [
            (relative_l2(&embeddings, &case.prefix_embs), PREFIX_TOLERANCE, "prefix embeddings"),
            (relative_l2(&velocities, &case.velocities), VELOCITY_TOLERANCE, "velocities"),
            (relative_l2(&actions, &case.actions), ACTION_TOLERANCE, "actions"),
        ];
        for (distance, tolerance, what) in distances {
            println!("{name}: {what} {distance:.2e}");
            assert!(distance <= tolerance, "{name}: {what} are off by {distance:.2e}");
        }
    }
}

#[test]
fn guided_actions_are_the_published_ones() {
    for name in CASES {
        let case = Golden::read(name);
        let Some(rtc) = &case.rtc else { continue };
        let (mut encoder, mut decoder, mut cache) = stages(&case, 1);
        encode(&case, &mut encoder, &mut cache);
        let free = decode(&case, &mut decoder, &cache);
        for ((schedule, reference), label) in GUIDANCE_SCHEDULES.into_iter().zip(&rtc.actions).zip(SCHEDULES) {
            let guidance = Guidance {
                previous: &rtc.previous,
                inference_delay: rtc.inference_delay,
                execution_horizon: rtc.execution_horizon,
                max_weight: 10.0,
                schedule,
            };
            let input = DecodeInput { guidance: Some(guidance), ..decode_input(&case) };
            let mut actions = vec![f32::NAN; case.noise.len()];
            decoder.decode(&cache, &input, &mut actions).unwrap();
            let distance = relative_l2(&actions, reference);
            println!("{name}: {label} {distance:.2e}");
            assert!(distance <= ACTION_TOLERANCE, "{name}: {label} is off by {distance:.2e}");
            assert!(relative_l2(&free, reference) > 100.0 * ACTION_TOLERANCE, "{name}: {label} does nothing");
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for name in CASES {
        let case = Golden::read(name);
        let run = |threads| {
            let (mut encoder, mut decoder, mut cache) = stages(&case, threads);
            (encode(&case, &mut encoder, &mut cache), decode(&case, &mut decoder, &cache))
        };
        assert_eq!(run(1), run(3), "{name}");
    }
}

#[test]
fn a_warm_stage_gives_what_a_cold_one_gives() {
    let case = Golden::read("pi0_tiny");
    let (mut encoder, mut decoder, mut cache) = stages(&case, 1);
    encode(&case, &mut encoder, &mut cache);
    let cold = decode(&case, &mut decoder, &cache);
    // Another number of views and of steps in between.
    let fewer = EncodeInput { views: &[View::Planes(&case.views[0])], tokens: &case.tokens[..1] };
    encoder.encode(&fewer, &mut cache).unwrap();
    let mut actions = vec![0.0; case.noise.len()];
    decoder.decode(&cache, &DecodeInput { steps: 3, ..decode_input(&case) }, &mut actions).unwrap();
    assert_ne!(actions, cold);
    encode(&case, &mut encoder, &mut cache);
    assert_eq!(decode(&case, &mut decoder, &cache), cold);
}

#[test]
fn both_stages_at_once_give_bitwise_what_they_give_in_turn() {
    for threads in [1, 2] {
        let case = Golden::read("pi0_tiny");
        let other = EncodeInput { views: &[View::Planes(&case.views[1])], tokens: &case.tokens };
        let engine = engine(&case, threads);
        let (mut encoder, mut decoder) = engine.stages().unwrap();
        let (mut first, mut second) = (engine.cache(2, 16).unwrap(), engine.cache(2, 16).unwrap());
        encode(&case, &mut encoder, &mut first);
        encoder.encode(&other, &mut second).unwrap();
        let expected = [decode(&case, &mut decoder, &first), decode(&case, &mut decoder, &second)];

        for _ in 0..20 {
            let (decoded, encoded) = std::thread::scope(|scope| {
                let decoding = scope.spawn(|| decode(&case, &mut decoder, &first));
                let encoding = scope.spawn(|| {
                    let mut fresh = engine.cache(2, 16).unwrap();
                    encoder.encode(&other, &mut fresh).unwrap();
                    fresh
                });
                (decoding.join().unwrap(), encoding.join().unwrap())
            });
            assert_eq!(decoded, expected[0]);
            assert_eq!(decode(&case, &mut decoder, &encoded), expected[1]);
        }
    }
}

#[test]
fn wrong_inputs_are_refused_by_name() {
    let case = Golden::read("pi0_tiny");
    let engine = engine(&case, 1);
    let (mut encoder, mut decoder) = engine.stages().unwrap();
    let mut cache = engine.cache(2, 12).unwrap();
    let plane = View::Planes(&case.views[0]);
    let broken: Vec<f32> = case.views[0].iter().map(|v| v / 0.0).collect();

    fn says<T>(result: Result<T, EngineError>, expected: &str) {
        let message = result.err().expect("refused").to_string();
        assert_eq!(message, expected);
    }
    let mut encode = |views: &[View<'_>], tokens: &[u32]| encoder.encode(&EncodeInput { views, tokens }, &mut cache);
    says(encode(&[], &[1]), "views: expected at least 1, got 0");
    says(encode(&[plane], &[]), "prompt tokens: expected at least 1, got 0");
    says(encode(&[plane], &[5, 96]), "prompt token: expected an id below 96 (the vocabulary), got 96");
    says(encode(&[View::Planes(&[0.0; 7])], &[1]), "image planes: expected 9408 values, got 7");
    let message = encode(&[View::Planes(&broken)], &[1]).unwrap_err().to_string();
    assert!(message.starts_with("image planes: expected finite values, got "), "{message}");
    says(
        encode(&[plane; 3], &[1]),
        "prefix: expected at most 44 rows, the size of the cache slot, got 49 (3 views and 1 prompt tokens)",
    );

    let mut actions = vec![0.0; case.noise.len()];
    let empty = "cache slot: expected an encoded prefix, got an empty slot (encode into it first)";
    says(decoder.decode(&cache, &decode_input(&case), &mut actions), empty);
    let (mut encoder, _) = engine.stages().unwrap();
    encoder.encode(&EncodeInput { views: &[plane], tokens: &[1] }, &mut cache).unwrap();
    assert_eq!((cache.len(), cache.is_empty()), (17, false));
    decoder.decode(&cache, &decode_input(&case), &mut actions).unwrap();

    let mut decode = |input: &DecodeInput<'_>| decoder.decode(&cache, input, &mut actions);
    let good = decode_input(&case);
    says(decode(&DecodeInput { steps: 0, ..good }), "flow-matching steps: expected 1 to 1000, got 0");
    says(decode(&DecodeInput { state: &[0.0; 3], ..good }), "state: expected 8 values, got 3");
    says(decode(&DecodeInput { noise: &[0.0; 3], ..good }), "noise: expected 64 values, got 3");
    says(decode(&DecodeInput { state: &[f32::NAN; 8], ..good }), "state: expected finite values, got NaN at index 0");
    let guidance = Guidance {
        previous: &[0.0; 9],
        inference_delay: 0,
        execution_horizon: 4,
        max_weight: 10.0,
        schedule: GuidanceSchedule::Linear,
    };
    says(
        decode(&DecodeInput { guidance: Some(guidance), ..good }),
        "previous chunk: expected at most 8 rows of 8 values, got 9 values",
    );
    let guidance = Guidance { previous: &[0.0; 8], max_weight: f32::NAN, ..guidance };
    says(
        decode(&DecodeInput { guidance: Some(guidance), ..good }),
        "maximal guidance weight: expected 0 or more, got NaN",
    );
    assert!(engine.cache(0, 0).is_err() && engine.cache(usize::MAX, 2).is_err());

    // A failed encode leaves nothing to decode.
    assert!(encoder.encode(&EncodeInput { views: &[], tokens: &[1] }, &mut cache).is_err());
    assert!(cache.is_empty());
}

fn pi0(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pi0")).args(args).output().unwrap()
}

fn floats(file: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    (tensor.shape().to_vec(), tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

#[test]
fn infer_reproduces_the_golden_cases_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    for name in CASES {
        let case = Golden::read(name);
        let out = folder.path().join(format!("{name}.safetensors"));
        let (dir, file) = (case.dir.to_str().unwrap(), case.dir.join("case.safetensors"));
        let base = ["infer", "--checkpoint", dir, "--case", file.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let done = pi0(&[&base[..], &["--device", "cpu", "--json"]].concat());
        assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
        let summary: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        assert!(summary["relative_l2"]["v"].as_f64().unwrap() <= VELOCITY_TOLERANCE, "{summary}");

        let (shape, embeddings) = floats(&out, "prefix_embs");
        assert_eq!(shape[0], summary["prefix_rows"].as_u64().unwrap() as usize);
        assert!(relative_l2(&embeddings, &case.prefix_embs) <= PREFIX_TOLERANCE, "{name}");
        let (shape, velocities) = floats(&out, "v");
        assert_eq!(shape, [10, 8, 8]);
        assert!(relative_l2(&velocities, &case.velocities) <= VELOCITY_TOLERANCE, "{name}");
        let (shape, actions) = floats(&out, "actions");
        assert_eq!(shape, [8, 8]);
        assert!(relative_l2(&actions, &case.actions) <= ACTION_TOLERANCE, "{name}");

        let Some(rtc) = &case.rtc else { continue };
        let (d, s) = (rtc.inference_delay.to_string(), rtc.execution_horizon.to_string());
        for (label, reference) in SCHEDULES.into_iter().zip(&rtc.actions) {
            let done =
                pi0(&[&base[..], &["--rtc", label, "--inference-delay", &d, "--execution-horizon", &s]].concat());
            assert!(done.status.success(), "{name} {label}: {}", String::from_utf8_lossy(&done.stderr));
            let distance = relative_l2(&floats(&out, "actions").1, reference);
            assert!(distance <= ACTION_TOLERANCE, "{name} {label}: {distance:.2e}");
        }
    }
}

/// The case was written by training/check.py: other code, the same weights.
#[test]
fn the_shipped_policy_computes_what_its_training_code_computes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints/touch");
    let case = fixtures().join("touch/case.safetensors");
    let [checkpoint, case, out] = [&checkpoint, &case, &out].map(|path| path.to_str().unwrap());
    let done = pi0(&["infer", "--checkpoint", checkpoint, "--case", case, "--out", out, "--device", "cpu", "--json"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let summary: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    for (name, tolerance) in
        [("prefix_embs", PREFIX_TOLERANCE), ("v", VELOCITY_TOLERANCE), ("actions", ACTION_TOLERANCE)]
    {
        let distance = summary["relative_l2"][name].as_f64().unwrap();
        assert!(distance <= tolerance, "{name} are off by {distance:.2e}");
    }
}

#[test]
fn infer_refuses_what_does_not_fit_together() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let run = |case: &str, more: &[&str]| {
        let case = Golden::read(case);
        let (dir, file) = (case.dir.to_str().unwrap(), case.dir.join("case.safetensors"));
        let base = ["infer", "--checkpoint", dir, "--case", file.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let done = pi0(&[&base[..], more].concat());
        (done.status.code().unwrap(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let full = ["--rtc", "linear", "--inference-delay", "2", "--execution-horizon", "5"];
    for (case, flags, code, says) in [
        ("pi0_tiny", &["--rtc", "linear"][..], 2, "--inference-delay"),
        ("pi0_tiny", &["--inference-delay", "2"], 2, "--rtc"),
        ("pi0_tiny", &["--max-guidance-weight", "2"], 2, "--rtc"),
        ("pi0_tiny", &["--rtc", "cubic"], 2, "possible values: linear, exp, ones, zeros"),
        ("pi05_tiny", &full, 2, "--rtc needs the tensor 'in.rtc.prev_chunk_left_over'"),
        (
            "pi0_tiny",
            &["--rtc", "linear", "--inference-delay", "6", "--execution-horizon", "5"],
            2,
            "--inference-delay 6: must not exceed --execution-horizon (5)",
        ),
        (
            "pi0_tiny",
            &["--rtc", "linear", "--inference-delay", "2", "--execution-horizon", "9"],
            2,
            "--execution-horizon 9: must be 1 to the horizon, 8",
        ),
        ("pi0_tiny", &[&full[..], &["--max-guidance-weight", "NaN"]].concat(), 2, "--max-guidance-weight NaN"),
        ("pi0_tiny", &["--steps", "0"], 2, "flow-matching steps: expected 1 to 1000, got 0"),
        ("pi0_tiny", &["--threads", "0"], 2, "threads: expected at least 1, got 0"),
        ("pi0_tiny", &["--device", "gpu"], 2, "device: expected auto, cpu or cuda:N, got 'gpu'"),
        ("pi0_tiny", &["--device", "cuda:1"], 3, "device 'cuda:1' is not available"),
    ] {
        let (found, message) = run(case, flags);
        assert!(found == code && message.contains(says), "{flags:?}: exit {found}, {message}");
    }
    assert!(!out.exists(), "a refused run writes nothing");

    let nowhere = pi0(&["infer", "--checkpoint", "/nonexistent", "--case", "x", "--out", "y"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/nonexistent"));
}
