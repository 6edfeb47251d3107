"""What each family calls its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import BadCheckpoint

if TYPE_CHECKING:
    from engine.tensors import TensorFiles


@dataclass(frozen=True, slots=True)
class Names:
    """Names without .weight and .bias; those of a layer are looked up with `in_layer`.

    Parts that share a name (a fused projection) lie in it one after another.
    """

    embed: str = "embed_tokens"
    positions: str = "embed_positions"
    project_in: str = "project_in"
    project_out: str = "project_out"
    final_norm: str = "norm"
    head: str = "lm_head"
    layer: str = "layers.{}."
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    after_attention_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    after_mlp_norm: str = "post_feedforward_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    stacked_router: str = "mlp.gate"
    stacked_gate_up: str = "mlp.experts.gate_up_proj"
    stacked_down: str = "mlp.experts.down_proj"
    """Where all experts of a layer lie in one tensor, [experts, out, in], without .weight."""
    transposed: bool = False
    """Matrices of the layers are stored [in, out]."""

    def in_layer(self, layer: int, name: str) -> str:
        return self.layer.format(layer) + name

    def in_expert(self, layer: int, expert: int, name: str) -> str:
        return self.in_layer(layer, self.expert.format(expert) + name)

    def rooted(self, root: str, head: str) -> Names:
        """These names under the prefix that a checkpoint gives its decoder."""
        return replace(
            self,
            embed=root + self.embed,
            positions=root + self.positions,
            project_in=root + self.project_in,
            project_out=root + self.project_out,
            final_norm=root + self.final_norm,
            layer=root + self.layer,
            head=head,
        )


LLAMA = Names()
FAMILY_NAMES = {
    "llama": LLAMA,
    "qwen3_moe": LLAMA,
    "mixtral": replace(
        LLAMA,
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_gate="w1",
        expert_up="w3",
        expert_down="w2",
    ),
    "gemma": replace(LLAMA, mlp_norm="pre_feedforward_layernorm"),
    "phi3": replace(
        LLAMA,
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
    "opt": replace(
        LLAMA,
        final_norm="final_layer_norm",
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up="fc1",
        down="fc2",
    ),
    "gpt2": replace(
        LLAMA,
        embed="wte",
        positions="wpe",
        final_norm="ln_f",
        layer="h.{}.",
        attention_norm="ln_1",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        mlp_norm="ln_2",
        up="mlp.c_fc",
        down="mlp.c_proj",
        transposed=True,
    ),
}
ROOTS = (
    ("model.", "lm_head"),
    ("model.decoder.", "lm_head"),
    ("transformer.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
    ("decoder.", "lm_head"),
    ("", "lm_head"),
)
"""Where the decoder of a checkpoint may be rooted, and what its output matrix is called then."""


def find_names(family: str, tensors: TensorFiles) -> Names:
    names = FAMILY_NAMES[family]
    for root, head in ROOTS:
        rooted = names.rooted(root, head)
        if rooted.embed + ".weight" in tensors:
            return rooted
    raise BadCheckpoint(f"{names.embed}.weight", None, "the checkpoint has no token embeddings")
