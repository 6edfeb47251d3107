"""Ragged paged attention as Triton kernels, over the pool as `KvLayout` lays it.

A program holds the query heads that share a KV head side by side, so each key is read once a
program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.triton_decode import attend_single_tokens
from engine.triton_prefill import attend_chunks

if TYPE_CHECKING:
    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed


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
