"""Plain torch made repeatable: a row's result never depends on the rows it shares a batch with.

Matrix libraries choose their order of summation by the shape of the problem, so each row goes
through alone. Slow, and only for machines without kernels that are repeatable by construction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine import attention
from engine.ops import TorchOps

if TYPE_CHECKING:
    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed


class RowwiseOps(TorchOps):
    name = "torch, row by row"

    def linear(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = [
            super(RowwiseOps, self).linear(weight, row.clone(), bias) for row in torch.split(x, 1)
        ]
        return torch.cat(rows) if rows else x.new_empty(0, weight.shape[0])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rms_norm = super().rms_norm
        rows = [rms_norm(row, weight, eps) for row in torch.split(x, 1)]
        return torch.cat(rows) if rows else x

    def paged_attention(
        self, query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
    ) -> torch.Tensor:
        return attention.paged_attention(query, kv, packed, shape, tile=1)
