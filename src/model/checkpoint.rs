//! A checkpoint: memory-mapped safetensors and config.json, checked whole when it is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use crate::rt::rights;

use super::graph::{self, Extra, Shapes, TOKEN_TABLES};
use super::tensor::Mapped;
use super::{Dims, Dtype, Family, ModelError, Origin, PolicyConfig, Tensor};

/// An opened checkpoint. The tensors stay in the mapped file: opening costs no memory for weights.
#[derive(Debug)]
pub struct Checkpoint {
    file: PathBuf,
    dir: PathBuf,
    config: PolicyConfig,
    origin: Origin,
    dims: Dims,
    entries: BTreeMap<String, Entry>,
}

/// Where one tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    file: Arc<Mapped>,
    /// Its name in that file.
    name: String,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Entry {
    fn refuse(&self, expected: String, found: String) -> ModelError {
        ModelError::Tensor { path: self.file.path.to_path_buf(), tensor: self.name.clone(), expected, found }
    }

    fn tensor(&self) -> Result<Tensor, ModelError> {
        let dtype =
            Dtype::of(self.dtype).ok_or_else(|| self.refuse("F32, BF16 or F16".into(), format!("{:?}", self.dtype)))?;
        Ok(Tensor::new(Arc::clone(&self.file), &self.name, dtype, self.shape.clone(), self.range.clone()))
    }
}

impl Checkpoint {
    /// Opens a directory with `model.safetensors` (or `model.safetensors.index.json` and its shards) and, where
    /// there is one, `config.json`; or such a file itself. Every tensor the policy needs is checked for presence,
    /// type, shape and place in the file. The files must not be changed while the checkpoint is open.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = weights_file(path)?;
        let dir = file.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        let config_path = dir.join("config.json");
        let known = config_path.is_file();
        let config = if known { PolicyConfig::read(&config_path)? } else { PolicyConfig::default() };

        let mut entries = BTreeMap::new();
        let mut prefixed = false;
        for shard in shards(&file)? {
            for entry in read_header(map(&shard)?)? {
                prefixed |= entry.name.starts_with("model.");
                if let Some(other) = entries.insert(graph::canonical(&entry.name), entry.clone()) {
                    let found = format!("also '{}' in {}", other.name, other.file.path.display());
                    return Err(entry.refuse("one tensor of that meaning".into(), found));
                }
            }
        }
        // Only LeRobot writes `type` and only LeRobot prefixes names.
        let origin = if config.kind.is_some() || prefixed { Origin::LeRobot } else { Origin::OpenPi };
        if config.horizon.is_none() {
            tracing::warn!(
                "{}: no chunk length given ('chunk_size' or 'action_horizon'): assuming 50",
                config_path.display()
            );
        }

        let family = shapes(&file, &entries, |s| s.family());
        for name in entries.keys().cloned().collect::<Vec<_>>() {
            let Some(alias) = graph::time_alias(&name, family) else { continue };
            if !entries.contains_key(&alias)
                && let Some(entry) = entries.remove(&name)
            {
                entries.insert(alias, entry);
            }
        }
        let dims = shapes(&file, &entries, |s| s.dims(family, &config))?;
        check_config(&config_path, &config, &dims)?;
        let checkpoint = Self { file, dir, config, origin, dims, entries };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    /// Exempts the mapped files from a process's locked memory: gigabytes of weights are not to be pinned page by page
    /// as they are read.
    pub fn unpin(&self) -> Result<(), ModelError> {
        let mut done: Vec<&Arc<Mapped>> = Vec::new();
        for file in self.entries.values().map(|e| &e.file) {
            if !done.iter().any(|d| Arc::ptr_eq(d, file)) {
                rights::unlock(&file.map).map_err(|source| ModelError::Io { path: file.path.to_path_buf(), source })?;
                done.push(file);
            }
        }
        Ok(())
    }

    /// Every dimension of the policy.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// What config.json says; all unset where there is none.
    pub fn config(&self) -> &PolicyConfig {
        &self.config
    }

    /// Whether it is not known if a π0.5 policy reads the state in its prompt. LeRobot's always do; openpi's converter
    /// does not write what the training configuration said.
    pub fn state_in_prompt_is_assumed(&self) -> bool {
        let unsaid = self.config.discrete_state_input.is_none();
        self.dims.family == Family::Pi05 && self.origin == Origin::OpenPi && unsaid
    }

    /// Who wrote it.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The directory that holds it, where tokenizer and statistics are looked for.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensor of a canonical name (today's openpi name, without a leading `model.`) and exactly that shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let entry = self.entries.get(name).ok_or_else(|| ModelError::Tensor {
            path: self.file.clone(),
            tensor: name.into(),
            expected: format!("shape {shape:?}"),
            found: "no such tensor".into(),
        })?;
        if entry.shape != shape {
            return Err(entry.refuse(format!("shape {shape:?}"), format!("shape {:?}", entry.shape)));
        }
        entry.tensor()
    }

    /// The token embedding table `[vocab, trunk width]`, whichever of its two names the file uses.
    pub fn token_table(&self) -> Result<Tensor, ModelError> {
        let name = TOKEN_TABLES.into_iter().find(|t| self.entries.contains_key(*t)).unwrap_or(TOKEN_TABLES[1]);
        self.tensor(name, &[self.dims.vocab, self.dims.trunk.width])
    }

    /// A tensor outside the graph, such as the statistics inside LeRobot's files of before September 2025.
    pub(super) fn extra_tensor(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        self.entries.get(name).map(Entry::tensor).transpose()
    }

    /// The file that holds or lists the weights.
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn check_tensors(&self) -> Result<(), ModelError> {
        let expected = graph::expected_tensors(&self.dims);
        let table = TOKEN_TABLES[1];
        let missing: Vec<_> = expected.iter().filter(|(n, _)| n != table && !self.entries.contains_key(n)).collect();
        if let [(name, shape), others @ ..] = missing.as_slice() {
            let more = if others.is_empty() { String::new() } else { format!(" (nor {} others)", others.len()) };
            return Err(ModelError::Tensor {
                path: self.file.clone(),
                tensor: name.clone(),
                expected: format!("shape {shape:?}"),
                found: format!("no such tensor{more}"),
            });
        }
        for (name, shape) in &expected {
            if name == table {
                self.token_table()?;
            } else {
                self.tensor(name, shape)?;
            }
        }
        let needed: BTreeSet<&str> = expected.iter().map(|(n, _)| n.as_str()).collect();
        for (name, entry) in self.entries.iter().filter(|(n, _)| !needed.contains(n.as_str())) {
            match graph::extra(name, self.dims.family) {
                Extra::Junk => tracing::debug!("{}: '{}' is not used", entry.file.path.display(), entry.name),
                Extra::Unknown => {
                    tracing::warn!("{}: unknown tensor '{}' is ignored", entry.file.path.display(), entry.name);
                }
                Extra::ChangesGraph => {
                    let expected = format!("no such tensor in a {:?} policy", self.dims.family);
                    let found = format!("shape {:?}; the checkpoint computes something else", entry.shape);
                    return Err(entry.refuse(expected, found));
                }
            }
        }
        Ok(())
    }
}

fn shapes<R>(file: &Path, entries: &BTreeMap<String, Entry>, f: impl FnOnce(&Shapes<'_>) -> R) -> R {
    let names: Vec<&str> = entries.keys().map(String::as_str).collect();
    let shape = |n: &str| entries.get(n).map(|e| e.shape.as_slice());
    f(&Shapes { path: file, shape: &shape, names: &names })
}

/// Refuses a config.json that says something else than the tensors.
fn check_config(path: &Path, config: &PolicyConfig, dims: &Dims) -> Result<(), ModelError> {
    let refuse = |key: &str, says: String, tensors: String| {
        let reason =
            format!("'{key}' is {says}, but the tensors are of {tensors}: this file belongs to another policy");
        Err(ModelError::File { path: path.into(), reason })
    };
    let family = match dims.family {
        super::Family::Pi0 => "pi0",
        super::Family::Pi05 => "pi05",
    };
    if let Some(kind) = config.kind.as_deref().filter(|k| *k != family) {
        return refuse("type", kind.into(), family.into());
    }
    let image = [dims.vision.image; 2];
    if let Some(size) = config.image_resolution.filter(|s| *s != image) {
        return refuse("image_resolution", format!("{size:?}"), format!("{image:?}"));
    }
    for (key, says, is) in [
        ("max_action_dim", config.max_action_dim, dims.action_dim),
        ("max_state_dim", config.max_state_dim, dims.state_dim),
    ] {
        if let Some(n) = says.filter(|n| *n != is) {
            return refuse(key, n.to_string(), is.to_string());
        }
    }
    for (what, len, most) in
        [("observation.state", config.state_len(), dims.state_dim), ("action", config.action_len(), dims.action_dim)]
    {
        if let Some(n) = len.filter(|n| *n == 0 || *n > most) {
            return refuse(&format!("{what}.shape"), n.to_string(), format!("1 to {most}"));
        }
    }
    Ok(())
}

/// The file that holds or lists the weights.
fn weights_file(path: &Path) -> Result<PathBuf, ModelError> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let single = path.join("model.safetensors");
    let index = path.join("model.safetensors.index.json");
    if single.is_file() {
        return Ok(single);
    }
    if index.is_file() {
        return Ok(index);
    }
    let hint = if path.join("pretrained_model").is_dir() {
        "; give its subdirectory 'pretrained_model'"
    } else if path.join("params").is_dir() || path.join("_METADATA").is_file() {
        "; this is a JAX checkpoint: convert it with openpi's examples/convert_jax_model_to_pytorch.py"
    } else {
        "; give the directory of a LeRobot or openpi-PyTorch checkpoint"
    };
    let reason = format!("holds neither model.safetensors nor model.safetensors.index.json{hint}");
    Err(ModelError::File { path: path.into(), reason })
}

/// The safetensors files behind `file`, itself or those of an index.
fn shards(file: &Path) -> Result<Vec<PathBuf>, ModelError> {
    if file.extension().is_none_or(|e| e != "json") {
        return Ok(vec![file.to_path_buf()]);
    }
    let refuse = |reason: String| ModelError::File { path: file.into(), reason };
    let text = std::fs::read_to_string(file).map_err(|source| ModelError::Io { path: file.into(), source })?;
    let root: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| refuse(format!("not a JSON object: {e}")))?;
    let weights = root.get("weight_map").and_then(Value::as_object);
    let weights = weights.ok_or_else(|| refuse("'weight_map': expected an object of tensor to file".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, shard) in weights {
        let name = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|f| f == *s));
        let name = name.ok_or_else(|| refuse(format!("tensor '{tensor}': expected a file name, found {shard}")))?;
        names.insert(name);
    }
    let dir = file.parent().unwrap_or(Path::new(""));
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

fn map(path: &Path) -> Result<Mapped, ModelError> {
    let io = |source| ModelError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(ModelError::File { path: path.into(), reason: "is a directory, expected a file".into() });
    }
    // SAFETY: the map is read-only and private to this process; that nobody truncates the file meanwhile is the
    // caller's part of `Checkpoint::open`.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Mapped { path: path.into(), map })
}

/// Every tensor of one file; the header's offsets, sizes and the file's length agree when this returns.
fn read_header(file: Mapped) -> Result<Vec<Entry>, ModelError> {
    let file = Arc::new(file);
    let (header, metadata) = SafeTensors::read_metadata(&file.map).map_err(|e| diagnose(&file, &e.to_string()))?;
    let start = 8 + header;
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let (begin, end) = info.data_offsets;
        entries.push(Entry {
            file: Arc::clone(&file),
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: start + begin..start + end,
        });
    }
    Ok(entries)
}

/// Says which tensor a refused file breaks off at; `reason` is the reader's own where no tensor is to blame.
fn diagnose(file: &Mapped, reason: &str) -> ModelError {
    let bytes = &file.map[..];
    let whole = || ModelError::File {
        path: file.path.to_path_buf(),
        reason: format!("not a whole safetensors file of {} bytes: {reason}; copy it again", bytes.len()),
    };
    let Some((size, rest)) = bytes.split_first_chunk::<8>() else { return whole() };
    let Ok(size) = usize::try_from(u64::from_le_bytes(*size)) else { return whole() };
    let Some((header, data)) = rest.split_at_checked(size) else { return whole() };
    let Ok(Value::Object(header)) = serde_json::from_slice(header) else { return whole() };
    for (name, info) in &header {
        let numbers =
            |key: &str| -> Option<Vec<u64>> { info.get(key)?.as_array()?.iter().map(Value::as_u64).collect() };
        let refuse = |expected: String, found: String| ModelError::Tensor {
            path: file.path.to_path_buf(),
            tensor: name.clone(),
            expected,
            found,
        };
        if name == "__metadata__" {
            continue;
        }
        let (Some(shape), Some(offsets)) = (numbers("shape"), numbers("data_offsets")) else {
            return refuse("dtype, shape and data_offsets".into(), info.to_string());
        };
        let Ok(dtype) = serde_json::from_value::<safetensors::Dtype>(info["dtype"].clone()) else {
            return refuse("F32, BF16 or F16".into(), info["dtype"].to_string());
        };
        let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let size = elements.and_then(|n| n.checked_mul(dtype.bitsize() as u64)).map(|bits| bits / 8);
        let span = offsets.get(1).zip(offsets.first()).and_then(|(end, begin)| end.checked_sub(*begin));
        if size.is_none() || span != size {
            let expected = size.map_or("a size below 2^64".into(), |n| format!("{n} bytes"));
            return refuse(format!("{expected} for {dtype:?} {shape:?}"), format!("data_offsets {offsets:?}"));
        }
        if offsets[1] > data.len() as u64 {
            let found = format!("the file ends after {} bytes of data (truncated?)", data.len());
            return refuse(format!("data up to byte {}", offsets[1]), found);
        }
    }
    whole()
}
