"""The operations as our own Triton kernels, with torch's matrix products between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import triton_attention, triton_layer, triton_scaled
from engine.ops import TorchOps

if TYPE_CHECKING:
    import torch

    from engine.attention import AttentionShape, KvLayer
    from engine.model.config import Activation
    from engine.ops import QkNorm, Rotary
    from engine.packing import Packed
    from engine.scaled import ScaledWeight


class TritonOps(TorchOps):
    name = "triton"

    def keeps(self, weight: ScaledWeight) -> bool:
        return triton_scaled.can_multiply(weight)

    def scaled_linear(
        self, weight: ScaledWeight, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return triton_scaled.linear(weight, x, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return triton_layer.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return triton_layer.add_rms_norm(x, residual, weight, eps)

    def gated(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        return triton_layer.gated(gate_up, kind)

    def place_qkv(
        self,
        qkv: torch.Tensor,
        kv: KvLayer,
        packed: Packed,
        rotary: Rotary | None,
        qk_norm: QkNorm | None,
    ) -> torch.Tensor:
        return triton_layer.place_qkv(qkv, kv, packed, rotary, qk_norm)

    def paged_attention(
        self, query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
    ) -> torch.Tensor:
        return triton_attention.paged_attention(query, kv, packed, shape)
