"""The sizes of a model that decide what it costs, read from its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import BadCheckpoint, Unsupported, unknown_name
from engine.layout import DTYPE_BYTES
from engine.model.fields import Fields
from engine.model.scaling import read_scaling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

UNGATED = frozenset({"opt", "bloom", "gpt2", "gpt_neox", "gptj", "falcon", "gpt_bigcode"})
"""Families whose feed-forward has two matrices, not three."""
SHARED_EXPERTS = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")
DTYPES = {"half": "float16", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer; `experts` is 1 for a dense one."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    experts: int = 1
    active_experts: int = 1
    gated: bool = True
    tied: bool = False
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    matrix_dtype: str | None = None
    """Of the layers' matrices where they are stored narrower; they are widened as they are read."""
    dense_layers: int = 0
    """Without experts, in a model that has them."""
    dense_intermediate: int = 0
    """Of these layers."""

    @property
    def weight_bytes_each(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def matrix_bytes_each(self) -> int:
        return DTYPE_BYTES[self.matrix_dtype or self.dtype]

    @property
    def attention_parameters(self) -> int:
        """One layer's query, key, value and output matrices."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """One layer's feed-forward matrices (of one expert)."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def dense_parameters(self) -> int:
        """Those of a layer without experts."""
        return (3 if self.gated else 2) * self.hidden * self.dense_intermediate

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def router_parameters(self) -> int:
        return self.hidden * self.experts if self.experts > 1 else 0

    def matrix_parameters(self, experts: float) -> float:
        """Of all layers, with so many experts of each that has some."""
        feed_forward = self.expert_layers * experts * self.expert_parameters
        feed_forward += self.dense_layers * self.dense_parameters
        return self.layers * self.attention_parameters + feed_forward

    @property
    def parameters(self) -> int:
        return int(self.matrix_parameters(self.experts)) + self._other_parameters

    @property
    def weight_bytes(self) -> int:
        matrices = int(self.matrix_parameters(self.experts)) * self.matrix_bytes_each
        return matrices + self._other_parameters * self.weight_bytes_each

    @property
    def _other_parameters(self) -> int:
        embeddings = self.hidden * self.vocabulary * (1 if self.tied else 2)
        return self.expert_layers * self.router_parameters + embeddings

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.kv_dtype]

    def stored_as(self, dtype: str | None, kv_dtype: str | None) -> ModelShape:
        """With weights and KV in these floats, where they are given; KV is like weights else."""
        weights = dtype or self.dtype
        return replace(self, dtype=weights, kv_dtype=kv_dtype or weights)

    def splits_into(self, tensor: int, pipeline: int) -> bool:
        """Whether heads and the MLP divide over tensor ranks and every stage gets a layer."""
        kv_fits = self.kv_heads % tensor == 0 or tensor % self.kv_heads == 0
        divided = (self.heads, self.intermediate, self.dense_intermediate)
        return kv_fits and pipeline <= self.layers and not any(one % tensor for one in divided)

    def kv_heads_of_rank(self, tensor: int) -> int:
        return max(1, self.kv_heads // tensor)


def read_shape(directory: Path) -> ModelShape:
    path = directory / "config.json"
    if not path.is_file():
        raise BadCheckpoint("model", str(directory), "holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint("config.json", str(path), f"not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadCheckpoint("config.json", str(path), "must hold a JSON object")
    return shape_from_config(directory.name, config)


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    if "kv_lora_rank" in config:
        raise Unsupported(f"{name}: multi-head latent attention has no cost model")
    for key in SHARED_EXPERTS:
        if config.get(key):
            raise Unsupported(f"{name}: {key}: experts that every token takes have no cost model")
    field = _Fields(name, config)
    hidden = field.integer("hidden_size", "n_embd", "d_model")
    heads = field.integer("num_attention_heads", "n_head", "num_heads")
    family = str(config.get("model_type", ""))
    dtype = _dtype(name, str(config.get("torch_dtype", config.get("dtype", "bfloat16"))))
    default_kv = 1 if config.get("multi_query") else heads
    experts = field.integer("num_local_experts", "num_experts", "n_routed_experts", default=1)
    layers = field.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    dense = _dense_layers(config, layers) if experts > 1 else 0
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=field.integer("num_key_value_heads", "num_kv_heads", default=default_kv),
        head_dim=field.integer("head_dim", default=hidden // heads),
        intermediate=_intermediate(field, hidden, experts),
        vocabulary=field.integer("vocab_size"),
        experts=experts,
        active_experts=field.integer("num_experts_per_tok", default=1) if experts > 1 else 1,
        gated=family not in UNGATED,
        tied=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype,
        kv_dtype=dtype,
        matrix_dtype=None if read_scaling(Fields(config, name)) is None else "float8_e4m3fn",
        dense_layers=dense,
        dense_intermediate=_intermediate(field, hidden, 1) if dense else 0,
    )


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many have no experts, as the engine reads it."""
    fields = Fields(config)
    first = fields.count("first_k_dense_replace", 0)
    dense, step = fields.integers("mlp_only_layers"), fields.integer("decoder_sparse_step", 1)
    return sum(
        layer < first or layer in dense or (layer + 1) % step != 0 for layer in range(layers)
    )


def _intermediate(field: _Fields, hidden: int, experts: int) -> int:
    dense = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
    names = ("moe_intermediate_size", *dense) if experts > 1 else dense
    return field.integer(*names, default=4 * hidden)


def _dtype(name: str, dtype: str) -> str:
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPE_BYTES:
        raise unknown_name(f"{name}.torch_dtype", dtype, DTYPE_BYTES)
    return dtype


class _Fields:
    """Looks a size up under the names different families give it."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._config = config

    def integer(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if value < 1:
                    raise BadCheckpoint(f"{self._name}.{name}", value, "must be at least 1")
                return value
            if value is not None:
                raise BadCheckpoint(f"{self._name}.{name}", value, "must be a whole number")
        if default is None:
            raise BadCheckpoint(self._name, None, f"config.json lacks {' or '.join(names)}")
        return default
