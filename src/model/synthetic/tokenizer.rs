//! A tokenizer with one token a byte: every UTF-8 prompt goes in and comes out unchanged.

use serde_json::{Map, Value, json};

/// PaliGemma's first four tokens, at PaliGemma's ids.
const SPECIAL: [&str; 4] = ["<pad>", "<eos>", "<bos>", "<unk>"];
/// Special tokens and bytes.
pub(super) const VOCABULARY: usize = SPECIAL.len() + 256;

/// `tokenizer.json`: byte-pair encoding without a single merge.
pub(super) fn json() -> Value {
    let special = SPECIAL.iter().map(|t| (*t).to_owned());
    let names = special.chain((0..=255).map(|byte| byte_name(byte).to_string()));
    let vocabulary: Map<String, Value> = names.enumerate().map(|(id, name)| (name, json!(id))).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                { "SpecialToken": { "id": "<bos>", "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
            ],
            "pair": [
                { "SpecialToken": { "id": "<bos>", "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } },
            ],
            "special_tokens": { "<bos>": { "id": "<bos>", "ids": [2], "tokens": ["<bos>"] } },
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

/// The printable character that stands for a byte in byte-level vocabularies: itself where it is printable, else the
/// next one from U+0100 on.
fn byte_name(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + nth).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::Tokenizer;

    #[test]
    fn every_prompt_comes_back_as_it_went_in() {
        let tokenizer = Tokenizer::from_bytes(json().to_string()).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), VOCABULARY);
        for prompt in ["put the red cube into the mug\n", "Schüttle  die Flasche!\t", "赤いカップ 🦾 \u{0}\u{7f}", ""]
        {
            let encoding = tokenizer.encode(prompt, true).unwrap();
            assert_eq!(encoding.get_ids()[0], 2);
            assert_eq!(encoding.len(), 1 + prompt.len(), "one token a byte");
            assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), prompt);
        }
    }
}
