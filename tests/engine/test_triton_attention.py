"""The attention kernels against plain torch, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine import attention, triton_attention, triton_decode, triton_prefill
from engine.attention import AttentionShape
from engine.batch import Chunk
from tests.engine.attending import HEADS, SHAPES, assert_close, scene


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_ragged_batch_attends_as_in_torch(
    heads: tuple[int, int, int, int], shape: AttentionShape
) -> None:
    batch = scene(*heads)
    wanted = attention.paged_attention(batch.query.contiguous(), batch.kv, batch.packed, shape)
    got = triton_attention.paged_attention(batch.query, batch.kv, batch.packed, shape)
    assert_close(got, wanted)


class Counted:
    """A kernel that says how many programs it was started with."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.programs = list[int]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.programs.append(prod(grid))
        return self._kernel[grid]


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_chunks_among_single_tokens_start_no_more_programs_than_there_are_tiles_and_sequences(
    shape: AttentionShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_chunks = Counted(triton_prefill._chunk_kernel)
    monkeypatch.setattr(triton_prefill, "_chunk_kernel", of_chunks)
    of_splits = Counted(triton_decode._split_kernel)
    monkeypatch.setattr(triton_decode, "_split_kernel", of_splits)
    singles = [(1, count % 9) for count in range(70)]
    batch = scene(1, 1, 16, 4, spans=[*singles, (150, 300), *singles, (65, 0), (64, 5), (2, 1)])
    wanted = attention.paged_attention(batch.query.contiguous(), batch.kv, batch.packed, shape)
    got = triton_attention.paged_attention(batch.query, batch.kv, batch.packed, shape)
    assert_close(got, wanted)
    tiles = -(-batch.packed.tokens // triton_prefill.TILE_ROWS)
    assert sum(of_chunks.programs) <= tiles + len(batch.chunks)
    assert of_splits.programs == [len(batch.chunks)]


@pytest.mark.parametrize("window", [None, 700])
def test_a_long_context_attends_in_splits_of_bounded_number(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = AttentionShape(0.2, window=window)
    batch = scene(4, 2, 32, 16, spans=((1, 900), (1, 20), (1, 520)))
    wanted = attention.paged_attention(batch.query.contiguous(), batch.kv, batch.packed, shape)
    for most_splits in (32, 2):
        monkeypatch.setattr(triton_decode, "MOST_SPLITS", most_splits)
        got = triton_attention.paged_attention(batch.query, batch.kv, batch.packed, shape)
        assert_close(got, wanted)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_token_attends_alike_in_any_batch(shape: AttentionShape) -> None:
    batch = scene(4, 2, 32, 16, spans=((1, 300), (1, 520), (9, 3)))
    together = triton_attention.paged_attention(batch.query, batch.kv, batch.packed, shape)
    alone = batch.pack(batch.chunks[:1])
    got = triton_attention.paged_attention(batch.query[:1], batch.kv, alone, shape)
    assert torch.equal(got, together[:1])
    last = batch.pack(batch.chunks[2:])
    got = triton_attention.paged_attention(batch.query[2:], batch.kv, last, shape)
    assert torch.equal(got, together[2:])


@pytest.mark.parametrize("new", [1, 3])
def test_what_lies_outside_the_window_and_past_the_end_is_never_seen(new: int) -> None:
    batch = scene(2, 1, 32, 16, spans=((new, 40),))
    batch.pool[:] = float("nan")
    window = 8
    for position in range(40 - window + 1, 40 + new):
        block = batch.chunks[0].blocks[position // 16]
        batch.pool[block, :, :, :, position % 16] = 1.0
    shape = AttentionShape(1.0, window=window)
    got = triton_attention.paged_attention(batch.query, batch.kv, batch.packed, shape)
    assert_close(got, torch.ones_like(got))


def test_a_cache_of_another_dtype_is_read_in_its_own() -> None:
    batch = scene(2, 1, 32, 16, spans=((1, 20), (4, 3)))
    half = replace(batch, pool=batch.pool.half())
    query, shape = half.query.contiguous(), AttentionShape(0.2)
    wanted = attention.paged_attention(query, half.kv, half.packed, shape)
    assert_close(triton_attention.paged_attention(query, half.kv, half.packed, shape), wanted)


def test_a_batch_of_one_token_of_one_sequence() -> None:
    batch = scene(1, 1, 16, 16, spans=((1, 0),))
    packed = batch.pack([Chunk("r", (1,), 0, batch.chunks[0].blocks, None)])
    got = triton_attention.paged_attention(batch.query, batch.kv, packed, AttentionShape(1.0))
    block = batch.chunks[0].blocks[0]
    assert_close(got[0, 0], batch.kv.value[block, 0, 0])
