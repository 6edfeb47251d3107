"""A batch as flat arrays: what every layer of one forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Chunk

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Packed:
    """A ragged batch of `sequences` chunks; chunk i owns rows cu_seqlens[i] : cu_seqlens[i + 1]."""

    token_ids: torch.Tensor
    """int64 [tokens]."""
    positions: torch.Tensor
    """int64 [tokens]."""
    slots: torch.Tensor
    """int64 [tokens]: block * block_tokens + place in the block, where a token's KV goes."""
    cu_seqlens: torch.Tensor
    """int32 [sequences + 1]."""
    context_lens: torch.Tensor
    """int32 [sequences]: cached tokens plus the chunk's own."""
    block_tables: torch.Tensor
    """int32 [sequences, widest table]; entries past a sequence's blocks are never read."""
    draw_rows: torch.Tensor
    """int64: the rows whose logits are wanted, in the batch's order."""
    query_lens: tuple[int, ...]
    """Tokens of each chunk, on the host."""
    contexts: tuple[int, ...]
    """`context_lens`, on the host."""
    block_tokens: int

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]


def pack(chunks: Sequence[Chunk], block_tokens: int, device: torch.device) -> Packed:
    """The arrays of a non-empty batch."""
    counts = np.fromiter((len(chunk.tokens) for chunk in chunks), np.int64, len(chunks))
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
    bounds = np.concatenate(([0], np.cumsum(counts)))
    tokens = int(bounds[-1])
    token_ids = np.fromiter(chain.from_iterable(c.tokens for c in chunks), np.int64, tokens)
    sequence_of = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(tokens) + (starts - bounds[:-1])[sequence_of]
    tables = _block_tables(chunks)
    block, place = np.divmod(positions, block_tokens)
    slots = tables[sequence_of, block] * np.int64(block_tokens) + place
    contexts = starts + counts
    draws = [i for i, chunk in enumerate(chunks) if chunk.draw is not None]

    def tensor(array: Ints, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device, dtype, non_blocking=True)

    return Packed(
        token_ids=tensor(token_ids, torch.int64),
        positions=tensor(positions, torch.int64),
        slots=tensor(slots, torch.int64),
        cu_seqlens=tensor(bounds, torch.int32),
        context_lens=tensor(contexts, torch.int32),
        block_tables=torch.from_numpy(tables).to(device, non_blocking=True),
        draw_rows=tensor(bounds[1:][draws] - 1, torch.int64),
        query_lens=tuple(counts.tolist()),
        contexts=tuple(contexts.tolist()),
        block_tokens=block_tokens,
    )


def _block_tables(chunks: Sequence[Chunk]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    tables = np.zeros((len(chunks), max(len(chunk.blocks) for chunk in chunks)), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.blocks)] = chunk.blocks
    return tables
