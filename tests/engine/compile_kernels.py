"""Compiles the Triton kernels for a Hopper GPU that need not be there, and prints what became."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import triton_attention, triton_decode, triton_prefill

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"tables": "*i32", "bounds": "*i32", "contexts": "*i32", "slots": "*i64"}
SPLITS = {"parts": "*fp32", "weights": "*fp32"}
SCALARS = {"scale": "fp32", "soft_cap": "fp32"}
HEADS = {"dim": 128, "padded_dim": 128, "block_tokens": 16}
LAYER = {**HEADS, "group": 4, "keys_at_once": 64, "windowed": True, "capped": True}
CUT = {"split_tokens": triton_decode.SPLIT_TOKENS, "most_splits": triton_decode.MOST_SPLITS}
JOIN = {"windowed": True, "keys_at_once": 64, "dim": 128, "padded_dim": 128, **CUT}
CONSTANTS: list[tuple[Any, dict[str, int]]] = [
    (triton_attention._store, {**HEADS, "kv_heads": 8, "padded_heads": 8}),
    (triton_prefill._chunk_kernel, {**LAYER, "padded_group": 4, "tile_tokens": 16}),
    (triton_decode._split_kernel, {**LAYER, **CUT, "rows": 16}),
    (triton_decode._join_kernel, JOIN),
]


def compiled(kernel: Any, constants: dict[str, int]) -> Any:
    """The kernel for bfloat16, its integers 32 bits wide."""
    bf16 = dict.fromkeys(("query", "key", "value", "key_pool", "value_pool", "out"), "*bf16")
    types = {**bf16, **POINTERS, **SPLITS, **SCALARS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=HOPPER)


if __name__ == "__main__":
    for kernel, constants in CONSTANTS:
        made = compiled(kernel, constants)
        print(kernel.__name__, made.metadata.shared, len(made.asm["cubin"]))
