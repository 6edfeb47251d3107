"""A model whose next token is a hash of the whole prefix, read through the block table.

Each layer of each position stores a hash of the position before it, so one block that is
missing, stale, or in the wrong place changes every token that follows.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from engine.batch import Batch, Chunk, Drawn, StepResult, Swap
from engine.layout import KvLayout

if TYPE_CHECKING:
    from engine.request import Request

VOCABULARY = 64
EOS = 0
LAYERS = 4

Cell = bytes
Memory = dict[tuple[int, int, int], Cell]
"""(block, layer, slot) -> what stands there."""


@cache
def layout(block_tokens: int) -> KvLayout:
    return KvLayout("hash", LAYERS, 2, 8, block_tokens, "float32")


def _cell(before: Cell, token: int, layer: int) -> Cell:
    return blake2b(before + bytes((token, layer)), digest_size=8).digest()


def _token(cells: list[Cell], seed: int, position: int) -> int:
    key = b"".join(cells) + f"{seed}/{position}".encode()
    return blake2b(key, digest_size=2).digest()[0] % VOCABULARY


def prefix_cells(tokens: tuple[int, ...], layer: int) -> list[Cell]:
    """What each position of this prefix stores in a layer."""
    cells = [b"start"]
    for token in tokens:
        cells.append(_cell(cells[-1], token, layer))
    return cells[1:]


def expected_output(request: Request) -> list[int]:
    """What the request must be answered with, wherever it runs."""
    cells = [b"start"] * LAYERS
    for token in request.prompt:
        cells = [_cell(cell, token, layer) for layer, cell in enumerate(cells)]
    output: list[int] = []
    sampling = request.sampling
    while len(output) < sampling.max_tokens:
        output.append(_token(cells, sampling.seed, len(output)))
        if output[-1] == EOS and not sampling.ignore_eos and len(output) >= sampling.min_tokens:
            break
        cells = [_cell(cell, output[-1], layer) for layer, cell in enumerate(cells)]
    return output


class FakeModel:
    """Executes batches on one instance's memory, layer group by layer group."""

    def __init__(self, block_tokens: int) -> None:
        self.memory: Memory = {}
        self._host: dict[int, Memory] = {}
        self._block_tokens = block_tokens
        self._drawn: dict[str, tuple[int, int]] = {}
        """What the last batch drew, and at which position, as a device would hold it."""
        self._slots = range(block_tokens)

    def swap(self, swaps: tuple[Swap, ...]) -> None:
        for swap in swaps:
            for block, slot in zip(swap.blocks, swap.host_slots, strict=True):
                if swap.to_host:
                    self._host[slot] = self._read(block)
                else:
                    self._write(block, self._host.pop(slot))

    def compute(self, batch: Batch, layers: range) -> None:
        for chunk in batch.chunks:
            for layer in layers:
                self._compute_layer(chunk, layer)

    def draw(self, batch: Batch, duration_s: float) -> StepResult:
        drawn = [
            Drawn(chunk.request_id, self._draw(chunk))
            for chunk in batch.chunks
            if chunk.draw is not None
        ]
        ends = {chunk.request_id: chunk.end for chunk in batch.chunks}
        self._drawn = {one.request_id: (ends[one.request_id], one.token) for one in drawn}
        return StepResult(tuple(drawn), duration_s)

    def copy_from(self, other: FakeModel, blocks: list[tuple[int, int]], layers: range) -> None:
        for theirs, mine in blocks:
            for layer in layers:
                for slot in range(self._block_tokens):
                    cell = other.memory.get((theirs, layer, slot), b"nothing")
                    self.memory[mine, layer, slot] = cell

    def block(self, block: int) -> list[Cell]:
        """All that stands in a block."""
        cells = ((block, layer, slot) for layer in range(LAYERS) for slot in self._slots)
        return [self.memory.get(cell, b"nothing") for cell in cells]

    def corrupt(self, block: int, layer: int) -> None:
        self.memory[block, layer, 0] = b"altered"

    def _compute_layer(self, chunk: Chunk, layer: int) -> None:
        cell = b"start" if chunk.start == 0 else self._at(chunk, layer, chunk.start - 1)
        for position, token in enumerate(self._tokens_of(chunk), chunk.start):
            cell = _cell(cell, token, layer)
            block, slot = divmod(position, self._block_tokens)
            self.memory[chunk.blocks[block], layer, slot] = cell

    def _tokens_of(self, chunk: Chunk) -> tuple[int, ...]:
        if not chunk.is_unread:
            return chunk.tokens
        assert chunk.draw is not None
        assert chunk.draw.is_bare(frozenset((EOS,))), "drawn by the host"
        at, token = self._drawn[chunk.request_id]
        assert at == chunk.start, f"{chunk.request_id} is at {at}, not {chunk.start}"
        return (token,)

    def _draw(self, chunk: Chunk) -> int:
        assert chunk.draw is not None
        cells = [self._at(chunk, layer, chunk.end - 1) for layer in range(LAYERS)]
        return _token(cells, chunk.draw.sampling.seed, chunk.draw.position)

    def _at(self, chunk: Chunk, layer: int, position: int) -> Cell:
        block, slot = divmod(position, self._block_tokens)
        return self.memory.get((chunk.blocks[block], layer, slot), b"nothing")

    def _read(self, block: int) -> Memory:
        return {key: cell for key, cell in self.memory.items() if key[0] == block}

    def _write(self, block: int, content: Memory) -> None:
        for (_, layer, slot), cell in content.items():
            self.memory[block, layer, slot] = cell
