//! Prompts to token ids, with the text rules of the stack that trained the checkpoint.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::{ModelError, Origin};

/// The beginning-of-sequence token of PaliGemma's vocabulary.
const BOS: &str = "<bos>";

/// A `tokenizer.json` and its beginning-of-sequence id.
pub struct PromptTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    bos: u32,
}

impl std::fmt::Debug for PromptTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PromptTokenizer").field("path", &self.path).field("bos", &self.bos).finish_non_exhaustive()
    }
}

impl PromptTokenizer {
    /// Reads a `tokenizer.json` (PaliGemma's takes about a second). Padding and truncation set in it are ignored.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let refuse = |reason: String| ModelError::File { path: path.into(), reason };
        let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
        let mut inner = Tokenizer::from_bytes(&bytes).map_err(|e| {
            let remedy = "give a Hugging Face tokenizer.json, such as that of google/paligemma-3b-pt-224 \
                          (a SentencePiece .model file must be converted first)";
            refuse(format!("not a tokenizer: {e}; {remedy}"))
        })?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| refuse(e.to_string()))?;
        let bos =
            inner.token_to_id(BOS).ok_or_else(|| refuse(format!("has no token '{BOS}', which starts a prompt")))?;
        Ok(Self { path: path.into(), inner, bos })
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ids of a π0 prompt. openpi cleans the text and encodes the closing newline on its own; LeRobot takes the text
    /// as it is and appends a newline if there is none.
    pub fn pi0(&self, prompt: &str, origin: Origin) -> Result<Vec<u32>, ModelError> {
        match origin {
            Origin::OpenPi => self.encode(&[&clean(prompt), "\n"]),
            Origin::LeRobot if prompt.ends_with('\n') => self.encode(&[prompt]),
            Origin::LeRobot => self.encode(&[&format!("{prompt}\n")]),
        }
    }

    /// Ids of a π0.5 prompt; `state` is normalised and not padded.
    pub fn pi05(&self, prompt: &str, state: &[f64]) -> Result<Vec<u32>, ModelError> {
        self.encode(&[&pi05_text(prompt, state)])
    }

    fn encode(&self, parts: &[&str]) -> Result<Vec<u32>, ModelError> {
        let mut ids = vec![self.bos];
        for part in parts {
            let encoding = self.inner.encode_fast(*part, false).map_err(|e| ModelError::File {
                path: self.path.clone(),
                reason: format!("cannot encode {part:?}: {e}"),
            })?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(ids)
    }
}

fn clean(prompt: &str) -> String {
    prompt.trim().replace(['_', '\n'], " ")
}

fn pi05_text(prompt: &str, state: &[f64]) -> String {
    let state: Vec<String> = state.iter().map(|x| bin(*x).to_string()).collect();
    format!("Task: {}, State: {};\nAction: ", clean(prompt), state.join(" "))
}

/// Which of 256 bins over [-1, 1) holds `x`: -1 below, 255 above (NumPy's `digitize` less one).
fn bin(x: f64) -> i32 {
    // Edges are multiples of 2^-7, so scaling by 2^7 is exact and the floor compares as the edges do.
    ((x * 128.0).floor() + 128.0).clamp(-1.0, 255.0) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte of the alphabet its own token: enough to see what text was encoded.
    fn tokenizer() -> (tempfile::TempDir, PromptTokenizer) {
        let mut vocab = serde_json::Map::new();
        vocab.insert("<unk>".into(), 0.into());
        vocab.insert(BOS.into(), 2.into());
        for c in '\n'..='~' {
            vocab.insert(c.to_string(), (100 + c as u32).into());
        }
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let t = PromptTokenizer::open(&path).unwrap();
        (dir, t)
    }

    fn text(ids: &[u32]) -> String {
        assert_eq!(ids[0], 2, "starts with the beginning-of-sequence token, once");
        ids[1..].iter().map(|id| char::from_u32(id - 100).unwrap()).collect()
    }

    #[test]
    fn each_origin_has_its_text_rules() {
        let (_dir, t) = tokenizer();
        let raw = "  pick_up the\ncube ";
        assert_eq!(text(&t.pi0(raw, Origin::OpenPi).unwrap()), "pick up the cube\n");
        assert_eq!(text(&t.pi0(raw, Origin::LeRobot).unwrap()), "  pick_up the\ncube \n");
        assert_eq!(text(&t.pi0("go\n", Origin::LeRobot).unwrap()), "go\n", "no second newline");
        assert_eq!(text(&t.pi05(raw, &[-1.5, 0.0, 0.999, 2.0]).unwrap()), {
            "Task: pick up the cube, State: -1 128 255 255;\nAction: "
        });
        assert_eq!(text(&t.pi0("", Origin::OpenPi).unwrap()), "\n");
    }

    #[test]
    fn bins_are_those_of_digitize() {
        let edges: Vec<f64> = (0..256).map(|j| -1.0 + f64::from(j) * 2.0 / 256.0).collect();
        let digitize = |x: f64| edges.iter().filter(|e| **e <= x).count() as i32 - 1;
        let near = edges.iter().flat_map(|e| [e.next_down(), *e, e.next_up()]);
        for x in near.chain([-1e300, -1.0 - 1e-9, -1e-30, 1e-30, 1.0, 1.1, 1e300]) {
            assert_eq!(bin(x), digitize(x), "{x}");
        }
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        assert!(PromptTokenizer::open(&path).unwrap_err().to_string().contains("tokenizer.json"));
        std::fs::write(&path, b"\x0a\x0esentencepiece").unwrap();
        let e = PromptTokenizer::open(&path).unwrap_err().to_string();
        assert!(e.contains("tokenizer.json") && e.contains("SentencePiece"), "{e}");
    }
}
