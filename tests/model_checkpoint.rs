//! Checkpoints: golden ones open, renamed and converted copies hold the same values, broken ones say what is wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pi0_mps::model::{Checkpoint, Dtype, Family, Origin, TRUNK, expected_tensors};
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype as FileDtype, SafeTensors};

const TABLE: &str = "paligemma_with_expert.paligemma.lm_head.weight";
const FAMILIES: [(&str, Family); 3] =
    [("pi0_tiny", Family::Pi0), ("pi0_tiny_masked", Family::Pi0), ("pi05_tiny", Family::Pi05)];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

/// A checkpoint in memory, to be changed and written.
#[derive(Clone)]
struct Parts {
    config: serde_json::Value,
    tensors: BTreeMap<String, (FileDtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn golden(name: &str) -> Self {
        let bytes = std::fs::read(golden(name).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors =
            file.iter().map(|(n, t)| (n.into(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
        let config = std::fs::read(golden(name).join("config.json")).unwrap();
        Self { config: serde_json::from_slice(&config).unwrap(), tensors }
    }

    fn rename(&mut self, f: impl Fn(&str) -> String) {
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(n, t)| (f(&n), t)).collect();
    }

    fn add(&mut self, name: &str, dtype: FileDtype, shape: &[usize]) {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        self.tensors.insert(name.into(), (dtype, shape.to_vec(), vec![0; bytes]));
    }

    fn bytes(&self) -> Vec<u8> {
        let views: Vec<(String, TensorView<'_>)> =
            self.tensors.iter().map(|(n, (d, s, b))| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap())).collect();
        safetensors::serialize(views, None).unwrap()
    }

    fn write(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors"), self.bytes()).unwrap();
        std::fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        dir
    }

    fn open(&self) -> Result<Checkpoint, String> {
        let dir = self.write();
        Checkpoint::open(dir.path()).map_err(|e| e.to_string())
    }
}

/// Every value the model needs, by canonical name.
fn values(c: &Checkpoint) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for (name, shape) in expected_tensors(c.dims()) {
        let tensor = if name == TABLE { c.token_table().unwrap() } else { c.tensor(&name, &shape).unwrap() };
        assert_eq!(tensor.shape(), shape);
        all.insert(name, tensor.to_f32().to_vec());
    }
    all
}

#[test]
fn golden_checkpoints_open_with_their_dimensions() {
    for (name, family) in FAMILIES {
        let c = Checkpoint::open(&golden(name)).unwrap();
        let d = c.dims();
        assert_eq!((c.origin(), d.family), (Origin::LeRobot, family));
        let v = &d.vision;
        assert_eq!((v.layers, v.width, v.mlp, v.heads, v.patch, v.image, v.tokens()), (2, 32, 48, 4, 14, 56, 16));
        assert_eq!((d.trunk.layers, d.trunk.width, d.trunk.mlp, d.trunk.heads, d.trunk.head_dim), (3, 32, 64, 4, 8));
        assert_eq!((d.expert.layers, d.expert.width, d.expert.mlp), (3, 16, 32));
        assert_eq!((d.vocab, d.state_dim, d.action_dim, d.horizon, d.max_tokens), (96, 8, 8, 8, 12));
        for (tensor, shape) in expected_tensors(d) {
            let t = c.tensor(&tensor, &shape).unwrap();
            assert!(t.to_f32().is_mapped(), "{tensor} is copied");
            assert_eq!(bytemuck::cast_slice::<f32, u8>(&t.to_f32()), t.bytes());
        }
        let file = Checkpoint::open(&golden(name).join("model.safetensors")).unwrap();
        assert_eq!(file.dims(), d, "the file itself opens too");
    }
}

#[test]
fn renamed_copies_hold_the_same_values() {
    let older = |n: &str| {
        let p = "paligemma_with_expert.paligemma";
        n.replace(&format!("{p}.model.vision_tower"), &format!("{p}.vision_tower"))
            .replace(&format!("{p}.model.multi_modal_projector"), &format!("{p}.multi_modal_projector"))
            .replace(&format!("{p}.model.language_model"), &format!("{p}.language_model.model"))
            .replace(&format!("{p}.lm_head"), &format!("{p}.language_model.lm_head"))
    };
    let other_time_mlp = |n: &str| match n.strip_prefix("action_time_mlp_") {
        Some(rest) => format!("time_mlp_{rest}"),
        None => n.strip_prefix("time_mlp_").map_or(n.into(), |rest| format!("action_time_mlp_{rest}")),
    };
    for (name, family) in FAMILIES {
        let expected = values(&Checkpoint::open(&golden(name)).unwrap());
        type Rename<'a> = (&'a str, &'a dyn Fn(&str) -> String);
        let renames: [Rename<'_>; 5] = [
            ("prefix", &|n| format!("model.{n}")),
            ("embed_tokens", &|n| n.replace("paligemma.lm_head", "paligemma.model.language_model.embed_tokens")),
            ("older tree", &older),
            ("older tree, prefix", &|n| format!("model.{}", older(n))),
            ("time mlp", &other_time_mlp),
        ];
        for (what, rename) in renames {
            let mut parts = Parts::golden(name);
            parts.rename(rename);
            let dir = parts.write();
            let c = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(c.dims().family, family);
            assert!(values(&c) == expected, "{name}, {what}");
        }
    }
}

#[test]
fn half_precision_copies_hold_the_rounded_values() {
    for (name, _) in FAMILIES {
        let expected = values(&Checkpoint::open(&golden(name)).unwrap());
        type Kind = (FileDtype, Dtype, fn(f32) -> [u8; 2], fn([u8; 2]) -> f32);
        let kinds: [Kind; 2] = [
            (FileDtype::BF16, Dtype::Bf16, |x| bf16::from_f32(x).to_le_bytes(), |b| bf16::from_le_bytes(b).to_f32()),
            (FileDtype::F16, Dtype::F16, |x| f16::from_f32(x).to_le_bytes(), |b| f16::from_le_bytes(b).to_f32()),
        ];
        for (file, dtype, to, from) in kinds {
            let mut parts = Parts::golden(name);
            for (d, _, bytes) in parts.tensors.values_mut() {
                let floats = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                *bytes = floats.flat_map(to).collect();
                *d = file;
            }
            let dir = parts.write();
            let c = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(c.token_table().unwrap().dtype(), dtype);
            let rounded: BTreeMap<_, Vec<f32>> =
                expected.iter().map(|(n, v)| (n.clone(), v.iter().map(|x| from(to(*x))).collect())).collect();
            assert!(values(&c) == rounded, "{name}, {file:?}");
        }
    }
}

#[test]
fn a_row_of_the_token_table_is_that_of_the_whole() {
    let c = Checkpoint::open(&golden("pi0_tiny")).unwrap();
    let table = c.token_table().unwrap();
    let mut row = vec![0.0; 32];
    table.row_f32(95, &mut row).unwrap();
    assert_eq!(row, table.to_f32()[95 * 32..]);
    for (index, len, says) in [(96, 32, "row 96"), (usize::MAX, 32, "row 1844"), (0, 31, "31 values")] {
        let e = table.row_f32(index, &mut vec![0.0; len]).unwrap_err().to_string();
        assert!(e.contains(says) && e.contains(TABLE), "{e}");
    }
}

#[test]
fn what_no_policy_computes_with_is_skipped() {
    let mut parts = Parts::golden("pi0_tiny");
    // Of a type that could not even be read: it is never looked at.
    parts.add("paligemma_with_expert.gemma_expert.lm_head.weight", FileDtype::I64, &[96, 16]);
    parts.add("normalize_inputs.buffer_observation_state.mean", FileDtype::F32, &[8]);
    parts.add("value_head.weight", FileDtype::F32, &[3]);
    parts.tensors.remove(&format!("{TRUNK}.norm.weight")).unwrap();
    let dir = parts.write();
    let c = Checkpoint::open(dir.path()).unwrap();
    assert!(values(&c) == values(&Checkpoint::open(&golden("pi0_tiny")).unwrap()));
}

#[test]
fn shards_are_read_through_their_index() {
    let all = Parts::golden("pi05_tiny");
    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    for half in 0..2 {
        let mut part = all.clone();
        let keep: Vec<String> =
            all.tensors.keys().enumerate().filter(|(i, _)| i % 2 == half).map(|p| p.1.clone()).collect();
        part.tensors.retain(|n, _| keep.contains(n));
        let name = format!("model-{half}.safetensors");
        std::fs::write(dir.path().join(&name), part.bytes()).unwrap();
        map.extend(keep.into_iter().map(|n| (n, name.clone().into())));
    }
    std::fs::write(dir.path().join("config.json"), all.config.to_string()).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let write = |map: &serde_json::Map<String, serde_json::Value>| {
        std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    };
    write(&map);
    let c = Checkpoint::open(dir.path()).unwrap();
    assert!(values(&c) == values(&Checkpoint::open(&golden("pi05_tiny")).unwrap()));

    map.insert(TABLE.into(), "../elsewhere.safetensors".into());
    write(&map);
    let e = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("index.json") && e.contains(TABLE) && e.contains("elsewhere"), "{e}");
    map.insert(TABLE.into(), "lost.safetensors".into());
    write(&map);
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("lost.safetensors"));
}

#[test]
fn openpi_configuration_and_none_are_understood() {
    let mut parts = Parts::golden("pi0_tiny");
    parts.config = serde_json::json!({"action_dim": 8, "action_horizon": 10, "paligemma_variant": "gemma_2b",
                                      "vision_num_attention_heads": 4, "precision": "float32"});
    let c = parts.open().unwrap();
    assert_eq!((c.origin(), c.dims().horizon, c.dims().max_tokens), (Origin::OpenPi, 10, 48));

    let dir = parts.write();
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_eq!((c.origin(), c.dims().horizon, c.dims().vision.heads), (Origin::OpenPi, 50, 16));
}

/// Each fault, and what its message must contain beside the file.
#[test]
fn each_fault_names_file_tensor_expected_and_found() {
    type Change = fn(&mut Parts);
    let q = format!("{TRUNK}.layers.1.self_attn.q_proj.weight");
    let cases: &[(&str, &str, Change, &[&str])] = &[
        (
            "missing",
            "pi0_tiny",
            |p| drop(p.tensors.remove("state_proj.bias")),
            &["state_proj.bias", "[16]", "no such tensor"],
        ),
        (
            "a layer missing in the middle",
            "pi0_tiny",
            |p| p.tensors.retain(|n, _| !n.starts_with(&format!("{TRUNK}.layers.1."))),
            &["language_model.layers.1", "a layer 1, because there is a layer 2", "no such tensors"],
        ),
        (
            "a shorter expert",
            "pi0_tiny",
            |p| p.tensors.retain(|n, _| !n.contains("gemma_expert.model.layers.2.")),
            &["gemma_expert", "as the trunk: 3 layers", "2 layers"],
        ),
        (
            "several missing",
            "pi05_tiny",
            |p| p.tensors.retain(|n, _| !n.starts_with("time_mlp_out")),
            &["time_mlp_out.weight", "[16, 16]", "no such tensor (nor 1 others)"],
        ),
        ("no table", "pi0_tiny", |p| drop(p.tensors.remove(TABLE)), &[TABLE, "2 dimensions", "no such tensor"]),
        (
            "wrong shape",
            "pi0_tiny",
            |p| p.add(&format!("{TRUNK}.layers.1.self_attn.q_proj.weight"), FileDtype::F32, &[32, 31]),
            &[&q, "[32, 32]", "[32, 31]"],
        ),
        (
            "wrong rank",
            "pi0_tiny",
            |p| p.add("action_in_proj.weight", FileDtype::F32, &[128]),
            &["action_in_proj.weight", "2 non-zero dimensions", "[128]"],
        ),
        (
            "zero dimension",
            "pi0_tiny",
            |p| p.add("action_in_proj.weight", FileDtype::F32, &[16, 0]),
            &["action_in_proj.weight", "2 non-zero dimensions", "[16, 0]"],
        ),
        (
            "wrong type",
            "pi0_tiny",
            |p| p.add("state_proj.bias", FileDtype::I32, &[16]),
            &["state_proj.bias", "F32, BF16 or F16", "I32"],
        ),
        (
            "not one key head",
            "pi0_tiny",
            |p| p.add(&format!("{TRUNK}.layers.0.self_attn.k_proj.weight"), FileDtype::F32, &[24, 32]),
            &["layers.0.self_attn.q_proj.weight", "multiples of the head dimension 24", "32 rows"],
        ),
        (
            "positions no square",
            "pi0_tiny",
            |p| {
                let name = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.position_embedding.weight";
                p.add(name, FileDtype::F32, &[15, 32]);
            },
            &["position_embedding.weight", "square number of rows", "15 rows"],
        ),
        (
            "an adapter",
            "pi0_tiny",
            |p| p.add(&format!("{TRUNK}.layers.0.self_attn.q_proj.lora_A.weight"), FileDtype::F32, &[4, 32]),
            &["q_proj.lora_A.weight", "no such tensor in a Pi0 policy", "[4, 32]"],
        ),
        (
            "a bias where the graph has none",
            "pi05_tiny",
            |p| p.add(&format!("{TRUNK}.layers.0.mlp.up_proj.bias"), FileDtype::F32, &[64]),
            &["up_proj.bias", "no such tensor in a Pi05 policy", "[64]"],
        ),
        (
            "twice",
            "pi0_tiny",
            |p| p.add("model.state_proj.bias", FileDtype::F32, &[16]),
            &["state_proj.bias", "one tensor of that meaning", "also"],
        ),
        ("family", "pi05_tiny", |p| p.config["type"] = "pi0".into(), &["config.json", "'type' is pi0", "pi05"]),
        ("heads", "pi0_tiny", |p| p.config["vision_num_attention_heads"] = 5.into(), &["5 heads", "width 32"]),
        (
            "image",
            "pi0_tiny",
            |p| p.config["image_resolution"] = serde_json::json!([224, 224]),
            &["config.json", "'image_resolution' is [224, 224]", "[56, 56]"],
        ),
        (
            "state",
            "pi0_tiny",
            |p| p.config["max_state_dim"] = 32.into(),
            &["'max_state_dim' is 32", "tensors are of 8"],
        ),
        (
            "robot state",
            "pi0_tiny",
            |p| p.config["input_features"]["observation.state"]["shape"] = serde_json::json!([9]),
            &["'observation.state.shape' is 9", "1 to 8"],
        ),
        (
            "memory",
            "pi05_tiny",
            |p| p.config["use_visual_memory"] = true.into(),
            &["config.json", "'use_visual_memory'"],
        ),
    ];
    for (what, name, change, says) in cases {
        let mut parts = Parts::golden(name);
        change(&mut parts);
        let e = parts.open().expect_err(what);
        assert!(e.contains("model.safetensors") || e.contains("config.json"), "{what}: no file in: {e}");
        for s in *says {
            assert!(e.contains(s), "{what}: '{s}' is not in: {e}");
        }
    }
}

#[test]
fn a_truncated_or_foreign_file_says_where_it_breaks_off() {
    let whole = Parts::golden("pi0_tiny").bytes();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let open = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        Checkpoint::open(dir.path()).unwrap_err().to_string()
    };
    let header = 8 + u64::from_le_bytes(*whole.first_chunk::<8>().unwrap()) as usize;
    let last = open(&whole[..whole.len() - 1]);
    assert!(last.contains("tensor '") && last.contains("truncated") && last.contains("data up to byte"), "{last}");
    let most = open(&whole[..header + 5]);
    assert!(most.contains("after 5 bytes of data (truncated?)"), "{most}");
    for bytes in [&whole[..header - 1], &whole[..8], &whole[..3], &[], b"version https://git-lfs.github.com/spec/v1\n"]
    {
        let e = open(bytes);
        assert!(e.contains("model.safetensors") && e.contains(&format!("{} bytes", bytes.len())), "{e}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(open(&longer).contains("not a whole safetensors file"));

    let text = String::from_utf8_lossy(&whole[8..header]).replacen("[16,8]", "[16,9]", 1);
    let mut reshaped = (text.len() as u64).to_le_bytes().to_vec();
    reshaped.extend(text.as_bytes());
    reshaped.extend(&whole[header..]);
    let e = open(&reshaped);
    assert!(e.contains("tensor '") && e.contains("576 bytes for F32 [16, 9]") && e.contains("data_offsets"), "{e}");
}

#[test]
fn a_directory_without_weights_says_what_to_give() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(open().contains("holds neither model.safetensors nor model.safetensors.index.json"));
    std::fs::create_dir(dir.path().join("params")).unwrap();
    assert!(open().contains("JAX checkpoint"), "{}", open());
    std::fs::create_dir(dir.path().join("pretrained_model")).unwrap();
    assert!(open().contains("subdirectory 'pretrained_model'"), "{}", open());
    let e = Checkpoint::open(&dir.path().join("nothing")).unwrap_err().to_string();
    assert!(e.contains("nothing") && e.contains("No such file"), "{e}");
}

/// Opens mutated bytes; the answer is free, a panic is not, and what opens must be whole.
fn survives(bytes: &[u8]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("pi0_tiny").join("config.json"), dir.path().join("config.json")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    match Checkpoint::open(dir.path()) {
        Ok(c) => prop_assert_eq!(values(&c).len(), expected_tensors(c.dims()).len()),
        Err(e) => prop_assert!(e.to_string().contains("safetensors") || e.to_string().contains("config.json"), "{}", e),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn no_mutation_of_the_header_panics(
        flips in prop::collection::vec((0usize..16_000, any::<u8>()), 1..6),
        cut in prop::option::weighted(0.2, 0usize..320_000),
    ) {
        let mut bytes = std::fs::read(golden("pi0_tiny").join("model.safetensors")).unwrap();
        for (at, value) in flips {
            bytes[at] = value;
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        survives(&bytes)?;
    }

    /// Numbers in the header become other numbers, so that the JSON stays whole and the checks behind it are met.
    #[test]
    fn no_other_number_in_the_header_panics(
        edits in prop::collection::vec((0usize..2000, prop_oneof![0u64..100, any::<u64>(), Just(u64::MAX)]), 1..4),
    ) {
        let whole = std::fs::read(golden("pi0_tiny").join("model.safetensors")).unwrap();
        let end = 8 + u64::from_le_bytes(*whole.first_chunk::<8>().unwrap()) as usize;
        let mut header: serde_json::Value = serde_json::from_slice(&whole[8..end]).unwrap();
        for (at, number) in edits {
            let tensors = header.as_object_mut().unwrap();
            let at = at % (tensors.len() * 4);
            let (_, info) = tensors.iter_mut().nth(at / 4).unwrap();
            let key = if at % 4 < 2 { "shape" } else { "data_offsets" };
            if let Some(value) = info.get_mut(key).and_then(|v| v.get_mut(at % 2)) {
                *value = number.into();
            }
        }
        let text = header.to_string();
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend(&whole[end..]);
        survives(&bytes)?;
    }
}
