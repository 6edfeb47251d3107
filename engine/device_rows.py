"""The sequences of decode steps as rows of memory on a device, where each step finds the next.

A row says of a sequence what a step must know. The step itself moves it on by the token that it
draws, so nothing of a sequence that simply goes on is sent to the device again, but for a new
block now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.packing import Packed
from engine.random import SEED_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from engine.batch import Chunk

LINES = 6


class DeviceRows:
    """Memory of `count` rows, all empty at first, with tables of at most `table_blocks`."""

    def __init__(
        self, count: int, table_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.count, self.block_tokens = count, block_tokens
        self._lines = torch.zeros((LINES, count), dtype=torch.int64, device=device)
        self._results = torch.zeros((2, count), dtype=torch.int64, device=device)
        self.present, self.token_ids, self.positions, self.places, self.seeds, heats = self._lines
        self.heats = heats.view(torch.float64)
        """Temperatures; 0 takes the most likely token."""
        self.drawn, self.sound = self._results
        """What the last step drew, and whether from finite logits."""
        self.tables = torch.zeros((count, table_blocks), dtype=torch.int32, device=device)
        self.slots = torch.zeros(count, dtype=torch.int64, device=device)
        self.contexts = torch.zeros(count, dtype=torch.int32, device=device)

    def write(self, written: Sequence[tuple[int, Chunk | None]]) -> None:
        """Says anew what some rows hold, None for nothing. A row whose token nobody has read is
        given its blocks alone. Does not wait for the device."""
        told = [(row, chunk) for row, chunk in written if chunk is None or not chunk.is_unread]
        held = [(row, chunk) for row, chunk in written if chunk is not None]
        if told:
            self._write_lines(told)
        if held:
            self._write_tables(held)

    def _write_lines(self, told: Sequence[tuple[int, Chunk | None]]) -> None:
        lines = np.zeros((1 + LINES, len(told)), np.int64)
        lines[0] = [row for row, _ in told]
        for place, (_, chunk) in enumerate(told):
            if chunk is not None:
                lines[1:, place] = _line_of(chunk)
        sent = self._sent(lines)
        self._lines[:, sent[0]] = sent[1:]

    def _write_tables(self, held: Sequence[tuple[int, Chunk]]) -> None:
        widest = min(max(len(chunk.blocks) for _, chunk in held), self.tables.shape[1])
        tables = np.zeros((len(held), 1 + widest), np.int32)
        for place, (row, chunk) in enumerate(held):
            blocks = chunk.blocks[:widest]
            tables[place, : 1 + len(blocks)] = row, *blocks
        sent = self._sent(tables)
        self.tables[sent[:, 0].long(), :widest] = sent[:, 1:]

    def _sent(self, array: NDArray[Any]) -> torch.Tensor:
        """A copy on the device, from memory that need not stay: what is not pinned would be
        copied only once the device is through with what it was asked for before."""
        host = torch.from_numpy(array)
        if self._lines.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._lines.device, non_blocking=True)

    def clear(self) -> None:
        self._lines.zero_()

    def packed(self, rows: int, blocks: int) -> Packed:
        """The leading rows as a batch of single tokens, over the leading part of their tables."""
        device = self.tables.device
        return Packed(
            token_ids=self.token_ids[:rows],
            positions=self.positions[:rows],
            slots=self.slots[:rows],
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_lens=self.contexts[:rows],
            block_tables=self.tables[:rows, :blocks],
            draw_rows=torch.arange(rows, device=device),
            query_lens=(1,) * rows,
            contexts=(blocks * self.block_tokens,) * rows,
            block_tokens=self.block_tokens,
        )

    def results(self) -> torch.Tensor:
        """What all rows draw, and whether from finite logits, as it will stand on the host once the
        device has come to here; the next step draws into the same memory."""
        return self._results.to("cpu", non_blocking=True, copy=True)


def _line_of(chunk: Chunk) -> tuple[int, ...]:
    """What a row says of a sequence, its unsigned and real numbers as the bits of int64."""
    assert chunk.draw is not None
    sampling = chunk.draw.sampling
    heat = 0.0 if sampling.is_greedy else sampling.temperature
    seed = np.uint64(sampling.seed & SEED_BITS).view(np.int64)
    bits = np.float64(heat).view(np.int64)
    return 1, chunk.tokens[0], chunk.start, chunk.draw.position, int(seed), int(bits)
