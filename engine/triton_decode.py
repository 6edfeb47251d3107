"""Attention of single tokens, each over splits of its context that a second kernel joins.

How a context is split depends on nothing but its own length, so a token attends alike in any batch.
"""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engine.triton_shared import LEAST_ROWS, attend, constants_of, operands

if TYPE_CHECKING:
    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed

SPLIT_TOKENS = 256
"""Keys a split has at least, unless the context is shorter."""
MOST_SPLITS = 32
"""Bounds what the splits of a long context leave behind to be joined."""


def attend_single_tokens(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape, out: torch.Tensor
) -> None:
    sequences, heads = len(packed.query_lens), query.shape[1]
    spans = zip(packed.contexts, packed.query_lens, strict=True)
    longest = max(context for context, new in spans if new == 1)
    seen_tokens = longest if shape.window is None else min(longest, shape.window)
    splits = min(MOST_SPLITS, triton.cdiv(seen_tokens, SPLIT_TOKENS))
    parts = query.new_empty((sequences, heads, splits, kv.head_dim), dtype=torch.float32)
    weights = query.new_empty((sequences, heads, splits), dtype=torch.float32)
    constants = constants_of(query, kv, shape)
    padded_group = triton.next_power_of_2(heads // kv.kv_heads)
    cut = {"split_tokens": SPLIT_TOKENS, "most_splits": MOST_SPLITS}
    _split_kernel[(sequences, kv.kv_heads, splits)](
        *operands(query, kv, packed, shape),
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


@triton.jit(do_not_specialize=("table_row", "splits"))  # type: ignore[untyped-decorator]
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
    value_scale: tl.tensor,
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
    total, sums, peak = attend(
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
    heads = tl.num_programs(1) * group
    part = (sequence.to(tl.int64) * heads + head) * splits + split
    tl.store(parts + part[:, None] * dim + dims[None, :], total / sums[:, None], mask=inside)
    tl.store(weights + part, peak + tl.log2(sums), mask=member < group)


@triton.jit(do_not_specialize=("splits",))  # type: ignore[untyped-decorator]
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
    mean = total / tl.where(sums > 0.0, sums, 1.0)  # a row that fills a batch up has no context
    tl.store(out + places, mean.to(out.dtype.element_ty), mask=dims < dim)


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
