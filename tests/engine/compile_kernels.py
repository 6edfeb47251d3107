"""Compiles the Triton kernels for a Hopper GPU that need not be there, and prints what became."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import triton_decode, triton_draw, triton_layer, triton_prefill, triton_scaled

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"tables": "*i32", "bounds": "*i32", "contexts": "*i32"}
PLACES = {"slots": "*i64", "positions": "*i64"}
WEIGHTS = {"weight": "*fp32", "turns": "*fp32", "query_norm": "*fp32", "key_norm": "*fp32"}
SPLITS = {"parts": "*fp32", "weights": "*fp32"}
SCALARS = {"scale": "fp32", "soft_cap": "fp32", "eps": "fp32"}
BF16 = ("query", "key", "value", "key_pool", "value_pool", "out", "x", "residual", "gate_up", "qkv")
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
DRAWING = (triton_draw._place_rows, triton_draw._survey, triton_draw._draw)
EIGHT_BITS = {"weight": "*fp8e4nv", "factors": "*fp32", "bias": "*bf16"}
CONSTANTS: list[tuple[Any, dict[str, Any]]] = [
    (triton_layer._norm, {"width": 4096, "padded_width": 4096, "adding": True}),
    (triton_layer._gate, {"kind": "gelu", "columns": triton_layer.COLUMNS_AT_ONCE}),
    (triton_layer._place, {**HEADS, **PLACED, "normed": True}),
    (triton_prefill._chunk_kernel, {**LAYER, "padded_group": 4, "tile_tokens": 16}),
    (triton_decode._split_kernel, {**LAYER, **CUT, "rows": 16}),
    (triton_decode._join_kernel, JOIN),
    (triton_scaled._multiply, SCALED),
    (triton_draw._place_rows, {"block_tokens": 16, "rows": 512}),
    (triton_draw._survey, {"tile": triton_draw.TILE}),
    (triton_draw._draw, {"tile": triton_draw.TILE, "padded_tiles": 256}),
]


def compiled(kernel: Any, constants: dict[str, Any]) -> Any:
    """The kernel for bfloat16, its integers 32 bits wide."""
    fixed = dict.fromkeys(constants, "constexpr")
    types = {**dict.fromkeys(BF16, "*bf16"), **POINTERS, **PLACES, **WEIGHTS, **SPLITS, **SCALARS}
    if kernel is triton_scaled._multiply:
        types |= EIGHT_BITS
    if kernel in DRAWING:
        types |= ROWS
    signature = {name: {**types, **fixed}.get(name, "i32") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=HOPPER)


if __name__ == "__main__":
    for kernel, constants in CONSTANTS:
        made = compiled(kernel, constants)
        print(kernel.__name__, made.metadata.shared, len(made.asm["cubin"]))
