"""Random-weight checkpoints of every family, small enough to make and run in moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

VOCAB = 131
"""Odd, so that ranks cannot share it evenly."""
PROMPT, STEPS = 20, 32

NOT_REPEATED = {"qwen3-moe", "qwen3-moe-mixed", "mixtral", "opt", "opt-350m", "gpt2"}
"""Torch computes in their layers: it chooses experts, or adds where a layer norm follows."""

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Tiny:
    kind: str
    """The transformers config class, without `Config`."""
    options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: SMALL)


OPT = {k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}

TINY = {
    "llama2": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": Tiny("Llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}),
    "llama-linear": Tiny(
        "Llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}
    ),
    "llama-yarn": Tiny("Llama", {"rope_parameters": {"rope_theta": 1e4, **YARN}}),
    "mistral": Tiny("Mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": Tiny(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": Tiny("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": Tiny("Qwen3Moe", {"num_experts": 6, "norm_topk_prob": True, **MOE}),
    "qwen3-moe-mixed": Tiny("Qwen3Moe", {"num_experts": 4, "mlp_only_layers": [0], **MOE}),
    "mixtral": Tiny("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": Tiny(
        "Gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, **GEMMA}
    ),
    "gemma3": Tiny("Gemma3Text", {**GEMMA, "num_hidden_layers": 6, "sliding_window_pattern": 3}),
    "phi3": Tiny("Phi3", {"rope_parameters": {"rope_theta": 1e4, **LONG}, "sliding_window": 24}),
    "opt": Tiny("OPT", {"ffn_dim": 64}, OPT),
    "opt-350m": Tiny(
        "OPT", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, OPT
    ),
    "gpt2": Tiny("GPT2", {"scale_attn_by_inverse_layer_idx": True}, GPT2),
}


def make(name: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Saves a checkpoint under `directory` and gives transformers' model of it."""
    import transformers

    tiny = TINY[name]
    config = getattr(transformers, f"{tiny.kind}Config")(**{**tiny.base, **tiny.options, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for title, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * _spread(title, parameter))
    model.save_pretrained(directory)
    return model


def _spread(name: str, parameter: torch.Tensor) -> float:
    """Wide enough that layers matter more than the token they start from."""
    if "embed_tokens" in name or "wte" in name:
        return 0.03
    return 0.1 if parameter.dim() == 1 else 0.15


def prompt(tokens: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (tokens,), generator=generator).tolist())
