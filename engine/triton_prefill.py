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


def attend_chunks(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape, out: torch.Tensor
) -> None:
    group = query.shape[1] // kv.kv_heads
    padded_group = triton.next_power_of_2(group)
    tile_tokens = triton.cdiv(TILE_ROWS, padded_group)
    tiles = triton.cdiv(max(packed.query_lens), tile_tokens)
    _chunk_kernel[(tiles, len(packed.query_lens), kv.kv_heads)](
        *operands(query, kv, packed, shape),
        out,
        **constants_of(query, kv, shape),
        padded_group=padded_group,
        tile_tokens=tile_tokens,
    )


@triton.jit  # type: ignore[untyped-decorator]
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
    sequence, kv_head = tl.program_id(1), tl.program_id(2)
    tile = tl.program_id(0) * tile_tokens
    first_row = tl.load(bounds + sequence).to(tl.int64)
    count = tl.load(bounds + sequence + 1) - first_row.to(tl.int32)
    if count == 1:
        return
    if tile >= count:
        return
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
    heads = tl.num_programs(2) * group
    targets = ((first_row + token) * heads + head) * dim
    result = (total / sums[:, None]).to(out.dtype.element_ty)
    tl.store(out + targets[:, None] + dims[None, :], result, mask=inside)
