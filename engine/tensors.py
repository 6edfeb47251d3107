"""A checkpoint's tensors, read by name and by slice out of memory-mapped safetensors files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.errors import BadCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMAP_BYTES = 64 << 20
"""Pages of a file that may stay mapped while it is read; they count as resident."""


class _Shard:
    """One file, mapped anew now and then so that what was read does not stay resident."""

    def __init__(self, path: Path) -> None:
        self._path, self._read_bytes = path, 0
        self._file = self._open()

    @property
    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return str(self._file.get_slice(name).get_dtype())

    def whole(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def copy(self, name: str, cut: tuple[slice, ...], into: torch.Tensor) -> None:
        """Copies a slice piece by piece; `into` may be of another dtype or device."""
        first, *others = cut
        start = first.start or 0
        step = max(1, REMAP_BYTES * into.shape[0] // max(1, into.nbytes))
        for row in range(0, into.shape[0], step):
            piece = into[row : row + step]
            rows = slice(start + row, start + row + piece.shape[0])
            piece.copy_(self._file.get_slice(name)[rows, *others])
            self._remap_after(piece.nbytes)

    def _remap_after(self, read_bytes: int) -> None:
        self._read_bytes += read_bytes
        if self._read_bytes >= REMAP_BYTES:
            self._file, self._read_bytes = self._open(), 0

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except FileNotFoundError as error:
            raise BadCheckpoint(str(self._path), None, "file is missing") from error
        except (SafetensorError, OSError) as error:
            size = self._path.stat().st_size
            rule = f"not a whole safetensors file of {size} bytes ({error})"
            raise BadCheckpoint(str(self._path), size, rule) from error


class TensorFiles:
    """Every tensor of a model directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shards = {file: _Shard(directory / file) for file in _files(directory)}
        self._where = {name: shard for shard in self._shards.values() for name in shard.names}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shard(name).shape(name)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        actual = self.shape(name)
        if actual != shape:
            raise BadCheckpoint(name, list(actual), f"must be of shape {list(shape)}")

    def read(self, name: str, cut: tuple[slice, ...], into: torch.Tensor) -> None:
        """Copies a slice of a tensor straight into memory of the caller's."""
        self._shard(name).copy(name, cut, into)

    def whole(self, name: str) -> torch.Tensor:
        """All of a small tensor."""
        return self._shard(name).whole(name)

    def dtype(self, name: str) -> str:
        """As safetensors writes it: BF16, F8_E4M3 ..."""
        return self._shard(name).dtype(name)

    def first_present(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self), None)

    def _shard(self, name: str) -> _Shard:
        if name not in self._where:
            raise BadCheckpoint(name, None, f"no such tensor in {self._directory}")
        return self._where[name]


def _files(directory: Path) -> list[str]:
    """The files of the index, or the single file."""
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise BadCheckpoint(str(directory), None, f"must hold {SINGLE} or {INDEX}")
        return [SINGLE]
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadCheckpoint(str(index), None, "must hold a weight_map object") from error
