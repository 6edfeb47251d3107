"""Paged attention by torch's own flash kernels, where they prove to take our blocks.

Whether they do depends on the torch release (2.12 brought block tables), on the flash kernels
active in the process and on the GPU, none of which says so of itself: a small batch is tried.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from engine import attention
from engine.attention import AttentionShape, KvLayer
from engine.batch import Chunk
from engine.packing import pack

if TYPE_CHECKING:
    from engine.packing import Packed

DTYPES = (torch.bfloat16, torch.float16)
MODULE = "torch.nn.attention.varlen"
NEEDED = ("block_table", "seqused_k", "enable_gqa")
TRIED_TOLERANCE = 2.0**-6
"""Of the largest element: a rounding or two of the narrower dtype."""


@dataclass(frozen=True, slots=True)
class Case:
    """All that decides whether a backend can attend, but for the batch."""

    dtype: torch.dtype
    cache_dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    shape: AttentionShape


def case_of(query: torch.Tensor, kv: KvLayer, shape: AttentionShape) -> Case:
    return Case(
        query.dtype,
        kv.key.dtype,
        query.shape[1],
        kv.kv_heads,
        kv.head_dim,
        kv.block_tokens,
        shape,
    )


def paged_attention(
    query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
) -> torch.Tensor:
    """Causal attention of each chunk's queries [tokens, heads, head_dim] over its blocks."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        kv.key.transpose(1, 2),
        kv.value.transpose(1, 2),
        packed.cu_seqlens,
        None,
        max(packed.query_lens),
        max(packed.contexts),
        scale=shape.scale,
        window_size=(-1 if shape.window is None else shape.window - 1, 0),
        enable_gqa=True,
        seqused_k=packed.context_lens,
        block_table=packed.block_tables,
    )
    assert isinstance(out, torch.Tensor)
    return out.contiguous()


def missing_from_torch() -> str | None:
    """What this torch release lacks, or None."""
    if find_spec(MODULE) is None:
        return f"torch {torch.__version__} has no varlen_attn"
    from torch.nn.attention.varlen import varlen_attn

    missing = [name for name in NEEDED if name not in inspect.signature(varlen_attn).parameters]
    return f"varlen_attn of torch {torch.__version__} takes no {missing[0]}" if missing else None


def why_not(case: Case, device: torch.device) -> str | None:
    """Why torch's kernels cannot attend in this case; None when they were seen to."""
    reason = missing_from_torch()
    if reason is not None:
        return reason
    if device.type != "cuda":
        return f"varlen_attn runs on CUDA, not {device.type}"
    if case.shape.soft_cap is not None:
        return "varlen_attn takes no soft cap"
    if case.dtype not in DTYPES or case.cache_dtype != case.dtype:
        return f"varlen_attn takes no {case.dtype} over a cache of {case.cache_dtype}"
    return _try(case, device)


def _try(case: Case, device: torch.device) -> str | None:
    """Attends to a small batch as torch's plain operations do: a token and a chunk."""
    size = case.block_tokens
    chunks = (
        Chunk("token", (0,), size + 2, (4, 1), None),
        Chunk("chunk", (0, 0, 0), size - 1, (3, 0), None),
    )
    packed, random = pack(chunks, size, device), torch.Generator(device).manual_seed(0)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=random, device=device).to(case.dtype)

    pool = numbers(5, 2, 2, case.kv_heads, size, case.head_dim)
    kv = KvLayer(pool[:, 1, 0], pool[:, 1, 1])
    query = numbers(packed.tokens, case.heads, case.head_dim)
    shape = case.shape
    if shape.window is not None:
        shape = replace(shape, window=min(shape.window, size))  # one that the batch outgrows
    wanted = attention.paged_attention(query, kv, packed, shape)
    try:
        got = paged_attention(query, kv, packed, shape)
    except (RuntimeError, ValueError) as error:  # what torch raises for a shape it does not take
        return f"varlen_attn refused blocks of {size} tokens: {str(error).splitlines()[0]}"
    bound = TRIED_TOLERANCE * wanted.abs().max()
    if not bool(((got - wanted).abs().max() <= bound).item()):
        return f"varlen_attn attended wrongly over blocks of {size} tokens"
    return None
