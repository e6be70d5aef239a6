"""What people may say for the task, and the tokenizer that reads it."""

from __future__ import annotations

import json

VERBS = ("touch", "tap", "reach for", "go to", "poke", "point at", "put your finger on")
NOUNS = ("block", "cube", "box")
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # at PaliGemma's ids
BOS = 2


def sentences(colour: str) -> list[str]:
    """The wordings for one colour; the first is the one that the demo uses."""
    full = [f"{verb} the {colour} {noun}" for verb in VERBS for noun in NOUNS]
    return full + [f"{verb} {colour}" for verb in VERBS] + [f"the {colour} {noun}" for noun in NOUNS] + [colour]


def tokenizer_json(colours: tuple[str, ...]) -> str:
    """A byte-level byte-pair tokenizer.json: words of the task are one token, every other text is its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([s + "\n" for c in colours for s in sentences(c)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", BOS)]
    )
    return json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n"
