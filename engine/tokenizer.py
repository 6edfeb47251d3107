"""Text to tokens and back, from a checkpoint's own tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.chat import ChatTemplate
from engine.errors import BadCheckpoint, BadRequest
from engine.token_bytes import Spelling, spell_all, spelling_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Open one with `Tokenizer.open(folder)`.

    Where there is a tokenizer.json, it alone says what is added around a text, as in transformers.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        spelling: Spelling,
        named_tokens: Mapping[str, str],
        eos_ids: frozenset[int],
        chat: ChatTemplate | None,
    ) -> None:
        self.backend = backend
        self.eos_ids = eos_ids
        self.bos_id = _id_of(backend, named_tokens.get("bos_token"))
        self.eos_id = _id_of(backend, named_tokens.get("eos_token"))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """One more than the highest token id."""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._bytes = spell_all(vocabulary, self.vocab_size, spelling)
        self._chat = chat

    @classmethod
    def open(cls, folder: str | Path, embeddings: int | None = None) -> Tokenizer:
        """`embeddings` is how many tokens the model knows; a larger tokenizer does not fit it."""
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json", default={})
        named = _named_tokens(folder, config)
        backend = _backend(folder, config, named)
        tokenizer = cls(
            backend,
            _spelling(backend, folder),
            named,
            _eos_ids(folder, _id_of(backend, named.get("eos_token"))),
            _chat_template(folder, config, named),
        )
        if embeddings is not None and tokenizer.vocab_size > embeddings:
            rule = f"the tokenizer's ids must stay below the model's {embeddings} embeddings"
            raise BadCheckpoint("tokenizer", tokenizer.vocab_size, rule)
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of known tokens, as the checkpoint's own decoder has it."""
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise BadRequest("tokens", token, f"must lie in [0, {self.vocab_size})")
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for, with the space before a word; nothing past the vocabulary."""
        return self._bytes[token] if token < self.vocab_size else b""

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        if self._chat is None:
            raise BadRequest("messages", len(messages), "the model has no chat template")
        return self._chat.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt tokens of a conversation; the template writes its own special tokens."""
        text = self.render_chat(messages, tools, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


def _id_of(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    index: int | None = None if token is None else backend.token_to_id(token)
    return index


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadCheckpoint(path.name, str(path), f"cannot be read: {error}") from error


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise BadCheckpoint(path.name, str(path), f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(path.name, str(path), "must hold a JSON object")
    return value


def _backend(
    folder: Path, config: Mapping[str, Any], named: Mapping[str, str]
) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        backend = _parse(path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _gpt2_backend(folder, config, named)
    else:
        raise BadCheckpoint("tokenizer.json", str(path), "missing; a fast tokenizer is needed")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _parse(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(path.name, str(path), f"cannot be read: {error}") from error


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = _read_text(path).splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in pairs):
        raise BadCheckpoint(path.name, str(path), "must hold two tokens a line")
    return [(left, right) for left, right in pairs]


def _gpt2_backend(
    folder: Path, config: Mapping[str, Any], named: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """Older byte-level checkpoints (OPT) carry only vocab.json and merges.txt."""
    vocabulary = _read_json(folder / "vocab.json")
    merges = _merges(folder / "merges.txt")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = sorted({token for token in named.values() if token in vocabulary})
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    ends = {
        name: named[name]
        for name in ("bos_token", "eos_token")
        if config.get(f"add_{name}") and named.get(name) in vocabulary
    }
    parts = [ends.get("bos_token"), "$A", ends.get("eos_token")]
    backend.post_processor = processors.TemplateProcessing(
        single=[part for part in parts if part is not None],
        special_tokens=[(token, vocabulary[token]) for token in sorted({*ends.values()})],
    )
    return backend


def _spelling(backend: tokenizers.Tokenizer, folder: Path) -> Spelling:
    decoder = json.loads(backend.to_str())["decoder"]
    spelling = spelling_of(decoder)
    if spelling is None:
        rule = "decoder must be byte-level or of the sentencepiece kind"
        raise BadCheckpoint("tokenizer.json", str(folder / "tokenizer.json"), rule)
    return spelling


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like: a string, or an object with its content."""
    named = _read_json(folder / "special_tokens_map.json", default={}) | dict(config)
    texts = {name: named.get(name) for name in NAMED_TOKENS}
    contents = {
        name: text.get("content") if isinstance(text, dict) else text
        for name, text in texts.items()
    }
    return {name: text for name, text in contents.items() if isinstance(text, str)}


def _eos_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """What ends an answer: the generation config's tokens (else the model's), the tokenizer's."""
    ids = {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name, default={}).get("eos_token_id")
        if eos is not None:
            ids.update(eos if isinstance(eos, list) else [eos])
            break
    return frozenset(index for index in ids if index is not None)


def _chat_template(
    folder: Path, config: Mapping[str, Any], named: Mapping[str, str]
) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(_read_text(path), named)
    older = _read_json(folder / "chat_template.json", default={})
    template = config.get("chat_template", older.get("chat_template"))
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise BadCheckpoint("chat_template", type(template).__name__, "must be text")
    return ChatTemplate(template, named)
