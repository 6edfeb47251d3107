"""Configs as they are published, in the spelling of their day, mean what their authors meant."""

from __future__ import annotations

from typing import Any

import pytest

from engine.model.config import Activation, ModelConfig, MoeConfig, NormKind
from engine.model.families import read_config
from engine.model.fields import Fields
from engine.model.rope import Linear, Llama3, LongRope, Rope

LLAMA31_8B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2_27B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}
PHI3_MINI_128K = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [2.0] * 48,
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
OPT_350M = {
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def read(values: dict[str, Any], longest: int | None = None) -> ModelConfig:
    return read_config(Fields(values), longest)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_llama_3_1() -> None:
    config = read(LLAMA31_8B)
    assert (config.head_dim, config.kv_heads, config.max_length) == (128, 8, 131072)
    assert config.dtype == "bfloat16"
    rope = Rope(500000.0, 128, Llama3(8.0, 1.0, 4.0, 8192))
    assert {layer.rope for layer in config.layers} == {rope}
    assert windows(config) == [None] * 32


def test_mistral_looks_back_4096_tokens_unless_its_config_says_none() -> None:
    assert windows(read(MISTRAL_7B)) == [4096] * 32
    assert windows(read({**MISTRAL_7B, "sliding_window": None})) == [None] * 32


def test_qwen_2_5_has_biases_and_a_window_that_is_off() -> None:
    config = read(QWEN25_7B)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert windows(config) == [None] * 28
    on = {**QWEN25_7B, "use_sliding_window": True, "max_window_layers": 20}
    assert windows(read(on)) == [None] * 20 + [131072] * 8


def test_qwen_3_with_experts() -> None:
    config = read(QWEN3_30B_A3B)
    assert config.moe == MoeConfig(128, 8, 768, renormalize=True)
    assert config.qk_norm
    assert all(layer.moe for layer in config.layers)


def test_gemma_2_alternates_and_scales_by_its_own_figure() -> None:
    config = read(GEMMA2_27B)
    assert windows(config) == [4096, None] * 23
    assert {layer.attention_scale for layer in config.layers} == {144**-0.5}
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.tied
    assert config.sandwich
    assert config.norm_offset == 1.0


def test_gemma_3_fills_in_what_its_multimodal_config_leaves_out() -> None:
    config = read(GEMMA3_4B)
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab, config.max_length, config.dtype) == (262208, 131072, "bfloat16")
    assert windows(config) == ([1024] * 5 + [None]) * 5 + [1024] * 4
    assert config.layers[0].rope == Rope(10000.0, 256)
    assert config.layers[5].rope == Rope(1000000.0, 256, Linear(8.0))


@pytest.mark.parametrize(("longest", "divisor"), [(None, 2.0), (4097, 2.0), (4096, 1.0)])
def test_phi_3_takes_the_divisors_of_the_length_it_serves(
    longest: int | None, divisor: float
) -> None:
    rope = read(PHI3_MINI_128K, longest).layers[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, LongRope)
    assert rope.scaling.divisors == (divisor,) * 48
    assert rope.scaling.attention_factor == pytest.approx(1.190238)


def test_opt_350m_norms_last_and_embeds_narrowly() -> None:
    config = read(OPT_350M)
    assert (config.norm_first, config.final_norm) == (False, False)
    assert (config.embedding, config.learned_positions, config.position_offset) == (512, 2050, 2)
    assert config.activation is Activation.RELU


def test_gpt2() -> None:
    config = read(GPT2)
    assert (config.intermediate, config.head_dim, config.norm) == (3072, 64, NormKind.LAYER)
    assert config.activation is Activation.GELU_TANH
    assert config.tied
