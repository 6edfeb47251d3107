"""Decode steps that stay on the device: tokens go from a step's draw into the next step's layers.

A step is one graph: where its rows stand, embedding, layers, head, draw, and the rows moved on.
The host launches it, reads the tokens once it is through, and in between sends no more than what
it could not know: sequences that come, leave or get another block. Nothing of that needs the
tokens, so a step may be launched while the one before it runs. Rows whose requests ask for more
than a temperature are drawn by the host, from the logits that the graph leaves: no step follows
them before that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine import triton_draw
from engine.batch import Drawn
from engine.blocks import blocks_for
from engine.cuda_graphs import MOST_ROWS, Recorder, rows_of, width_of
from engine.device_events import reached_by
from engine.device_rows import DeviceRows
from engine.errors import BadLogits
from engine.seats import Seats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine.batch import Chunk
    from engine.device_events import Event
    from engine.packing import Packed
    from engine.sampler import Sampler
    from engine.seats import Said

    LogitsOf = Callable[[Packed], torch.Tensor]
    Work = Callable[[], torch.Tensor]
    Record = Callable[[Work], tuple[torch.Tensor, Callable[[], object]]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Step:
    """A graph with the memory that it reads, and the logits that it leaves."""

    packed: Packed
    logits: torch.Tensor
    again: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device was asked for: `results` stand once it has come to `done`."""

    chunks: Sequence[Chunk]
    rows: list[int]
    left: list[Said]
    """What the rows say after it."""
    logits: torch.Tensor
    results: torch.Tensor
    done: Event


class WholeSteps:
    def __init__(
        self,
        logits_of: LogitsOf,
        sampler: Sampler,
        *,
        block_tokens: int,
        longest: int,
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        """`logits_of` computes a batch of single tokens; `longest` bounds their contexts."""
        self._logits_of, self._sampler, self._device = logits_of, sampler, device
        self._record = record or Recorder()
        self._table_blocks = blocks_for(longest, block_tokens)
        self._rows = DeviceRows(MOST_ROWS, self._table_blocks, block_tokens, device)
        self._seats = Seats()
        self._steps: dict[tuple[int, int], _Step] = {}
        self._under_way = 0

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, chunks: Sequence[Chunk]) -> tuple[Drawn, ...] | None:
        """What each of some single tokens is followed by; None for any other batch."""
        launched = self.launch(chunks)
        return None if launched is None else self.collect(launched)

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Launched | None:
        """Asks the device for a step of single tokens, without waiting for it. None for any other
        batch; and while a step is under way, where a graph would have to be made, or a row to be
        moved, and unread tokens be lost."""
        if len(chunks) > MOST_ROWS or any(len(c.tokens) > 1 or c.draw is None for c in chunks):
            return None
        rows, width = rows_of(len(chunks)), self._width_of(chunks)
        if self._under_way and not self._may_follow(chunks, rows, width):
            return None
        step = self._step(rows, width)
        taken, written = self._seats.take(chunks, rows)
        try:
            self._rows.write(written)
            step.again()
            results, done = self._rows.results(), reached_by(self._device)
        except RuntimeError:
            self._clear()  # nobody knows how far the rows got
            raise
        self._under_way += 1
        left = self._seats.moved_on(taken)
        return Launched(chunks, taken, left, step.logits, results, done)

    def collect(self, launched: Launched) -> tuple[Drawn, ...]:
        """Waits for a step; they are collected as they were launched."""
        self._under_way -= 1
        try:
            launched.done.synchronize()
        except RuntimeError:
            self._clear()
            raise
        chunks, taken = launched.chunks, launched.rows
        drawn, sound = launched.results.tolist()
        self._seats.learned(taken, launched.left, [drawn[row] for row in taken])
        _check([c.request_id for c, row in zip(chunks, taken, strict=True) if not sound[row]])
        return self._told(chunks, taken, drawn, launched.logits)

    def _told(
        self, chunks: Sequence[Chunk], taken: list[int], drawn: list[int], logits: torch.Tensor
    ) -> tuple[Drawn, ...]:
        names = [chunk.request_id for chunk in chunks]
        told = {n: Drawn(n, drawn[row]) for n, row in zip(names, taken, strict=True)}
        asking = [
            (row, chunk.draw, chunk.request_id)
            for row, chunk in zip(taken, chunks, strict=True)
            if chunk.draw is not None and not self._sampler.is_bare(chunk.draw)
        ]
        if asking:
            assert not self._under_way, "the logits are another step's by now"
            of, draws, whose = zip(*asking, strict=True)
            for one in self._sampler.sample(logits[list(of)], draws, whose):
                told[one.request_id] = one
        return tuple(told.values())

    def _width_of(self, chunks: Sequence[Chunk]) -> int:
        blocks = blocks_for(max(chunk.end for chunk in chunks), self._rows.block_tokens)
        return min(width_of(blocks), self._table_blocks)

    def _may_follow(self, chunks: Sequence[Chunk], rows: int, width: int) -> bool:
        return (rows, width) in self._steps and self._seats.stay(chunks, rows)

    def _step(self, rows: int, width: int) -> _Step:
        step = self._steps.get((rows, width))
        if step is None:
            self._clear()  # recording runs the work, which must find no sequence
            packed = self._rows.packed(rows, width)
            logits, again = self._record(partial(self._work, packed))
            step = self._steps[rows, width] = _Step(packed, logits, again)
            log.info("made a graph of whole decode steps rows=%d table_blocks=%d", rows, width)
        return step

    def _clear(self) -> None:
        self._seats.clear()
        self._rows.clear()

    def _work(self, packed: Packed) -> torch.Tensor:
        triton_draw.place_rows(self._rows, packed.tokens, packed.block_tokens)
        logits = self._logits_of(packed)
        triton_draw.draw_rows(logits, self._rows, self._sampler.vocab_size)
        return logits


def _check(unsound: list[str]) -> None:
    if unsound:
        raise BadLogits(f"logits are not finite for {', '.join(unsound)}")
