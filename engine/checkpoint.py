"""A model directory: its config, its weights, and which tokens end an answer."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import BadCheckpoint
from engine.layout import KvLayout
from engine.model.families import read_config
from engine.model.fields import Fields
from engine.model.names import find_names
from engine.tensors import TensorFiles

if TYPE_CHECKING:
    from engine.model.config import ModelConfig
    from engine.model.names import Names

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent / "demo"
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
SAMPLED_ROWS = 8


@dataclass(frozen=True)
class Checkpoint:
    """What was found at `source`; weights are read later, by each rank its own part."""

    source: str
    directory: Path
    config: ModelConfig
    eos_token_ids: frozenset[int]

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @cached_property
    def tensors(self) -> TensorFiles:
        return TensorFiles(self.directory)

    def release(self) -> None:
        """Unmaps the weight files; they are mapped again when next read."""
        self.__dict__.pop("tensors", None)

    @cached_property
    def names(self) -> Names:
        return find_names(self.config.family, self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """Equal only for one architecture holding the same weights, as far as a sample tells."""
        import torch

        digest = blake2b(self.config.describe().encode(), digest_size=12)
        name = self.names.embed + ".weight"
        rows, width = min(SAMPLED_ROWS, self.config.vocab), self.tensors.shape(name)[-1]
        sample = torch.empty(rows, width)
        self.tensors.read(name, (slice(rows),), sample)
        digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

    def layout(
        self, *, block_tokens: int, dtype: str, tensor_parallel: int = 1, pipeline_parallel: int = 1
    ) -> KvLayout:
        config = self.config
        return KvLayout(
            self.fingerprint,
            len(config.layers),
            config.kv_heads,
            config.head_dim,
            block_tokens,
            dtype,
            tensor_parallel,
            pipeline_parallel,
        )


def open_checkpoint(source: str, longest: int | None = None) -> Checkpoint:
    """The built-in model "demo", a directory, or a hub id; `longest` caps sequences served."""
    directory = _locate(source)
    values = _read_json(directory / "config.json")
    config = read_config(Fields(values), longest)
    return Checkpoint(source, directory, config, _eos_token_ids(directory, values))


def _locate(source: str) -> Path:
    if source == DEMO:
        return DEMO_DIRECTORY
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_absolute() or source.startswith((".", "~")):
        raise BadCheckpoint("model", source, "no such directory")
    return _download(source)


def _download(source: str) -> Path:
    """The hub's copy: the one on this machine without asking the hub, if it is whole."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        with suppress(LocalEntryNotFoundError):
            kept = Path(huggingface_hub.snapshot_download(source, local_files_only=True))
            if _is_whole(kept):
                return kept
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(WANTED_FILES)))
    except HFValidationError as error:
        raise BadCheckpoint("model", source, "neither a directory nor a hub id") from error
    except LocalEntryNotFoundError as error:
        rule = "not on this machine, and the hub cannot be reached; give a model directory"
        raise BadCheckpoint("model", source, rule) from error
    except OSError as error:
        raise BadCheckpoint("model", source, f"the hub does not give it: {error}") from error


def _is_whole(directory: Path) -> bool:
    """Whether a download that was broken off left nothing out."""
    index = directory / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        weights = set(_read_json(index)["weight_map"].values())
    wanted = {"config.json", "tokenizer.json", *weights}
    return all((directory / name).exists() for name in wanted)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadCheckpoint(str(path), None, "file is missing") from error
    except ValueError as error:
        raise BadCheckpoint(str(path), None, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadCheckpoint(str(path), values, "must hold an object")
    return values


def _eos_token_ids(directory: Path, values: dict[str, Any]) -> frozenset[int]:
    """Those of generation_config.json, else of config.json or its text half."""
    path = directory / "generation_config.json"
    generation = Fields(_read_json(path) if path.exists() else {}, path.name)
    config = Fields(values)
    for fields in (generation, config, config.part("text_config")):
        if "eos_token_id" in fields:
            return frozenset(fields.integers("eos_token_id"))
    return frozenset()
