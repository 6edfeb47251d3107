"""Ragged paged attention in plain torch: the reference every other backend must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from engine.packing import Packed

QUERY_TILE = 256
"""Queries of a sequence attended at once; bounds the mask and the scores of a long prompt."""


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's part of the pool: strided views [blocks, kv_heads, block_tokens, head_dim]."""

    key: torch.Tensor
    value: torch.Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0
    """What keys and values in 8 bits are multiplied by; wider ones stand for themselves."""

    @property
    def narrow(self) -> bool:
        """Whether it holds 8-bit floats."""
        return self.key.dtype.itemsize == 1

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def block_tokens(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.key.shape[3]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """How a layer attends: a query sees its last `window` positions, itself included."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None


def store_kv(key: torch.Tensor, value: torch.Tensor, kv: KvLayer, slots: torch.Tensor) -> None:
    """Writes the keys and values [tokens, kv_heads, head_dim] of new tokens into their slots."""
    block = torch.div(slots, kv.block_tokens, rounding_mode="floor")
    place = slots - block * kv.block_tokens
    kv.key[block, :, place] = _stored(key, kv, kv.key_scale)
    kv.value[block, :, place] = _stored(value, kv, kv.value_scale)


def _stored(values: torch.Tensor, kv: KvLayer, scale: float) -> torch.Tensor:
    """As the cache holds them: 8 bits end where they reach no further."""
    dtype = kv.key.dtype
    if not kv.narrow:
        return values.to(dtype)
    most = torch.finfo(dtype).max
    return (values.float() / scale).clamp(-most, most).to(dtype)


def paged_attention(
    query: torch.Tensor,
    kv: KvLayer,
    packed: Packed,
    shape: AttentionShape,
    *,
    tile: int = QUERY_TILE,
) -> torch.Tensor:
    """Causal attention of each chunk's queries [tokens, heads, head_dim] over its blocks."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    row = 0
    for sequence, (count, context) in enumerate(
        zip(packed.query_lens, packed.contexts, strict=True)
    ):
        table = packed.block_tables[sequence]
        for start in range(0, count, tile):
            rows = slice(row + start, row + min(start + tile, count))
            first = context - count + start
            out[rows] = _attend_tile(query[rows], first, kv, table, shape)
        row += count
    return out


def _attend_tile(
    query: torch.Tensor, first: int, kv: KvLayer, table: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """Attention of consecutive queries, the first of which stands at position `first`."""
    count, heads, dim = query.shape
    end = first + count
    begin = 0 if shape.window is None else max(0, first - shape.window + 1)
    key, value = _gather(kv, table, begin, end)
    key, value = key.to(query.dtype), value.to(query.dtype)
    if kv.narrow:
        key, value = key * kv.key_scale, value * kv.value_scale
    group = heads // kv.kv_heads
    folded = query.view(count, kv.kv_heads, group, dim).permute(1, 2, 0, 3)
    folded = folded.reshape(kv.kv_heads, group * count, dim)
    mask = None
    if count > 1:
        seen = _mask(range(first, end), range(begin, end), shape.window, query.device)
        mask = seen.repeat(group, 1)
    out = _scores_to_values(folded, key, value, mask, shape)
    return out.view(kv.kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)


def _gather(
    kv: KvLayer, table: torch.Tensor, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [kv_heads, end - begin, head_dim] of a run of positions."""
    size = kv.block_tokens
    blocks = table[begin // size : -(-end // size)]
    skip = begin % size

    def flat(pool: torch.Tensor) -> torch.Tensor:
        pieces = pool[blocks].permute(1, 0, 2, 3).reshape(kv.kv_heads, -1, kv.head_dim)
        return pieces[:, skip : skip + end - begin]

    return flat(kv.key), flat(kv.value)


def _mask(queries: range, keys: range, window: int | None, device: torch.device) -> torch.Tensor:
    """True where a query may look, [queries, keys]."""
    at = torch.arange(queries.start, queries.stop, device=device)[:, None]
    of = torch.arange(keys.start, keys.stop, device=device)[None, :]
    seen = of <= at
    return seen if window is None else seen & (of > at - window)


def _scores_to_values(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    shape: AttentionShape,
) -> torch.Tensor:
    if shape.soft_cap is None:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=shape.scale
        )[0]
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * shape.scale
    scores = torch.tanh(scores / shape.soft_cap) * shape.soft_cap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), value.float()).to(query.dtype)
