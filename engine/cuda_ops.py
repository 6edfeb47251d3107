"""The operations on a CUDA device: plain torch, but for attention and the KV store."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engine import attention, varlen_attention
from engine.ops import TorchOps
from engine.varlen_attention import Case, case_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from engine.attention import AttentionShape, KvLayer
    from engine.packing import Packed

    Attend = Callable[[torch.Tensor, KvLayer, Packed, AttentionShape], torch.Tensor]
    Store = Callable[[torch.Tensor, torch.Tensor, KvLayer, torch.Tensor], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What attends where torch's flash kernels do not, and stores KV everywhere."""

    name: str
    attend: Attend
    store: Store


def own_kernels() -> Kernels:
    """Our Triton kernels; plain torch, with a warning, where Triton is not installed."""
    if find_spec("triton") is None:
        log.warning("attending in plain torch on a GPU reason=Triton is not installed")
        return Kernels("torch", attention.paged_attention, attention.store_kv)
    from engine import triton_attention

    return Kernels("triton", triton_attention.paged_attention, triton_attention.store_kv)


class CudaOps(TorchOps):
    """Attends by torch's flash kernels in the cases they take, by our own in all others."""

    name = "cuda"

    def __init__(
        self,
        kernels: Kernels | None = None,
        why_not_varlen: Callable[[Case, torch.device], str | None] = varlen_attention.why_not,
    ) -> None:
        self._kernels = kernels or own_kernels()
        self._why_not_varlen = why_not_varlen
        self._chosen: dict[Case, Attend] = {}

    def store_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv: KvLayer, slots: torch.Tensor
    ) -> None:
        self._kernels.store(key, value, kv, slots)

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
        log.info("attention chosen backend=%s reason=%s case=%s", self._kernels.name, reason, case)
        return self._kernels.attend
