"""Model shapes that benches run: random weights written as Hugging Face checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPREAD = 0.02
CONTEXT_TOKENS = 4096
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    family: str
    tied: bool

    @property
    def layer_weights(self) -> int:
        queries, kv = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return self.hidden * (2 * queries + kv + 3 * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    def step_bytes(self, dtype: str, batch: int, context: int) -> int:
        """What a decode step must read: every matrix once, and the keys and values."""
        cached = 2 * self.layers * self.kv_heads * self.head_dim * context * batch
        weights = self.layers * self.layer_weights + self.head_weights
        return (weights + cached) * ELEMENT_BYTES[dtype]

    def flops(self, tokens: int, mean_context: float, drawn: int) -> float:
        attention = 2 * self.heads * self.head_dim * mean_context
        each = self.layers * (self.layer_weights + attention)
        return 2.0 * (tokens * each + drawn * self.head_weights)

    def config(self, dtype: str) -> dict[str, Any]:
        return {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "model_type": self.family,
            "torch_dtype": dtype,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": CONTEXT_TOKENS,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield at + "self_attn.q_proj.weight", (queries, self.hidden)
            yield at + "self_attn.k_proj.weight", (kv, self.hidden)
            yield at + "self_attn.v_proj.weight", (kv, self.hidden)
            yield at + "self_attn.o_proj.weight", (self.hidden, queries)
            yield at + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield at + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield at + "mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield at + "input_layernorm.weight", (self.hidden,)
            yield at + "post_attention_layernorm.weight", (self.hidden,)
            if self.family == "qwen3":
                yield at + "self_attn.q_norm.weight", (self.head_dim,)
                yield at + "self_attn.k_norm.weight", (self.head_dim,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("26m", 512, 6, 8, 4, 64, 1408, 16384, "llama", tied=True),
        Shape("120m", 768, 12, 12, 4, 64, 2048, 32000, "llama", tied=False),
        Shape("0.6b", 1024, 28, 16, 8, 128, 3072, 151936, "qwen3", tied=True),
    )
}


def write_checkpoint(shape: Shape, dtype: str, directory: Path) -> None:
    """Drawn on a GPU where there is one: one core takes a minute over the largest shapes."""
    directory.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, dtype)

    def fill(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=kind)
        drawn = torch.randn(size, generator=generator, device=device) * SPREAD
        return drawn.to(kind).cpu()

    weights = {name: fill(size) for name, size in shape.tensors()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(shape.config(dtype), indent=2))
