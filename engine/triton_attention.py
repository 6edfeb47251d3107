"""Ragged paged attention and the KV store as Triton kernels, over the pool as `KvLayout` lays it.

A program holds the query heads that share a KV head side by side, so each key is read once a
program.
"""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engine.triton_decode import attend_single_tokens
from engine.triton_prefill import attend_chunks
from engine.triton_shared import pool_strides

if TYPE_CHECKING:
    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed


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
        *pool_strides(kv),
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
        attend_chunks(query, kv, packed, shape, out)
    if min(packed.query_lens) == 1:
        attend_single_tokens(query, kv, packed, shape, out)
    return out


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
