"""The operations on a CUDA device: our Triton kernels, and torch's flash kernels where they fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine import triton_attention, varlen_attention
from engine.cuda_graphs import CudaGraphs
from engine.triton_ops import TritonOps
from engine.varlen_attention import Case, case_of
from engine.whole_steps import WholeSteps

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from engine.attention import AttentionShape, KvLayer
    from engine.ops import Repeats
    from engine.packing import Packed
    from engine.sampler import Sampler

    Attend = Callable[[torch.Tensor, KvLayer, Packed, AttentionShape], torch.Tensor]

log = logging.getLogger(__name__)


class CudaOps(TritonOps):
    name = "cuda"
    repeats_sums = True

    def __init__(
        self,
        own: Attend = triton_attention.paged_attention,
        why_not_varlen: Callable[[Case, torch.device], str | None] = varlen_attention.why_not,
    ) -> None:
        """`own` attends in the cases that torch's kernels do not take."""
        self._own, self._why_not_varlen = own, why_not_varlen
        self._chosen: dict[Case, Attend] = {}

    def repeats(self) -> Repeats:
        return CudaGraphs()

    def whole_steps(
        self,
        logits_of: Callable[[Packed], torch.Tensor],
        sampler: Sampler,
        *,
        block_tokens: int,
        longest: int,
        device: torch.device,
    ) -> WholeSteps:
        return WholeSteps(
            logits_of, sampler, block_tokens=block_tokens, longest=longest, device=device
        )

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
        log.info("attention chosen backend=triton reason=%s case=%s", reason, case)
        return self._own
