"""Attention of the chunks of a ragged batch that are longer than a token."""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.triton_shared import attend, constants_of, operands

if TYPE_CHECKING:
    import torch

    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed

TILE_ROWS = 64
BOUNDS_AT_ONCE = tl.constexpr(128)
"""Sequences among which a program looks for its own in one step."""


def attend_chunks(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape, out: torch.Tensor
) -> None:
    group = query.shape[1] // kv.kv_heads
    padded_group = triton.next_power_of_2(group)
    tile_tokens = triton.cdiv(TILE_ROWS, padded_group)
    sequences = len(packed.query_lens)
    _chunk_kernel[(packed.tokens // tile_tokens + sequences, kv.kv_heads)](
        *operands(query, kv, packed, shape),
        out,
        sequences,
        **constants_of(query, kv, shape),
        padded_group=padded_group,
        tile_tokens=tile_tokens,
    )


@triton.jit(do_not_specialize=("table_row", "sequences"))  # type: ignore[untyped-decorator]
def _chunk_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    tables: tl.tensor,
    bounds: tl.tensor,
    contexts: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    pool_block: tl.tensor,
    pool_head: tl.tensor,
    pool_token: tl.tensor,
    table_row: tl.tensor,
    scale: tl.tensor,
    value_scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    out: tl.tensor,
    sequences: tl.tensor,
    group: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    keys_at_once: tl.constexpr,
    windowed: tl.constexpr,
    capped: tl.constexpr,
    padded_group: tl.constexpr,
    tile_tokens: tl.constexpr,
) -> None:
    """Consecutive tokens of one chunk, longer than a token, for the heads of one KV head."""
    number, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(number, bounds, sequences, tile_tokens)
    begins = tl.load(bounds + sequence)
    count = tl.load(bounds + sequence + 1) - begins
    if count == 1:
        return
    tile = (number - sequence - begins // tile_tokens) * tile_tokens
    if tile >= count:
        return
    first_row = begins.to(tl.int64)
    cached = tl.load(contexts + sequence) - count
    rows: tl.constexpr = tile_tokens * padded_group
    line = tl.arange(0, rows)
    token = tile + line // padded_group
    member = line % padded_group
    dims = tl.arange(0, padded_dim)
    inside = ((token < count) & (member < group))[:, None] & (dims < dim)[None, :]
    head = kv_head * group + member
    places = (first_row + token) * query_token + head * query_head
    queries = tl.load(query + places[:, None] + dims[None, :], mask=inside, other=0.0)
    begin = 0
    if windowed:
        begin = tl.maximum(cached + tile - window + 1, 0)
    total, sums, _ = attend(
        queries,
        cached + token,
        begin,
        cached + tl.minimum(tile + tile_tokens, count),
        key + kv_head.to(tl.int64) * pool_head,
        value + kv_head.to(tl.int64) * pool_head,
        tables + sequence.to(tl.int64) * table_row,
        pool_block,
        pool_token,
        scale,
        value_scale,
        soft_cap,
        window,
        rows,
        dim,
        padded_dim,
        block_tokens,
        keys_at_once,
        windowed,
        capped,
    )
    sums = tl.where(sums == 0.0, 1.0, sums)  # rows that pad the tile may see nothing
    heads = tl.num_programs(1) * group
    targets = ((first_row + token) * heads + head) * dim
    result = (total / sums[:, None]).to(out.dtype.element_ty)
    tl.store(out + targets[:, None] + dims[None, :], result, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sequence_of(
    number: tl.tensor, bounds: tl.tensor, sequences: tl.tensor, tile_tokens: tl.constexpr
) -> tl.tensor:
    """Whose tile a program has: those of sequence i begin at number bounds[i] // tile_tokens + i.

    So each sequence has as many as it needs, or one more, wherever it lies in the batch.
    """
    begun = 0
    for start in range(0, sequences, BOUNDS_AT_ONCE):
        sequence = start + tl.arange(0, BOUNDS_AT_ONCE)
        known = sequence < sequences
        first = tl.load(bounds + sequence, mask=known, other=0) // tile_tokens + sequence
        begun += tl.sum((known & (first <= number)).to(tl.int32), 0)
    return begun - 1
