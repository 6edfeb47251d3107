"""What the attention kernels share: how they are called, and the walk over the keys.

Triton compiles kernels of their own for integers that are 1 and for multiples of 16. Those that
change from pass to pass are exempt (`do_not_specialize`), or requests would wait for the compiler;
a model's own strides never change, and loads are the wider for what is known of them.
"""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed

LEAST_ROWS = 16
"""Fewest rows that the matrix units multiply."""
TILE_BYTES = 16 << 10
"""Size of the keys that a program holds at once."""

LOG2E = tl.constexpr(1.4426950408889634)


def operands(
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
        *pool_strides(kv),
        packed.block_tables.stride(0),
        shape.scale * kv.key_scale,
        kv.value_scale,
        shape.soft_cap or 0.0,
        shape.window or 0,
    )


def pool_strides(kv: KvLayer) -> tuple[int, int, int]:
    """Elements from a block, a head and a token to the next."""
    block, head, token, element = kv.key.stride()
    assert element == 1
    assert kv.value.stride() == kv.key.stride()
    return block, head, token


def constants_of(query: torch.Tensor, kv: KvLayer, shape: AttentionShape) -> dict[str, Any]:
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
def attend(
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
    value_scale: tl.tensor,
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
    return total * value_scale, sums, peak
