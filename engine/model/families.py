"""What each family's config.json means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.model.config import Activation, LayerConfig, ModelConfig, MoeConfig, NormKind
from engine.model.ropes import read_rope
from engine.model.scaling import read_scaling

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.model.fields import Fields
    from engine.model.rope import Rope

    Family = Callable[[Fields, int | None], ModelConfig]

ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
"""Multimodal checkpoints leave out of `text_config` whatever is usual."""
DTYPES = ("float32", "bfloat16", "float16")


def read_config(fields: Fields, longest: int | None = None) -> ModelConfig:
    """The model a config.json describes; `longest` caps the sequences that will be served."""
    kind = fields.text("model_type", "")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise fields.bad("model_type", f"unknown architecture; known are {known}")
    config = replace(FAMILIES[kind](fields, longest), scaling=read_scaling(fields))
    if config.heads % config.kv_heads:
        raise fields.bad("num_key_value_heads", f"must divide the {config.heads} attention heads")
    if longest is not None and longest > config.max_length:
        raise fields.bad(
            "max_position_embeddings", f"sequences of {longest} tokens are longer than the model's"
        )
    return config if longest is None else replace(config, max_length=longest)


def _dtype(fields: Fields) -> str:
    name = "dtype" if "dtype" in fields else "torch_dtype"
    dtype = fields.text(name, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise fields.bad(name, f"must be one of {', '.join(DTYPES)}")
    return dtype


def _activation(fields: Fields, name: str, default: str) -> Activation:
    activation = ACTIVATIONS.get(fields.text(name, default))
    if activation is None:
        raise fields.bad(name, f"must be one of {', '.join(sorted(ACTIVATIONS))}")
    return activation


def _head_dim(fields: Fields) -> int:
    if "head_dim" in fields:
        return fields.integer("head_dim")
    return _whole_share(fields, fields.integer("hidden_size"), "num_attention_heads")


def _whole_share(fields: Fields, hidden: int, heads_name: str) -> int:
    heads = fields.integer(heads_name)
    if hidden % heads:
        raise fields.bad(heads_name, f"must divide the hidden size {hidden}")
    return hidden // heads


def _uniform(
    fields: Fields, scale: float, window: int | None, rope: Rope | None
) -> tuple[LayerConfig, ...]:
    return (LayerConfig(scale, window, rope),) * fields.integer("num_hidden_layers")


def _llama(fields: Fields, longest: int | None) -> ModelConfig:
    heads, head_dim = fields.integer("num_attention_heads"), _head_dim(fields)
    biased = fields.flag("attention_bias", default=False)
    return ModelConfig(
        family="llama",
        vocab=fields.integer("vocab_size"),
        hidden=fields.integer("hidden_size"),
        intermediate=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        layers=_uniform(fields, head_dim**-0.5, None, read_rope(fields, head_dim, longest)),
        max_length=fields.integer("max_position_embeddings", 2048),
        dtype=_dtype(fields),
        norm=NormKind.RMS,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=_activation(fields, "hidden_act", "silu"),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=fields.flag("mlp_bias", default=False),
        tied=fields.flag("tie_word_embeddings", default=False),
    )


def _mistral(fields: Fields, longest: int | None) -> ModelConfig:
    return _windowed(_llama(fields, longest), fields.optional_integer("sliding_window"))


def _windowed(config: ModelConfig, window: int | None) -> ModelConfig:
    layers = tuple(replace(layer, window=window) for layer in config.layers)
    return replace(config, layers=layers)


def _qwen2(fields: Fields, longest: int | None) -> ModelConfig:
    return replace(_qwen_windows(fields, _llama(fields, longest)), qkv_bias=True, output_bias=False)


def _qwen3(fields: Fields, longest: int | None) -> ModelConfig:
    return replace(_qwen_windows(fields, _llama(fields, longest)), qk_norm=True)


def _qwen_windows(fields: Fields, config: ModelConfig) -> ModelConfig:
    """Qwen's window holds only where switched on, and only from `max_window_layers` on."""
    if not fields.flag("use_sliding_window", default=False):
        return config
    window, first = fields.integer("sliding_window", 4096), fields.count("max_window_layers", 28)
    kinds = tuple(
        "sliding_attention" if i >= first else "full_attention" for i in range(len(config.layers))
    )
    return _by_kind(fields, config, kinds, window)


def _by_kind(
    fields: Fields, config: ModelConfig, kinds: tuple[str, ...], window: int
) -> ModelConfig:
    """A window on the layers that `layer_types`, or else `kinds`, calls sliding."""
    kinds = fields.strings("layer_types") if "layer_types" in fields else kinds
    if len(kinds) != len(config.layers) or set(kinds) - {"sliding_attention", "full_attention"}:
        raise fields.bad(
            "layer_types", "must name sliding_attention or full_attention for each layer"
        )
    layers = tuple(
        replace(layer, window=window if kind == "sliding_attention" else None)
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, layers=layers)


def _qwen3_moe(fields: Fields, longest: int | None) -> ModelConfig:
    config = replace(_llama(fields, longest), family="qwen3_moe", qk_norm=True)
    if fields.flag("use_sliding_window", default=False):
        config = _windowed(config, fields.integer("sliding_window", 4096))
    experts = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    dense, step = fields.integers("mlp_only_layers"), fields.integer("decoder_sparse_step", 1)
    layers = tuple(
        replace(layer, moe=i not in dense and (i + 1) % step == 0)
        for i, layer in enumerate(config.layers)
    )
    moe = MoeConfig(
        fields.integer(experts, 128),
        fields.integer("num_experts_per_tok", 8),
        fields.integer("moe_intermediate_size", 768),
        fields.flag("norm_topk_prob", default=False),
    )
    return replace(config, layers=layers, moe=moe)


def _mixtral(fields: Fields, longest: int | None) -> ModelConfig:
    config = replace(_mistral(fields, longest), family="mixtral")
    moe = MoeConfig(
        fields.integer("num_local_experts", 8),
        fields.integer("num_experts_per_tok", 2),
        config.intermediate,
        renormalize=True,
    )
    layers = tuple(replace(layer, moe=True) for layer in config.layers)
    return replace(config, layers=layers, moe=moe)


def _gemma(fields: Fields, longest: int | None) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    if fields.flag("use_bidirectional_attention", default=False):
        raise fields.bad("use_bidirectional_attention", "only causal models are supported")
    config = _llama(fields, longest)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    return replace(
        config,
        family="gemma",
        layers=tuple(replace(layer, attention_scale=scale) for layer in config.layers),
        activation=_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        sandwich=True,
        tied=fields.flag("tie_word_embeddings", default=True),
        embedding_scale=math.sqrt(config.hidden),
        attention_soft_cap=fields.optional_number("attn_logit_softcapping"),
        logit_soft_cap=fields.optional_number("final_logit_softcapping"),
    )


def _gemma2(fields: Fields, longest: int | None) -> ModelConfig:
    config = _gemma(fields, longest)
    kinds = _every(len(config.layers), 2)
    return _by_kind(fields, config, kinds, fields.integer("sliding_window", 4096))


def _every(layers: int, pattern: int) -> tuple[str, ...]:
    """Each `pattern`-th layer attends to everything, the others to a window."""
    return tuple(
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
    )


def _gemma3(fields: Fields, longest: int | None) -> ModelConfig:
    """Layers with a window have a RoPE of their own."""
    config = replace(_gemma(fields, longest), qk_norm=True)
    kinds = _every(len(config.layers), fields.integer("sliding_window_pattern", 6))
    config = _by_kind(fields, config, kinds, fields.integer("sliding_window", 4096))
    ropes = {
        windowed: read_rope(fields, config.head_dim, longest, sliding=windowed)
        for windowed in (False, True)
    }
    layers = tuple(replace(layer, rope=ropes[layer.window is not None]) for layer in config.layers)
    return replace(config, layers=layers)


def _gemma3_multimodal(fields: Fields, longest: int | None) -> ModelConfig:
    """The text half of a checkpoint that also sees images."""
    usual = fields.derived("text_config", GEMMA3_DEFAULTS)
    return _gemma3(fields.part("text_config").over(fields).over(usual), longest)


def _phi3(fields: Fields, longest: int | None) -> ModelConfig:
    return replace(_mistral(fields, longest), family="phi3")


def _opt(fields: Fields, _longest: int | None) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = _whole_share(fields, hidden, "num_attention_heads")
    biased, first = (
        fields.flag("enable_bias", default=True),
        fields.flag("do_layer_norm_before", default=True),
    )
    if not fields.flag("layer_norm_elementwise_affine", default=True):
        raise fields.bad("layer_norm_elementwise_affine", "must be true")
    length, width = (
        fields.integer("max_position_embeddings", 2048),
        fields.integer("word_embed_proj_dim", hidden),
    )
    return ModelConfig(
        family="opt",
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        intermediate=fields.integer("ffn_dim"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        layers=_uniform(fields, head_dim**-0.5, None, None),
        max_length=length,
        dtype=_dtype(fields),
        norm=NormKind.LAYER,
        norm_eps=1e-5,
        activation=_activation(fields, "activation_function", "relu"),
        norm_first=first,
        final_norm=first and not fields.flag("_remove_final_layer_norm", default=False),
        gated=False,
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        tied=fields.flag("tie_word_embeddings", default=True),
        embedding=None if width == hidden else width,
        learned_positions=length + 2,
        position_offset=2,
    )


def _gpt2(fields: Fields, _longest: int | None) -> ModelConfig:
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    head_dim = _whole_share(fields, hidden, "n_head")
    if fields.flag("add_cross_attention", default=False):
        raise fields.bad("add_cross_attention", "only decoder-only models are supported")
    scaled = fields.flag("scale_attn_weights", default=True)
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", default=False)
    scale = head_dim**-0.5 if scaled else 1.0
    length = fields.integer("n_positions", 1024)
    return ModelConfig(
        family="gpt2",
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        intermediate=fields.integer("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        layers=tuple(
            LayerConfig(scale / (i + 1 if by_layer else 1), None, None)
            for i in range(fields.integer("n_layer"))
        ),
        max_length=length,
        dtype=_dtype(fields),
        norm=NormKind.LAYER,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=_activation(fields, "activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=fields.flag("tie_word_embeddings", default=True),
        learned_positions=length,
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3_multimodal,
    "phi3": _phi3,
    "opt": _opt,
    "gpt2": _gpt2,
}
