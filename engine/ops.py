"""The operations a decoder is made of: one seam, under which plain torch and native kernels sit.

Shapes: `x` is [tokens, features]; heads are [tokens, heads, head_dim] and may be strided views
of a fused projection (last dimension contiguous). Norm weights are fp32 whatever the model's
dtype; norms, RoPE and activations compute in fp32 and round once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from engine import attention
from engine.model.config import Activation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine.attention import AttentionShape, KvLayer
    from engine.batch import Chunk, Drawn
    from engine.packing import Packed
    from engine.sampler import Sampler
    from engine.scaled import ScaledWeight
    from engine.whole_steps import Launched

    Made = tuple[torch.Tensor | None, torch.Tensor]
    Layers = Callable[[Packed, torch.Tensor], Made]
    """All layers of a stage: from what enters them to the last sum and what is not yet in it."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """A layer's rotation: `table` is fp32 [positions, rotary_dim], cosines then sines.

    Dimension i < rotary_dim / 2 of a head turns with dimension i + rotary_dim / 2; dimensions past
    rotary_dim are left alone.
    """

    table: torch.Tensor


@dataclass(frozen=True, slots=True)
class QkNorm:
    """RMS norms over head_dim applied to queries and keys before the rotation."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class Repeats(Protocol):
    """The layers of decode steps, each step as one call."""

    def run(self, layers: Layers, packed: Packed, hidden: torch.Tensor) -> Made | None:
        """What the layers make of `hidden`, good until the next step; None if not repeatable."""
        ...


class LayerStep(Protocol):
    """One layer: what is not yet in the sum, the sum, and the batch."""

    def __call__(
        self, delta: torch.Tensor | None, residual: torch.Tensor, packed: Packed
    ) -> Made: ...


class RaggedRepeats(Protocol):
    """Layers over batches of any mix, with little time between their calls."""

    def run(
        self,
        layers: Mapping[int, LayerStep],
        packed: Packed,
        hidden: torch.Tensor,
        on_layer: Callable[[int], None],
    ) -> Made | None:
        """What the layers make of `hidden`, good until the next batch; None if not repeatable.

        `on_layer` is called with a layer's index once it has run.
        """
        ...


class WholeSteps(Protocol):
    """Decode steps from the tokens that go in to those drawn."""

    def run(self, chunks: Sequence[Chunk]) -> tuple[Drawn, ...] | None:
        """What each of some single tokens is followed by; None for any other batch."""
        ...

    def launch(self, chunks: Sequence[Chunk]) -> Launched | None:
        """Begins with such a step, without waiting; None where it cannot begin now."""
        ...

    def collect(self, launched: Launched) -> tuple[Drawn, ...]: ...


class Ops(Protocol):
    name: str
    repeats_sums: bool
    """Whether what `repeats` makes may hold sums over tensor ranks."""

    def repeats(self) -> Repeats | None:
        """Where decode steps can be repeated as one call each; None where they cannot."""
        ...

    def ragged_repeats(self) -> RaggedRepeats | None:
        """The same for other batches."""
        ...

    def whole_steps(
        self,
        logits_of: Callable[[Packed], torch.Tensor],
        sampler: Sampler,
        *,
        block_tokens: int,
        longest: int,
        device: torch.device,
    ) -> WholeSteps | None:
        """Where decode steps draw, too; `logits_of` computes the layers and the head of one."""
        ...

    def prepare_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """What `linear` takes for a weight [out, in]; the caller drops the original."""
        ...

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table [tokens, width], plain or what `prepare_weight` made of it."""
        ...

    def linear(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def keeps(self, weight: ScaledWeight) -> bool:
        """Whether `scaled_linear` is worth calling; else the matrix is widened when loaded."""
        ...

    def scaled_linear(
        self, weight: ScaledWeight, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def logits(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`linear` in fp32 at the end: rounded, the likeliest tokens would often be equal."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds `x` to `residual` in place and returns the norm of the sum."""
        ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def activate(self, x: torch.Tensor, kind: Activation) -> torch.Tensor: ...

    def gated(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        """activation(gate) * up of a fused projection [tokens, 2 * features]."""
        ...

    def place_qkv(
        self,
        qkv: torch.Tensor,
        kv: KvLayer,
        packed: Packed,
        rotary: Rotary | None,
        qk_norm: QkNorm | None,
    ) -> torch.Tensor:
        """Norms and rotates the queries and keys of a fused projection and stores the new KV.

        `qkv` is [tokens, (heads + 2 * kv_heads) * head_dim] and may be overwritten; the queries
        come back as [tokens, heads, head_dim], possibly a view of it.
        """
        ...

    def paged_attention(
        self, query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
    ) -> torch.Tensor:
        """Contiguous [tokens, heads, head_dim]."""
        ...


class TorchOps:
    """Plain torch: runs everywhere, and is what native kernels are compared with."""

    name = "torch"
    repeats_sums = False

    def repeats(self) -> Repeats | None:
        return None

    def ragged_repeats(self) -> RaggedRepeats | None:
        return None

    def whole_steps(
        self,
        logits_of: Callable[[Packed], torch.Tensor],
        sampler: Sampler,
        *,
        block_tokens: int,
        longest: int,
        device: torch.device,
    ) -> WholeSteps | None:
        del logits_of, sampler, block_tokens, longest, device
        return None

    def prepare_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(token_ids, table)

    def linear(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    def keeps(self, weight: ScaledWeight) -> bool:
        del weight
        return False

    def scaled_linear(
        self, weight: ScaledWeight, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.linear(x, weight.plain(x.dtype), bias)

    def logits(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.linear(weight, x).float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return functional.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)

    def activate(self, x: torch.Tensor, kind: Activation) -> torch.Tensor:
        match kind:
            case Activation.SILU:
                return functional.silu(x)
            case Activation.RELU:
                return functional.relu(x)
            case Activation.GELU:
                return functional.gelu(x)
            case Activation.GELU_TANH:
                return functional.gelu(x, approximate="tanh")

    def gated(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (self.activate(gate, kind) * up).to(gate_up.dtype)

    def place_qkv(
        self,
        qkv: torch.Tensor,
        kv: KvLayer,
        packed: Packed,
        rotary: Rotary | None,
        qk_norm: QkNorm | None,
    ) -> torch.Tensor:
        heads = qkv.view(qkv.shape[0], -1, kv.head_dim)
        query, key, value = heads.tensor_split((-2 * kv.kv_heads, -kv.kv_heads), dim=1)
        if qk_norm is not None:
            query = self.rms_norm(query, qk_norm.query, qk_norm.eps)
            key = self.rms_norm(key, qk_norm.key, qk_norm.eps)
        if rotary is not None:
            turn = rotary.table[packed.positions][:, None, :]
            query, key = rotate(query, turn), rotate(key, turn)
        attention.store_kv(key, value, kv, packed.slots)
        return query

    def paged_attention(
        self, query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
    ) -> torch.Tensor:
        return attention.paged_attention(query, kv, packed, shape)


def rotate(heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """RoPE of [tokens, heads, head_dim] by [tokens, 1, rotary_dim] cosines and sines."""
    half = turn.shape[-1] // 2
    cosines, sines = turn[..., :half], turn[..., half:]
    first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
    return torch.cat((turned.to(heads.dtype), heads[..., 2 * half :]), -1)
