"""The operations on a CUDA device: our Triton kernels, and torch's flash kernels where they fit."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engine import varlen_attention
from engine.cuda_graphs import CudaGraphs
from engine.ops import TorchOps
from engine.varlen_attention import Case, case_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from engine.attention import AttentionShape, KvLayer
    from engine.ops import Activation, QkNorm, Repeats, Rotary
    from engine.packing import Packed

    Attend = Callable[[torch.Tensor, KvLayer, Packed, AttentionShape], torch.Tensor]

log = logging.getLogger(__name__)


def own_ops() -> TorchOps:
    """Our Triton kernels; plain torch, with a warning, where Triton is not installed."""
    if find_spec("triton") is None:
        log.warning("computing in plain torch on a GPU reason=Triton is not installed")
        return TorchOps()
    from engine.triton_ops import TritonOps

    return TritonOps()


class CudaOps(TorchOps):
    """Attends by torch's flash kernels in the cases they take; all else is `own`."""

    name = "cuda"

    def __init__(
        self,
        own: TorchOps | None = None,
        why_not_varlen: Callable[[Case, torch.device], str | None] = varlen_attention.why_not,
    ) -> None:
        self._own = own or own_ops()
        self._why_not_varlen = why_not_varlen
        self._chosen: dict[Case, Attend] = {}

    def repeats(self) -> Repeats | None:
        """Only our kernels leave alone the rows by which a batch is filled up."""
        return CudaGraphs() if self._own.skips_rows_without_slot else None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._own.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._own.add_rms_norm(x, residual, weight, eps)

    def gated(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        return self._own.gated(gate_up, kind)

    def place_qkv(
        self,
        qkv: torch.Tensor,
        kv: KvLayer,
        packed: Packed,
        rotary: Rotary | None,
        qk_norm: QkNorm | None,
    ) -> torch.Tensor:
        return self._own.place_qkv(qkv, kv, packed, rotary, qk_norm)

    def paged_attention(
        self, query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
    ) -> torch.Tensor:
        case = case_of(query, kv, shape)
        attend = self._chosen.get(case)
        if attend is None:
            attend = self._chosen[case] = self._choose(case, query.device)
        return attend(query, kv, packed, shape)

    def _choose(self, case: Case, device: torch.device) -> Attend:
        """Settles a case once: a model has as many as it has kinds of attention layers."""
        reason = self._why_not_varlen(case, device)
        if reason is None:
            log.info("attention chosen backend=varlen_attn case=%s", case)
            return varlen_attention.paged_attention
        log.info("attention chosen backend=%s reason=%s case=%s", self._own.name, reason, case)
        return self._own.paged_attention
