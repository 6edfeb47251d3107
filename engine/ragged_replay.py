"""Repeats layers over batches that mix prompts and decodes, a native call for each layer.

Such batches differ in their rows from step to step. So the calls of the first are written down
with room for more rows, together with the places in them that say how many there are; a later
batch that fits the room fills in its own numbers. Layers stay apart, since what waits for their
KV is told of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from struct import calcsize
from typing import TYPE_CHECKING

import numpy as np

from engine.replay import CALL, Watch, Workspace, WrittenCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch

    from engine.native_library import Kernels, NativeLibrary
    from engine.ops import LayerStep, Made
    from engine.packing import Packed
    from engine.replay import Empty

    Words = np.ndarray[tuple[int], np.dtype[np.int64]]

LEAST_ROWS, MOST_ROWS = 64, 1024
"""Larger batches compute for so long that Python's time between their calls does not count."""
WORD_BYTES = 8
COUNT_WORDS = {0: 4, 1: 5, 2: 2, 3: 14, 4: 13}
"""Which word of a kernel's record, by the kernel's number, says how many rows there are."""
ATTENTION = 4
"""Its record counts sequences instead."""


@dataclass(frozen=True, slots=True)
class Script:
    """The calls of some layers, and the words of theirs that a batch's sizes go into."""

    words: Words
    rows_at: list[int]
    sequences_at: list[int]
    layer_ends: list[int]
    """Bytes up to the end of each layer's calls."""

    def calls(self, rows: int, sequences: int) -> list[bytes]:
        """Of each layer, for a batch of this size."""
        self.words[self.rows_at] = rows
        self.words[self.sequences_at] = sequences
        whole = self.words.tobytes()
        starts = [0, *self.layer_ends[:-1]]
        return [whole[start:end] for start, end in zip(starts, self.layer_ends, strict=True)]


def read_script(calls: bytes, layer_ends: list[int], rows: int, sequences: int) -> Script | None:
    """None if some call counts anything but these rows and sequences."""
    words = np.frombuffer(bytearray(calls), np.int64)
    header = calcsize(CALL.format) // WORD_BYTES
    rows_at: list[int] = []
    sequences_at: list[int] = []
    at = 0
    while at < len(words):
        kernel, record_bytes = int(words[at]), int(words[at + 1])
        count = at + header + COUNT_WORDS[kernel]
        attends = kernel == ATTENTION
        if words[count] != (sequences if attends else rows):
            return None
        (sequences_at if attends else rows_at).append(count)
        at += header + record_bytes // WORD_BYTES
    return Script(words, rows_at, sequences_at, layer_ends)


@dataclass(frozen=True, slots=True)
class _Room:
    """Memory that a script reads, and where it leaves what the layers made; all of it whole."""

    packed: Packed
    hidden: torch.Tensor
    made: Made
    script: Script

    def fill(self, packed: Packed, hidden: torch.Tensor) -> None:
        rows, sequences = packed.tokens, len(packed.query_lens)
        own = self.packed
        own.positions[:rows] = packed.positions
        own.slots[:rows] = packed.slots
        own.cu_seqlens[: sequences + 1] = packed.cu_seqlens
        own.context_lens[:sequences] = packed.context_lens
        own.block_tables[:sequences, : packed.block_tables.shape[1]] = packed.block_tables
        self.hidden[:rows] = hidden


class RaggedReplays:
    """The batches of one stage that were written down, by room for rows and width of tables."""

    def __init__(
        self,
        library: NativeLibrary,
        writing_down: Callable[[Kernels, Empty], AbstractContextManager[None]],
    ) -> None:
        self._library, self._writing_down = library, writing_down
        self._rooms: dict[tuple[int, int], _Room] = {}
        self._workspace = Workspace()
        self._possible = True

    def __len__(self) -> int:
        return len(self._rooms)

    def run(
        self,
        layers: Mapping[int, LayerStep],
        packed: Packed,
        hidden: torch.Tensor,
        on_layer: Callable[[int], None],
    ) -> Made | None:
        """What the layers make of `hidden`, good until the next batch; None if not repeatable."""
        if not self._possible or packed.tokens > MOST_ROWS or not layers:
            return None
        size = _power_of_two(max(packed.tokens, LEAST_ROWS)), _power_of_two(_width(packed))
        room = self._rooms.get(size)
        if room is None:
            return self._write_down(layers, packed, hidden, on_layer, size)
        room.fill(packed, hidden)
        calls = room.script.calls(packed.tokens, len(packed.query_lens))
        for index, layer_calls in zip(layers, calls, strict=True):
            self._library.replay(layer_calls)
            on_layer(index)
        delta, residual = room.made
        return None if delta is None else delta[: packed.tokens], residual[: packed.tokens]

    def _write_down(
        self,
        layers: Mapping[int, LayerStep],
        packed: Packed,
        hidden: torch.Tensor,
        on_layer: Callable[[int], None],
        size: tuple[int, int],
    ) -> Made:
        rows, width = size
        whole = _with_room(packed, rows, width)
        start = hidden.new_empty(rows, hidden.shape[1])
        start[: packed.tokens] = hidden
        kernels, watch = WrittenCalls(self._library), Watch()
        own, layer_ends = _first_rows(whole, packed), []
        delta, residual = None, start[: packed.tokens]
        with self._writing_down(kernels, self._taker(rows)), watch:
            for index, layer in layers.items():
                delta, residual = layer(delta, residual, own)
                layer_ends.append(len(kernels.calls))
                on_layer(index)
        script = None
        if not watch.computed:
            sequences = len(packed.query_lens)
            script = read_script(kernels.calls, layer_ends, packed.tokens, sequences)
        self._possible = script is not None
        if script is not None:
            made = None if delta is None else _whole(delta, rows), _whole(residual, rows)
            self._rooms[size] = _Room(whole, start, made, script)
        return delta, residual

    def _taker(self, rows: int) -> Empty:
        """Takes room for so many rows, whatever a call needs now."""

        def take(size: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
            return self._workspace.take((rows, *size[1:]), dtype=dtype)[: size[0]]

        return take


def _whole(part: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor whose first rows these are."""
    return part.as_strided((rows, *part.shape[1:]), part.stride())


def _width(packed: Packed) -> int:
    return packed.block_tables.shape[1]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _with_room(packed: Packed, rows: int, width: int) -> Packed:
    """The same, of memory of its own: for so many rows, and as many sequences as rows."""

    def roomy(tensor: torch.Tensor, *size: int) -> torch.Tensor:
        whole = tensor.new_zeros(size)
        whole[tuple(slice(length) for length in tensor.shape)] = tensor
        return whole

    return replace(
        packed,
        positions=roomy(packed.positions, rows),
        slots=roomy(packed.slots, rows),
        cu_seqlens=roomy(packed.cu_seqlens, rows + 1),
        context_lens=roomy(packed.context_lens, rows),
        block_tables=roomy(packed.block_tables, rows, width),
    )


def _first_rows(whole: Packed, packed: Packed) -> Packed:
    rows, sequences = packed.tokens, len(packed.query_lens)
    return replace(
        whole,
        positions=whole.positions[:rows],
        slots=whole.slots[:rows],
        cu_seqlens=whole.cu_seqlens[: sequences + 1],
        context_lens=whole.context_lens[:sequences],
        block_tables=whole.block_tables[:sequences],
    )
