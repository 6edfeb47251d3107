"""Scattered copies on a GPU as one launch: a copy for each piece would cost more than its bytes."""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from kvtransfer.plan import Copies

CHUNK_WORDS = 4096
"""What a program copies."""
WORD_BYTES = 8


def copy_pieces(
    target_address: int, source_address: int, copies: Copies, device: torch.device
) -> None:
    """Asks the device for the copies; both pools begin at addresses that it can read."""
    table = np.stack((copies.source_offsets, copies.target_offsets, copies.nbytes))
    whole_words = not (table % WORD_BYTES).any()
    word_bytes = WORD_BYTES if whole_words else 1
    chunks = triton.cdiv(int(copies.nbytes.max()) // word_bytes, CHUNK_WORDS)
    if chunks == 0:
        return
    _copy[(len(copies) * chunks,)](
        source_address,
        target_address,
        torch.from_numpy(table).to(device),
        len(copies),
        chunks,
        word_bytes=word_bytes,
        word=tl.int64 if whole_words else tl.int8,
        chunk=CHUNK_WORDS,
    )


@triton.jit(do_not_specialize=("source", "target", "pieces", "chunks"))  # type: ignore[untyped-decorator]
def _copy(
    source: tl.tensor,
    target: tl.tensor,
    table: tl.tensor,
    pieces: tl.tensor,
    chunks: tl.tensor,
    word_bytes: tl.constexpr,
    word: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """One chunk of one piece, of which `table` holds [source offset, target offset, bytes]."""
    program = tl.program_id(0)
    piece, number = program // chunks, program % chunks
    words = tl.load(table + 2 * pieces + piece) // word_bytes
    at = number.to(tl.int64) * chunk + tl.arange(0, chunk)
    taken = (source + tl.load(table + piece)).to(tl.pointer_type(word)) + at
    placed = (target + tl.load(table + pieces + piece)).to(tl.pointer_type(word)) + at
    tl.store(placed, tl.load(taken, mask=at < words), mask=at < words)
