"""Compiles the Triton kernels for a Hopper GPU that need not be there, and prints what became."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import triton_decode, triton_draw, triton_layer, triton_prefill, triton_scaled
from kvtransfer import triton_copy

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"tables": "*i32", "bounds": "*i32", "contexts": "*i32"}
PLACES = {"slots": "*i64", "positions": "*i64"}
WEIGHTS = {"weight": "*fp32", "turns": "*fp32", "query_norm": "*fp32", "key_norm": "*fp32"}
SPLITS = {"parts": "*fp32", "weights": "*fp32"}
SCALARS = {
    "scale": "fp32",
    "value_scale": "fp32",
    "key_scale": "fp32",
    "soft_cap": "fp32",
    "eps": "fp32",
}
BF16 = ("query", "key", "value", "key_pool", "value_pool", "out", "x", "residual", "gate_up", "qkv")
NARROW = dict.fromkeys(("key", "value", "key_pool", "value_pool"), "*fp8e4nv")
"""Types of a KV pool in 8 bits."""
HEADS = {"dim": 128, "padded_dim": 128, "block_tokens": 16}
LAYER = {**HEADS, "group": 4, "keys_at_once": 64, "windowed": True, "capped": True}
CUT = {"split_tokens": triton_decode.SPLIT_TOKENS, "most_splits": triton_decode.MOST_SPLITS}
JOIN = {"windowed": True, "keys_at_once": 64, "dim": 128, "padded_dim": 128, **CUT}
PLACED = {"heads": 32, "padded_heads": 32, "kv_heads": 8, "padded_kv_heads": 8, "turned_dim": 128}
SCALED = {
    "run": 128,
    "tile_rows": triton_scaled.MOST_ROWS,
    "tile_outputs": triton_scaled.OUTPUTS,
    "tile_inputs": triton_scaled.INPUTS,
    "biased": True,
}
ROWS = {
    **dict.fromkeys(("present", "token_ids", "positions", "places", "seeds", "slots"), "*i64"),
    **dict.fromkeys(("highest", "drawn", "sound"), "*i64"),
    **dict.fromkeys(("logits", "peaks", "weights", "sounds"), "*fp32"),
    "heats": "*fp64",
}
EIGHT_BITS = {"weight": "*fp8e4nv", "factors": "*fp32", "bias": "*bf16"}
COPIED = {"word_bytes": 8, "word": tl.int64, "chunk": triton_copy.CHUNK_WORDS}
CHUNKS = {**LAYER, "padded_group": 4, "tile_tokens": 16}
SINGLE = {**LAYER, **CUT, "rows": 16}
CASES: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    (triton_layer._norm, {"width": 4096, "padded_width": 4096, "adding": True}, {}),
    (triton_layer._gate, {"kind": "gelu", "columns": triton_layer.COLUMNS_AT_ONCE}, {}),
    (triton_layer._place, {**HEADS, **PLACED, "normed": True, "most": None}, {}),
    (triton_layer._place, {**HEADS, **PLACED, "normed": True, "most": 448.0}, NARROW),
    (triton_prefill._chunk_kernel, CHUNKS, {}),
    (triton_prefill._chunk_kernel, CHUNKS, NARROW),
    (triton_decode._split_kernel, SINGLE, {}),
    (triton_decode._split_kernel, SINGLE, NARROW),
    (triton_decode._join_kernel, JOIN, {}),
    (triton_scaled._multiply, SCALED, EIGHT_BITS),
    (triton_draw._place_rows, {"block_tokens": 16}, ROWS),
    (triton_draw._survey, {"tile": triton_draw.TILE}, ROWS),
    (triton_draw._draw, {"tile": triton_draw.TILE, "padded_tiles": 256}, ROWS),
    (triton_copy._copy, COPIED, {"source": "i64", "target": "i64", "table": "*i64"}),
]
"""Kernels, their constants, and types of operands that differ from what the name says elsewhere."""


def compiled(kernel: Any, constants: dict[str, Any], own: dict[str, str]) -> Any:
    """The kernel for bfloat16, its integers 32 bits wide."""
    fixed = dict.fromkeys(constants, "constexpr")
    types = {**dict.fromkeys(BF16, "*bf16"), **POINTERS, **PLACES, **WEIGHTS, **SPLITS, **SCALARS}
    signature = {name: {**types, **own, **fixed}.get(name, "i32") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=HOPPER)


if __name__ == "__main__":
    for kernel, constants, own in CASES:
        made = compiled(kernel, constants, own)
        print(kernel.__name__, made.metadata.shared, len(made.asm["cubin"]))
