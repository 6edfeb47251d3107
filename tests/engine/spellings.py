"""Small tokenizers of the two spellings in use, written as checkpoints have them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

TEXT = [
    "Once upon a time there was a small fox. She lived near the river, and she was happy.",
    "the quick brown fox jumps over the lazy dog; naïve café, Grüße, 東京, привет",
] * 3
ENDS = ["<s>", "</s>"]


def write_byte_level(folder: Path, **config: Any) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=ENDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens(["two words", "ünder"])
    return write(folder, backend, config)


def write_sentencepiece(folder: Path, **config: Any) -> Path:
    """Llama 2's: U+2581 for a space, byte tokens for what is not covered."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted({c for line in TEXT for c in line if c.isascii() and c != " "} | {"▁"})
    pieces = ["<unk>", *ENDS, *byte_tokens, *characters, "▁t", "▁th", "▁the", "▁a", "ox", "▁f"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("o", "x"), ("▁", "f")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.add_special_tokens(["<unk>", *ENDS])
    return write(folder, backend, config)


def write(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | named | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
