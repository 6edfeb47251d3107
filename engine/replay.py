"""Repeats the layers of a decode step as one call to the native kernels.

Between two steps of as many sequences only what tensors hold differs. So the calls of the first
are written down, with memory of their own to read and to write, and made anew for the others:
after a step has streamed its weights through the caches, Python and torch would spend a tenth of
its time on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol
from weakref import finalize

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from engine.native_library import Kernel, Kernels, NativeLibrary
    from engine.ops import Layers, Made
    from engine.packing import Packed

MOST_ROWS = 128
"""Steps of more sequences take so long that writing them down would not pay."""
CACHE_LINE_BYTES = 64

CALL = Struct("=2q")
_aten = torch.ops.aten
WITHOUT_WORK = frozenset(
    (_aten.view, _aten.slice, _aten.select, _aten.alias, _aten.as_strided, _aten.lift_fresh)
)


class Empty(Protocol):
    def __call__(self, size: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor: ...


class WrittenCalls:
    """Calls each kernel, and keeps the call in the form that the library repeats."""

    def __init__(self, library: NativeLibrary) -> None:
        self._written = bytearray()
        self.linear = self._kept(0, library.linear)
        self.norm = self._kept(1, library.norm)
        self.activation = self._kept(2, library.activation)
        self.place = self._kept(3, library.place)
        self.attention = self._kept(4, library.attention)

    def _kept(self, number: int, kernel: Kernel) -> Kernel:
        def call(record: bytes) -> None:
            self._written += CALL.pack(number, len(record)) + record
            kernel(record)

        return call

    @property
    def calls(self) -> bytes:
        return bytes(self._written)


class Workspace:
    """Memory for what layers make: a piece is given again once no tensor refers to it."""

    def __init__(self) -> None:
        self._slabs = [np.empty(0, np.uint8)]
        self._taken: dict[int, int] = {}
        """Bytes of the pieces in use in the last slab, by where they begin."""

    def take(self, size: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
        wanted_bytes = prod(size) * dtype.itemsize
        room_bytes = -(-wanted_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        start = self._first_gap(room_bytes)
        if start + room_bytes > self._slabs[-1].size:
            start = self._grow(room_bytes)
        self._taken[start] = room_bytes
        piece = self._slabs[-1][start : start + wanted_bytes]
        finalize(piece, self._taken.pop, start).atexit = False
        return torch.from_numpy(piece).view(dtype).view(tuple(size))

    def _first_gap(self, room_bytes: int) -> int:
        at = 0
        for start in sorted(self._taken):
            if start - at >= room_bytes:
                break
            at = start + self._taken[start]
        return at

    def _grow(self, room_bytes: int) -> int:
        """A new slab; the old ones stay, since calls that were written down point there."""
        self._slabs.append(np.empty(2 * max(self._slabs[-1].size, room_bytes), np.uint8))
        self._taken = {}
        return 0


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether torch computed anything itself: that would be missing from the calls."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks; to skip its compiler it would first import it, for seconds and 100 MB."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.computed |= func.overloadpacket not in WITHOUT_WORK
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class _Step:
    packed: Packed
    hidden: torch.Tensor
    delta: torch.Tensor | None
    residual: torch.Tensor
    calls: bytes

    def fill(self, packed: Packed, hidden: torch.Tensor) -> None:
        own = self.packed
        own.positions.copy_(packed.positions)
        own.slots.copy_(packed.slots)
        own.context_lens.copy_(packed.context_lens)
        own.block_tables[:, : packed.block_tables.shape[1]].copy_(packed.block_tables)
        self.hidden.copy_(hidden)


class Replays:
    """The decode steps of one stage that were written down, by sequences and width of table."""

    def __init__(
        self,
        library: NativeLibrary,
        writing_down: Callable[[Kernels, Empty], AbstractContextManager[None]],
    ) -> None:
        self._library, self._writing_down = library, writing_down
        self._steps: dict[tuple[int, int], _Step] = {}
        self._workspace = Workspace()
        self._possible = True

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, layers: Layers, packed: Packed, hidden: torch.Tensor) -> Made | None:
        """What the layers make of `hidden`, good until the next step; None if not repeatable."""
        if not self._possible or packed.tokens > MOST_ROWS:
            return None
        width = 1 << (packed.block_tables.shape[1] - 1).bit_length()
        step = self._steps.get((packed.tokens, width))
        if step is None:
            return self._write_down(layers, _copy(packed, width), hidden)
        step.fill(packed, hidden)
        self._library.replay(step.calls)
        return step.delta, step.residual

    def _write_down(self, layers: Layers, packed: Packed, hidden: torch.Tensor) -> Made:
        kernels, watch = WrittenCalls(self._library), Watch()
        with self._writing_down(kernels, self._workspace.take), watch:
            delta, residual = layers(packed, hidden)
        self._possible = not watch.computed
        if self._possible:
            key = packed.tokens, packed.block_tables.shape[1]
            self._steps[key] = _Step(packed, hidden, delta, residual, kernels.calls)
        return delta, residual


def _copy(packed: Packed, width: int) -> Packed:
    """The same, of memory of its own, with room for block tables of a width."""
    tables = packed.block_tables.new_zeros(packed.tokens, width)
    tables[:, : packed.block_tables.shape[1]] = packed.block_tables
    return replace(
        packed,
        positions=packed.positions.clone(),
        slots=packed.slots.clone(),
        cu_seqlens=packed.cu_seqlens.clone(),
        context_lens=packed.context_lens.clone(),
        block_tables=tables,
    )
