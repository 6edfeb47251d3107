"""Ragged paged attention and the KV store as Triton kernels, over the pool as `KvLayout` lays it.

A program holds the query heads that share a KV head side by side, so each key is read once a
program. Single tokens attend in splits of their context, joined by a second kernel; how a context
is split depends on nothing but its own length, so a token attends alike in any batch.
"""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed

SPLIT_TOKENS = 256
"""Keys a split has at least, unless the context is shorter."""
MOST_SPLITS = 32
"""Bounds what the splits of a long context leave behind to be joined."""
LEAST_ROWS = 16
"""Fewest rows that the matrix units multiply."""
TILE_ROWS = 64
TILE_BYTES = 16 << 10
"""Size of the keys that a program holds at once."""

LOG2E = tl.constexpr(1.4426950408889634)


def store_kv(key: torch.Tensor, value: torch.Tensor, kv: KvLayer, slots: torch.Tensor) -> None:
    """Writes the keys and values [tokens, kv_heads, head_dim] of new tokens into their slots."""
    _store[(len(slots),)](
        key,
        value,
        kv.key,
        kv.value,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *_pool_strides(kv),
        kv_heads=kv.kv_heads,
        padded_heads=triton.next_power_of_2(kv.kv_heads),
        dim=kv.head_dim,
        padded_dim=triton.next_power_of_2(kv.head_dim),
        block_tokens=kv.block_tokens,
    )


def paged_attention(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
) -> torch.Tensor:
    """Causal attention of each chunk's queries [tokens, heads, head_dim] over its blocks."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if max(packed.query_lens) > 1:
        _attend_chunks(query, kv, packed, shape, out)
    if min(packed.query_lens) == 1:
        _attend_single_tokens(query, kv, packed, shape, out)
    return out


def _attend_chunks(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape, out: torch.Tensor
) -> None:
    group = query.shape[1] // kv.kv_heads
    padded_group = triton.next_power_of_2(group)
    tile_tokens = triton.cdiv(TILE_ROWS, padded_group)
    tiles = triton.cdiv(max(packed.query_lens), tile_tokens)
    _chunk_kernel[(tiles, len(packed.query_lens), kv.kv_heads)](
        *_operands(query, kv, packed, shape),
        out,
        **_constants(query, kv, shape),
        padded_group=padded_group,
        tile_tokens=tile_tokens,
    )


def _attend_single_tokens(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape, out: torch.Tensor
) -> None:
    sequences, heads = len(packed.query_lens), query.shape[1]
    longest = max(packed.contexts)
    seen_tokens = longest if shape.window is None else min(longest, shape.window)
    splits = min(MOST_SPLITS, triton.cdiv(seen_tokens, SPLIT_TOKENS))
    parts = query.new_empty((sequences, heads, splits, kv.head_dim), dtype=torch.float32)
    weights = query.new_empty((sequences, heads, splits), dtype=torch.float32)
    constants = _constants(query, kv, shape)
    padded_group = triton.next_power_of_2(heads // kv.kv_heads)
    cut = {"split_tokens": SPLIT_TOKENS, "most_splits": MOST_SPLITS}
    _split_kernel[(sequences, kv.kv_heads, splits)](
        *_operands(query, kv, packed, shape),
        parts,
        weights,
        splits,
        **constants,
        **cut,
        rows=max(padded_group, LEAST_ROWS),
    )
    _join_kernel[(sequences, heads)](
        parts,
        weights,
        out,
        packed.cu_seqlens,
        packed.context_lens,
        shape.window or 0,
        splits,
        windowed=constants["windowed"],
        keys_at_once=constants["keys_at_once"],
        dim=constants["dim"],
        padded_dim=constants["padded_dim"],
        **cut,
    )


def _operands(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
) -> tuple[Any, ...]:
    assert query.stride(2) == 1
    return (
        query,
        kv.key,
        kv.value,
        packed.block_tables,
        packed.cu_seqlens,
        packed.context_lens,
        query.stride(0),
        query.stride(1),
        *_pool_strides(kv),
        packed.block_tables.stride(0),
        shape.scale,
        shape.soft_cap or 0.0,
        shape.window or 0,
    )


def _pool_strides(kv: KvLayer) -> tuple[int, int, int]:
    """Elements from a block, a head and a token to the next."""
    block, head, token, element = kv.key.stride()
    assert element == 1
    assert kv.value.stride() == kv.key.stride()
    return block, head, token


def _constants(query: torch.Tensor, kv: KvLayer, shape: AttentionShape) -> dict[str, Any]:
    padded_dim = max(LEAST_ROWS, triton.next_power_of_2(kv.head_dim))
    keys_at_once = min(64, max(LEAST_ROWS, TILE_BYTES // (padded_dim * query.element_size())))
    return {
        "group": query.shape[1] // kv.kv_heads,
        "dim": kv.head_dim,
        "padded_dim": padded_dim,
        "block_tokens": kv.block_tokens,
        "keys_at_once": keys_at_once,
        "windowed": shape.window is not None,
        "capped": shape.soft_cap is not None,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    key: tl.tensor,
    value: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    slots: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    pool_block: tl.tensor,
    pool_head: tl.tensor,
    pool_token: tl.tensor,
    kv_heads: tl.constexpr,
    padded_heads: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads = tl.arange(0, padded_heads)[:, None]
    dims = tl.arange(0, padded_dim)[None, :]
    inside = (heads < kv_heads) & (dims < dim)
    at = slot // block_tokens * pool_block + slot % block_tokens * pool_token
    places = at + heads * pool_head + dims
    keys = tl.load(key + token * key_token + heads * key_head + dims, mask=inside)
    tl.store(key_pool + places, keys.to(key_pool.dtype.element_ty), mask=inside)
    values = tl.load(value + token * value_token + heads * value_head + dims, mask=inside)
    tl.store(value_pool + places, values.to(value_pool.dtype.element_ty), mask=inside)


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
    total, sums, _ = _attend(
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


@triton.jit  # type: ignore[untyped-decorator]
def _split_kernel(
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
    soft_cap: tl.tensor,
    window: tl.tensor,
    parts: tl.tensor,
    weights: tl.tensor,
    splits: tl.tensor,
    group: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    keys_at_once: tl.constexpr,
    windowed: tl.constexpr,
    capped: tl.constexpr,
    split_tokens: tl.constexpr,
    most_splits: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """A chunk of one token over one split of its context, for the heads of one KV head."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(bounds + sequence)
    if tl.load(bounds + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    start, span = _cut(context, window, windowed, split_tokens, most_splits, keys_at_once)
    begin = start + split * span
    if begin >= context:
        return
    member = tl.arange(0, rows)
    dims = tl.arange(0, padded_dim)
    inside = (member < group)[:, None] & (dims < dim)[None, :]
    head = kv_head * group + member
    places = row.to(tl.int64) * query_token + head * query_head
    queries = tl.load(query + places[:, None] + dims[None, :], mask=inside, other=0.0)
    total, sums, peak = _attend(
        queries,
        tl.zeros((rows,), tl.int32) + (context - 1),
        begin,
        tl.minimum(begin + span, context),
        key + kv_head.to(tl.int64) * pool_head,
        value + kv_head.to(tl.int64) * pool_head,
        tables + sequence.to(tl.int64) * table_row,
        pool_block,
        pool_token,
        scale,
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
    heads = tl.num_programs(1) * group
    part = (sequence.to(tl.int64) * heads + head) * splits + split
    tl.store(parts + part[:, None] * dim + dims[None, :], total / sums[:, None], mask=inside)
    tl.store(weights + part, peak + tl.log2(sums), mask=member < group)


@triton.jit  # type: ignore[untyped-decorator]
def _join_kernel(
    parts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    bounds: tl.tensor,
    contexts: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    windowed: tl.constexpr,
    keys_at_once: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    split_tokens: tl.constexpr,
    most_splits: tl.constexpr,
) -> None:
    """The attention of one token and head from those over its splits."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(bounds + sequence)
    if tl.load(bounds + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    start, span = _cut(context, window, windowed, split_tokens, most_splits, keys_at_once)
    heads = tl.num_programs(1)
    first = (sequence.to(tl.int64) * heads + head) * splits
    dims = tl.arange(0, padded_dim)
    used = tl.arange(0, most_splits) < tl.cdiv(context - start, span)
    own = tl.load(weights + first + tl.arange(0, most_splits), mask=used, other=float("-inf"))
    peak = tl.max(own, 0)
    total = tl.zeros((padded_dim,), tl.float32)
    sums = 0.0
    for split in range(tl.cdiv(context - start, span)):
        weight = tl.exp2(tl.load(weights + first + split) - peak)
        part = tl.load(parts + (first + split) * dim + dims, mask=dims < dim, other=0.0)
        total += weight * part
        sums += weight
    places = (row.to(tl.int64) * heads + head) * dim + dims
    tl.store(out + places, (total / sums).to(out.dtype.element_ty), mask=dims < dim)


@triton.jit  # type: ignore[untyped-decorator]
def _cut(
    context: tl.tensor,
    window: tl.tensor,
    windowed: tl.constexpr,
    split_tokens: tl.constexpr,
    most_splits: tl.constexpr,
    keys_at_once: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Where a context's splits start and how many keys each has."""
    start = 0
    if windowed:
        start = tl.maximum(context - window, 0)
    share = tl.cdiv(tl.cdiv(context - start, most_splits), keys_at_once) * keys_at_once
    return start, tl.maximum(share, split_tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    queries: tl.tensor,
    at: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    table: tl.tensor,
    pool_block: tl.tensor,
    pool_token: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    rows: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    keys_at_once: tl.constexpr,
    windowed: tl.constexpr,
    capped: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Weighted values [rows, dims] over the keys begin .. end - 1, their weights' sum and peak.

    Weights are powers of two, relative to the peak.
    """
    dims = tl.arange(0, padded_dim)
    total = tl.zeros((rows, padded_dim), tl.float32)
    sums = tl.zeros((rows,), tl.float32)
    peak = tl.full((rows,), float("-inf"), tl.float32)
    for start in range(begin, end, keys_at_once):
        of = start + tl.arange(0, keys_at_once)
        block = tl.load(table + of // block_tokens, mask=of < end, other=0).to(tl.int64)
        places = block * pool_block + of % block_tokens * pool_token
        places = places[:, None] + dims[None, :]
        inside = (of < end)[:, None] & (dims < dim)[None, :]
        keys = tl.load(key + places, mask=inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if capped:
            scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)
        seen = (of[None, :] <= at[:, None]) & (of < end)[None, :]
        if windowed:
            seen = seen & (of[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        shrunk = tl.exp2(peak - level)
        values = tl.load(value + places, mask=inside, other=0.0).to(queries.dtype)
        added = tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
        total = total * shrunk[:, None] + added
        sums = sums * shrunk + tl.sum(weights, 1)
        peak = higher
    return total, sums, peak
