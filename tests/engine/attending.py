"""Ragged batches over a paged pool, for whatever backend attends to them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from engine.attention import AttentionShape, KvLayer
from engine.batch import Chunk
from engine.packing import Packed, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}

SHAPES = (
    AttentionShape(0.2),
    AttentionShape(0.2, window=37),
    AttentionShape(0.2, soft_cap=5.0),
    AttentionShape(0.2, window=100, soft_cap=30.0),
)
HEADS = ((4, 2, 64, 16), (3, 3, 40, 64), (6, 1, 16, 4))
"""(heads, kv_heads, head_dim, block_tokens): grouped, one to one, six to one."""
CHUNKS = ((1, 0), (1, 7), (1, 300), (30, 0), (20, 90), (1, 63), (1, 64))
"""(new tokens, cached tokens): single tokens and chunks, at and off the edges of blocks."""


@dataclass(frozen=True)
class Scene:
    """Two layers of KV, the second of which a batch's queries attend to."""

    pool: torch.Tensor
    chunks: list[Chunk]
    qkv: torch.Tensor
    heads: int

    @property
    def block_tokens(self) -> int:
        return self.pool.shape[4]

    @property
    def kv(self) -> KvLayer:
        return KvLayer(self.pool[:, 1, 0], self.pool[:, 1, 1])

    @property
    def query(self) -> torch.Tensor:
        return self.qkv.view(len(self.qkv), -1, self.pool.shape[5])[:, : self.heads]

    @property
    def packed(self) -> Packed:
        return self.pack(self.chunks)

    def pack(self, chunks: Sequence[Chunk]) -> Packed:
        return pack(chunks, self.block_tokens, self.pool.device)


def scene(
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    *,
    spans: Sequence[tuple[int, int]] = CHUNKS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Scene:
    """A pool full of numbers, over which the blocks of each chunk are scattered."""
    random = torch.Generator().manual_seed(0)
    counts = [-(-(new + cached) // block_tokens) for new, cached in spans]
    scattered = torch.randperm(sum(counts) + 3, generator=random).tolist()
    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    chunks = [
        Chunk(str(i), tuple(range(new)), cached, tuple(scattered[begin:end]), None)
        for i, ((new, cached), (begin, end)) in enumerate(zip(spans, pairwise(bounds), strict=True))
    ]
    tokens = sum(new for new, _ in spans)
    pool = torch.randn(len(scattered), 2, 2, kv_heads, block_tokens, dim, generator=random)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=random)
    return Scene(pool.to(device, dtype), chunks, qkv.to(device, dtype), heads)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within a rounding of the largest element: summation order moves small ones by as much."""
    bound = TOLERANCE[got.dtype] * wanted.abs().max().item()
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert (got.float() - wanted.float()).abs().max().item() <= bound
