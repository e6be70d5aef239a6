//! The policy front over golden checkpoints with statistics and tokenizers of each origin beside them.

use std::path::{Path, PathBuf};

use pi0_mps::model::{ActionMode, Checkpoint, ModelError, Policy, PolicyOptions, Resampler};
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

/// A directory with a golden checkpoint, to which a test adds what it is about.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        for file in ["model.safetensors", "config.json"] {
            std::fs::copy(golden(name).join(file), dir.path(file)).unwrap();
        }
        dir
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn write(&self, file: &str, value: &Value) -> &Self {
        let path = self.path(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, value.to_string()).unwrap();
        self
    }

    fn config(&self, change: impl FnOnce(&mut Value)) -> &Self {
        let mut config: Value = serde_json::from_slice(&std::fs::read(self.path("config.json")).unwrap()).unwrap();
        change(&mut config);
        self.write("config.json", &config)
    }

    /// Every printable character its own token, in the 96 rows the golden models have.
    fn tokenizer(&self) -> &Self {
        let mut vocab = serde_json::Map::new();
        vocab.insert("<bos>".into(), 2.into());
        vocab.insert("\n".into(), 3.into());
        for (i, c) in (' '..='z').enumerate() {
            vocab.insert(c.to_string(), (4 + i).into());
        }
        self.write(
            "tokenizer.json",
            &json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                    "pre_tokenizer": null, "post_processor": null, "decoder": null,
                    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                              "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                              "vocab": vocab, "merges": []}}),
        )
    }

    fn state_file(&self, file: &str, tensors: &[(&str, Vec<f32>)]) -> &Self {
        let bytes: Vec<(&str, Vec<u8>)> =
            tensors.iter().map(|(n, v)| (*n, v.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
        let views = bytes.iter().map(|(n, b)| (*n, TensorView::new(Dtype::F32, vec![b.len() / 4], b).unwrap()));
        std::fs::write(self.path(file), safetensors::serialize(views, None).unwrap()).unwrap();
        self
    }

    /// LeRobot's processors with mean/std statistics over eight values.
    fn lerobot(&self, norm_map: &Value) -> &Self {
        let normalizer = |name: &str, file: &str| {
            json!({"name": name, "steps": [
                {"registry_name": "device_processor", "config": {"device": "cpu"}},
                {"registry_name": name, "config": {"eps": 1e-8, "features": {}, "norm_map": norm_map}, "state_file": file}]})
        };
        let ramp = |from: f32, step: f32| (0..8).map(|i| from + step * i as f32).collect::<Vec<_>>();
        let tensors = [
            ("observation.state.mean", ramp(0.5, 0.25)),
            ("observation.state.std", ramp(1.0, 0.5)),
            ("observation.state.q01", ramp(-2.0, 0.125)),
            ("observation.state.q99", ramp(2.0, 0.25)),
            ("action.mean", ramp(-0.5, 0.25)),
            ("action.std", ramp(0.25, 0.25)),
            ("action.q01", ramp(-3.0, 0.25)),
            ("action.q99", ramp(1.0, 0.25)),
        ];
        self.write("policy_preprocessor.json", &normalizer("normalizer_processor", "pre_step_5.safetensors"))
            .write("policy_postprocessor.json", &normalizer("unnormalizer_processor", "post_step_0.safetensors"))
            .state_file("pre_step_5.safetensors", &tensors)
            .state_file("post_step_0.safetensors", &tensors)
    }

    fn openpi(&self) -> &Self {
        self.write("config.json", &json!({"action_dim": 8, "action_horizon": 8, "vision_num_attention_heads": 4}))
    }

    fn open_with(&self, options: &PolicyOptions) -> Result<Policy, ModelError> {
        Policy::open(&Checkpoint::open(self.0.path())?, self.0.path(), options)
    }

    fn open(&self) -> Policy {
        self.open_with(&PolicyOptions::default()).unwrap()
    }

    fn refusal(&self, options: &PolicyOptions) -> String {
        self.open_with(options).unwrap_err().to_string()
    }
}

fn mean_std() -> Value {
    json!({"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"})
}

fn openpi_stats(n: usize) -> Value {
    let list = |x: f64| vec![x; n];
    let one = |m, s, lo, hi| json!({"mean": list(m), "std": list(s), "q01": list(lo), "q99": list(hi)});
    json!({"norm_stats": {"state": one(0.5, 2.0, -1.0, 1.0), "actions": one(-0.5, 0.5, -2.0, 2.0)}})
}

#[test]
fn a_lerobot_policy_reads_what_lies_beside_it() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer().lerobot(&mean_std());
    let p = dir.open();
    assert_eq!(p.cameras(), ["observation.images.cam0", "observation.images.cam1"]);
    assert_eq!((p.state_len(), p.action_len()), (8, 8));
    assert_eq!(p.preprocessor().resampler(), Resampler::LeRobot);
    assert!(!p.state_in_prompt() && p.relative_actions() == [false; 8]);

    let state: Vec<f64> = (0..8).map(|i| 0.5 + 0.25 * f64::from(i) + 1.0).collect();
    let mut out = [9.0f32; 8];
    p.normalize_state(&state, &mut out).unwrap();
    let expected: Vec<f32> = (0..8).map(|i| (1.0 / (1.0 + 0.5 * f64::from(i) + 1e-8)) as f32).collect();
    assert_eq!(out[..], expected);

    let mut robot = [0.0; 8];
    p.to_robot(&[2.0; 8], &state, &mut robot).unwrap();
    let expected: Vec<f64> =
        (0..8).map(|i| 2.0 * (0.25 + 0.25 * f64::from(i)) + (-0.5 + 0.25 * f64::from(i))).collect();
    assert_eq!(robot[..], expected);

    assert_eq!(p.tokens("ab", &state).unwrap(), [2, 4 + 65, 4 + 66, 3]);
    let long = p.tokens("a b c d e f g h i j", &state).unwrap();
    assert_eq!(long.len(), 12, "cut at the right");
    assert_eq!(long[..4], [2, 4 + 65, 4, 4 + 66]);
}

#[test]
fn a_shorter_robot_is_padded_with_zeros() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer().lerobot(&mean_std()).config(|c| {
        c["input_features"]["observation.state"]["shape"] = json!([3]);
        c["output_features"]["action"]["shape"] = json!([2]);
    });
    let p = dir.open();
    assert_eq!((p.state_len(), p.action_len()), (3, 2));
    let mut out = [9.0f32; 8];
    p.normalize_state(&[0.5, 0.75, 2.0], &mut out).unwrap();
    assert_eq!(out, [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let mut model = [9.0f32; 16];
    p.to_model(&[-0.5, -0.25, -0.25, 0.25], &[0.0; 3], &mut model).unwrap();
    assert_eq!((model[0], model[1], model[9]), (0.0, 0.0, 1.0));
    assert!(model[2..8].iter().chain(&model[10..]).all(|v| *v == 0.0));
}

#[test]
fn a_policy_says_where_it_looked_for_statistics_and_tokenizer() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer();
    let e = dir.refusal(&PolicyOptions::default());
    for file in [
        "policy_preprocessor.json",
        "norm_stats.json",
        "stats.json",
        "assets/**/norm_stats.json",
        "normalize_inputs",
        "the parameter norm_stats",
    ] {
        assert!(e.contains(file), "{file} is not in: {e}");
    }
    dir.lerobot(&mean_std());
    std::fs::remove_file(dir.path("tokenizer.json")).unwrap();
    let e = dir.refusal(&PolicyOptions::default());
    assert!(e.contains("tokenizer/tokenizer.json") && e.contains("the parameter tokenizer"), "{e}");
    let e = dir.refusal(&PolicyOptions { tokenizer: Some(dir.path("t.json")), ..PolicyOptions::default() });
    assert!(e.contains("t.json"), "{e}");
}

#[test]
fn statistics_are_found_in_every_format() {
    let given = |path: PathBuf| PolicyOptions { norm_stats: Some(path), ..PolicyOptions::default() };
    let first = |p: &Policy| {
        let mut out = [0.0f32; 8];
        p.normalize_state(&[4.5; 8], &mut out).unwrap();
        out[0]
    };
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer().lerobot(&mean_std());
    assert_eq!(first(&dir.open()), 4.0);
    for file in ["policy_preprocessor.json", "pre_step_5.safetensors", ""] {
        assert_eq!(first(&dir.open_with(&given(dir.path(file))).unwrap()), 4.0, "{file}");
    }
    dir.write("other/assets/lab/arm/norm_stats.json", &openpi_stats(8));
    assert_eq!(first(&dir.open_with(&given(dir.path("other"))).unwrap()), 2.0, "openpi's, with LeRobot's formula");
    let plain = json!({"observation.state": {"mean": ([0.5; 8]), "std": ([1.0; 8]), "count": [12]},
                       "observation.images.cam0": {"mean": [[[0.1]]]},
                       "action": {"mean": ([0.0; 8]), "std": ([1.0; 8])}});
    dir.write("set/meta/stats.json", &plain);
    assert_eq!(first(&dir.open_with(&given(dir.path("set"))).unwrap()), 4.0, "a dataset's");

    dir.write("other/assets/second/norm_stats.json", &openpi_stats(8));
    let e = dir.refusal(&given(dir.path("other")));
    assert!(e.contains("several robots") && e.contains("second") && e.contains("lab"), "{e}");
}

#[test]
fn statistics_inside_older_weights_are_read() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer();
    let bytes = std::fs::read(dir.path("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let write = |mean: f32| {
        let [m, s] = [mean, 2.0].map(|x| x.to_le_bytes().repeat(8));
        let buffers = [
            ("normalize_inputs.buffer_observation_state.mean", &m),
            ("normalize_inputs.buffer_observation_state.std", &s),
            ("unnormalize_outputs.buffer_action.mean", &m),
            ("unnormalize_outputs.buffer_action.std", &s),
        ];
        let mut views: Vec<(String, TensorView<'_>)> = file
            .iter()
            .map(|(n, t)| (format!("model.{n}"), TensorView::new(t.dtype(), t.shape().to_vec(), t.data()).unwrap()))
            .collect();
        views.extend(buffers.map(|(n, b)| (n.to_string(), TensorView::new(Dtype::F32, vec![8], b).unwrap())));
        std::fs::write(dir.path("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    };
    write(1.0);
    let mut out = [0.0; 8];
    dir.open().to_robot(&[3.0; 8], &[0.0; 8], &mut out).unwrap();
    assert_eq!(out, [7.0; 8]);
    // What the base files hold: buffers that were never filled.
    write(f32::INFINITY);
    let e = dir.refusal(&PolicyOptions::default());
    assert!(e.contains("buffer_observation_state.mean[0] is inf") && e.contains("model.safetensors"), "{e}");
}

#[test]
fn lost_statistics_and_broken_ones_are_told_apart() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer().lerobot(&mean_std());
    dir.state_file("pre_step_5.safetensors", &[("action.mean", vec![0.0; 8])]);
    let e = dir.refusal(&PolicyOptions::default());
    assert!(e.contains("no tensor 'observation.state.*'") && e.contains("pre_step_5"), "{e}");
    std::fs::remove_file(dir.path("pre_step_5.safetensors")).unwrap();
    assert!(dir.refusal(&PolicyOptions::default()).contains("pre_step_5.safetensors"));
    dir.write("policy_preprocessor.json", &json!({"steps": [{"registry_name": "normalizer_processor", "config": {}}]}));
    assert!(dir.refusal(&PolicyOptions::default()).contains("names no 'state_file'"));
    dir.write(
        "policy_preprocessor.json",
        &json!({"steps": [{"registry_name": "normalizer_processor", "config": {}, "state_file": "../x.safetensors"}]}),
    );
    assert!(dir.refusal(&PolicyOptions::default()).contains("expected a file name"));
    std::fs::write(dir.path("policy_preprocessor.json"), "{\"steps\": [NaN]}").unwrap();
    assert!(dir.refusal(&PolicyOptions::default()).contains("holds NaN or Infinity"));

    let options = |v: &Value| {
        dir.write("s.json", v);
        PolicyOptions { norm_stats: Some(dir.path("s.json")), ..PolicyOptions::default() }
    };
    dir.lerobot(&mean_std());
    let mut stats = openpi_stats(8);
    stats["norm_stats"]["state"]["std"][3] = Value::Null;
    assert!(dir.refusal(&options(&stats)).contains("state.std[3] is NaN"));
    assert!(dir.refusal(&options(&openpi_stats(7))).contains("expected at least 8 values, found 7"));
    assert!(dir.refusal(&options(&json!({"nothing": 1}))).contains("no statistics"));
}

#[test]
fn modes_follow_the_processor_then_the_configuration() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer().lerobot(&json!({"STATE": "QUANTILES", "ACTION": "IDENTITY"}));
    let mut out = [0.0f32; 8];
    dir.open().normalize_state(&[0.0; 8], &mut out).unwrap();
    assert_eq!(out[0], 0.0, "halfway between -2 and 2");
    let mut robot = [0.0; 8];
    dir.open().to_robot(&[0.25; 8], &[0.0; 8], &mut robot).unwrap();
    assert_eq!(robot, [0.25; 8]);
    dir.lerobot(&json!({"STATE": "SOFTMAX"}));
    assert!(dir.refusal(&PolicyOptions::default()).contains("'SOFTMAX' of STATE"));
    // Nothing to normalise needs no statistics.
    let bare = Dir::new("pi0_tiny");
    bare.tokenizer().config(|c| c["normalization_mapping"] = json!({"STATE": "IDENTITY", "ACTION": "IDENTITY"}));
    bare.open().normalize_state(&[0.5; 8], &mut out).unwrap();
    assert_eq!(out, [0.5; 8]);
}

#[test]
fn pi05_writes_the_normalised_state_into_its_prompt() {
    let dir = Dir::new("pi05_tiny");
    dir.tokenizer().lerobot(&json!({"STATE": "QUANTILES", "ACTION": "QUANTILES"})).config(|c| {
        c["tokenizer_max_length"] = json!(200);
        c["input_features"]["observation.state"]["shape"] = json!([2]);
    });
    let p = dir.open();
    assert!(p.state_in_prompt());
    // q01 and q99 are -2 and 2, then -1.875 and 2.25.
    let ids = p.tokens(" go_on ", &[-2.5, 2.25]).unwrap();
    let text: String =
        ids[1..].iter().map(|i| if *i == 3 { '\n' } else { char::from(b' ' + (*i as u8 - 4)) }).collect();
    assert_eq!(text, "Task: go on, State: -1 255;\nAction: ", "two numbers: the state is not padded");
    let e = p.tokens("go", &[0.0, f64::NAN]).unwrap_err().to_string();
    assert!(e.contains("joint state[1] is NaN"), "{e}");
    assert!(p.tokens("go", &[0.0]).unwrap_err().to_string().contains("expected 2"));

    dir.config(|c| c["discrete_state_input"] = json!(false));
    assert_eq!(dir.open().tokens("ab", &[]).unwrap(), [2, 4 + 65, 4 + 66, 3]);
}

#[test]
fn an_openpi_policy_has_its_slots_statistics_and_formula() {
    let dir = Dir::new("pi0_tiny");
    dir.openpi().tokenizer().write("assets/arm/norm_stats.json", &openpi_stats(6));
    let e = dir.refusal(&PolicyOptions::default());
    assert!(e.contains("action_mode"), "{e}");
    let delta = |absolute_actions| PolicyOptions {
        action_mode: ActionMode::Delta,
        absolute_actions,
        ..PolicyOptions::default()
    };
    let p = dir.open_with(&delta(vec![5])).unwrap();
    assert_eq!(p.cameras(), ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]);
    assert_eq!((p.state_len(), p.action_len(), p.preprocessor().resampler()), (6, 6, Resampler::OpenPi));
    assert_eq!(p.relative_actions(), [true, true, true, true, true, false]);
    let mut robot = [0.0; 6];
    p.to_robot(&[1.0; 8], &[10.0; 6], &mut robot).unwrap();
    let value = 1.0 * (0.5 + 1e-6) - 0.5;
    assert_eq!(robot, [value + 10.0, value + 10.0, value + 10.0, value + 10.0, value + 10.0, value]);
    assert_eq!(p.tokens(" a_b", &[]).unwrap(), [2, 4 + 65, 4, 4 + 66, 3]);
    // Statistics that were computed over padded vectors.
    let mut padded = openpi_stats(8);
    for (feature, real) in [("state", 7), ("actions", 5)] {
        for list in padded["norm_stats"][feature].as_object_mut().unwrap().values_mut() {
            list.as_array_mut().unwrap()[real..].fill(json!(0.0));
        }
    }
    dir.write("assets/arm/norm_stats.json", &padded);
    let absolute = PolicyOptions { action_mode: ActionMode::Absolute, ..PolicyOptions::default() };
    let p = dir.open_with(&absolute).unwrap();
    assert_eq!((p.state_len(), p.action_len()), (7, 5));
}

#[test]
fn a_foreign_tokenizer_is_refused_by_its_ids() {
    let dir = Dir::new("pi0_tiny");
    dir.tokenizer().lerobot(&mean_std());
    let mut t: Value = serde_json::from_slice(&std::fs::read(dir.path("tokenizer.json")).unwrap()).unwrap();
    t["model"]["vocab"]["a"] = json!(96);
    dir.write("tokenizer.json", &t);
    let e = dir.open().tokens("a", &[0.0; 8]).unwrap_err().to_string();
    assert!(e.contains("token 96") && e.contains("96 rows") && e.contains("tokenizer.json"), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Robot to model to robot, for each formula and choice of absolute joints: what guided chunking does with a leftover.
    #[test]
    fn robot_units_come_back(
        actions in prop::collection::vec(-10.0f64..10.0, 8..40),
        state in prop::collection::vec(-3.0f64..3.0, 8),
        absolute in prop::collection::btree_set(0usize..8, 0..8),
        quantiles in any::<bool>(),
        openpi in any::<bool>(),
    ) {
        let dir = Dir::new(if openpi && quantiles { "pi05_tiny" } else { "pi0_tiny" });
        if openpi {
            dir.openpi().tokenizer().write("norm_stats.json", &openpi_stats(8));
        } else {
            let mode = if quantiles { "QUANTILES" } else { "MEAN_STD" };
            dir.tokenizer().lerobot(&json!({"STATE": mode, "ACTION": mode}));
        }
        let options = PolicyOptions {
            action_mode: ActionMode::Delta,
            absolute_actions: absolute.into_iter().collect(),
            ..PolicyOptions::default()
        };
        let p = dir.open_with(&options).unwrap();
        let rows = actions.len() / 8;
        let actions = &actions[..rows * 8];
        let mut model = vec![0.0f32; rows * 8];
        let mut back = vec![0.0; rows * 8];
        p.to_model(actions, &state, &mut model).unwrap();
        p.to_robot(&model, &state, &mut back).unwrap();
        for (a, b) in actions.iter().zip(&back) {
            // Half a unit of f32 at the largest normalised value.
            prop_assert!((a - b).abs() < 2e-5, "{a} came back as {b}");
        }
    }
}
