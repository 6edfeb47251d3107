"""Repeats the layers of a decode step as one CUDA graph: one launch instead of hundreds.

A graph reads and writes the same memory each time and runs the same programs, so it is made for a
number of rows and a width of block tables. A step between two sizes runs the larger graph, filled
up with rows that have no slot to store to and no context to attend to.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.cuda import _POOL_HANDLE

    from engine.ops import Layers, Made
    from engine.packing import Packed

    Record = Callable[[Callable[[], Made]], tuple[Made, Callable[[], object]]]

Result = TypeVar("Result")

log = logging.getLogger(__name__)

MOST_ROWS = 512
"""Steps of more sequences compute for longer than their launches take."""
LEAST_WIDTH, WIDER = 64, 4
"""Blocks in the narrowest tables, and how many times wider each next size is: a graph starts as
many programs as the longest context of its size needs, whatever its rows hold."""
NO_SLOT = -1


class Recorder:
    """Makes graphs whose passing values lie in one memory: they never run at the same time."""

    def __init__(self) -> None:
        self._memory: _POOL_HANDLE | None = None

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], object]]:
        """What `work` makes, and what makes it anew; the values are there after the next call."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()  # compiles kernels and settles choices, which no graph can hold
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Transfers and watchdogs of other threads go on asking the device meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            made = work()
        self._memory = self._memory or graph.pool()
        return made, graph.replay


@dataclass(frozen=True, slots=True)
class _Step:
    """A graph with the memory that it reads, and where it leaves what the layers made."""

    packed: Packed
    hidden: torch.Tensor
    made: Made
    again: Callable[[], object]


class CudaGraphs:
    """The decode steps of one stage that were made graphs, by rows and width of tables."""

    def __init__(self, record: Record | None = None) -> None:
        self._record = record or Recorder()
        self._steps: dict[tuple[int, int], _Step] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, layers: Layers, packed: Packed, hidden: torch.Tensor) -> Made | None:
        """What the layers make of `hidden`, good until the next step; None if not repeatable."""
        if packed.tokens > MOST_ROWS:
            return None
        size = rows_of(packed.tokens), width_of(packed.block_tables.shape[1])
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._make(layers, packed, hidden, size)
        _fill(step, packed, hidden)
        step.again()
        delta, residual = step.made
        rows = slice(packed.tokens)
        return None if delta is None else delta[rows], residual[rows]

    def _make(
        self, layers: Layers, packed: Packed, hidden: torch.Tensor, size: tuple[int, int]
    ) -> _Step:
        rows, width = size
        own = _of_size(packed, rows, width)
        start = hidden.new_zeros(rows, hidden.shape[1])
        made, again = self._record(partial(layers, own, start))
        log.info("made a graph of decode steps rows=%d table_blocks=%d", rows, width)
        return _Step(own, start, made, again)


def rows_of(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def width_of(blocks: int) -> int:
    width = LEAST_WIDTH
    while width < blocks:
        width *= WIDER
    return width


def _of_size(packed: Packed, rows: int, width: int) -> Packed:
    """A batch of as many rows, all of them empty, whose contexts may grow to fill their tables."""
    return replace(
        packed,
        token_ids=packed.token_ids.new_zeros(rows),
        positions=packed.positions.new_zeros(rows),
        slots=packed.slots.new_full((rows,), NO_SLOT),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=packed.cu_seqlens.device),
        context_lens=packed.context_lens.new_zeros(rows),
        block_tables=packed.block_tables.new_zeros(rows, width),
        draw_rows=packed.draw_rows.new_zeros(0),
        query_lens=(1,) * rows,
        contexts=(width * packed.block_tokens,) * rows,
    )


def _fill(step: _Step, packed: Packed, hidden: torch.Tensor) -> None:
    own, rows = step.packed, packed.tokens
    own.slots[rows:] = NO_SLOT
    own.context_lens[rows:] = 0
    own.positions[:rows].copy_(packed.positions)
    own.slots[:rows].copy_(packed.slots)
    own.context_lens[:rows].copy_(packed.context_lens)
    own.block_tables[:rows, : packed.block_tables.shape[1]].copy_(packed.block_tables)
    step.hidden[:rows].copy_(hidden)
