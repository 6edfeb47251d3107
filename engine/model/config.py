"""What a decoder-only transformer is, whichever family its checkpoint comes from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.model.rope import Rope
    from engine.model.scaling import Scaling


class Activation(str, Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class NormKind(str, Enum):
    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, slots=True)
class MoeConfig:
    experts: int
    experts_per_token: int
    intermediate: int
    renormalize: bool
    """Whether the chosen experts' weights are scaled to sum to one."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Where a layer may differ from its neighbours."""

    attention_scale: float
    window: int | None
    rope: Rope | None
    moe: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    family: str
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_length: int
    """Longest sequence, prompt and output together."""
    dtype: str
    """What the checkpoint was saved in."""
    norm: NormKind
    norm_eps: float
    activation: Activation
    norm_offset: float = 0.0
    """Added to every norm weight."""
    norm_first: bool = True
    """Norms stand before attention and MLP, and once after the last layer; else after each."""
    final_norm: bool = True
    sandwich: bool = False
    """Norms stand after attention and MLP too, before their sums."""
    qk_norm: bool = False
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    tied: bool = False
    embedding: int | None = None
    """Width of the token embeddings where it is not `hidden` and is projected in and out."""
    embedding_scale: float | None = None
    learned_positions: int | None = None
    """Rows of a learned position table."""
    scaling: Scaling | None = None
    """How matrices of 8-bit floats are stored, where there are such."""
    position_offset: int = 0
    """Row of the position table that stands for position 0."""

    def describe(self) -> str:
        """Everything that shapes the KV and the logits, as canonical JSON."""
        described = asdict(self)
        del described["max_length"], described["dtype"]
        return json.dumps(described, sort_keys=True)
