//! A checkpoint of the published size is opened without reading its weights, and not pinned by a node that locks its
//! memory.

use std::fs::File;
use std::io::Write;

use pi0_mps::model::{Checkpoint, Dims, expected_tensors};
use pi0_mps::rt::rights;

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Memory of this process that is locked, or would be once touched, in bytes.
fn locked() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmLck:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<usize>().unwrap() * 1024
}

#[test]
fn fourteen_gigabytes_open_in_a_few_megabytes() {
    let dims = Dims::published(50);
    let mut tensors = expected_tensors(&dims);
    tensors.push(("paligemma_with_expert.gemma_expert.lm_head.weight".into(), vec![257_152, 1024]));
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(
            format!("model.{name}"),
            serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}),
        );
    }
    assert!((13.9e9..14.1e9).contains(&(end as f64)), "{end} bytes: the published files have 14.0 GB");
    let mut header = serde_json::Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));

    // A hole as long as the weights: it takes no disk.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut file = File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();

    // As the node does, before it opens the checkpoint. Without the right nothing is locked at all.
    let right = rights::lock_memory();
    assert_eq!(right.granted(), locked() > 0, "{right}");
    let (before, locked_before) = (resident(), locked());
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(*checkpoint.dims(), dims);
    let weights: Vec<_> =
        expected_tensors(&dims).iter().map(|(name, shape)| checkpoint.tensor(name, shape).unwrap().to_f32()).collect();
    assert!(weights.iter().all(|w| w.is_mapped()));
    let mut row = vec![1.0; 2048];
    checkpoint.token_table().unwrap().row_f32(257_151, &mut row).unwrap();
    assert_eq!(row, [0.0; 2048]);
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "opening took {grown} bytes of memory");
    assert_eq!(right.granted(), locked() > locked_before + end, "all of a mapping is locked at first, if anything is");
    checkpoint.unpin().unwrap();
    let pinned = locked().saturating_sub(locked_before);
    assert!(pinned < 64 << 20, "{pinned} bytes more are locked: the mapping is pinned as it is read");
}
