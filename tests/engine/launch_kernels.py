"""Prints how many kernels Triton would compile for passes of many sizes, without a GPU.

Launches are counted by the key under which the JIT looks for a compiled kernel, and go no further.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
import torch
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from engine import triton_attention, triton_draw, triton_layer, triton_scaled
from engine.attention import AttentionShape
from engine.device_rows import DeviceRows
from engine.model.config import Activation
from engine.scaled import STORED, ScaledWeight
from kvtransfer.plan import Copies
from kvtransfer.triton_copy import CHUNK_WORDS, WORD_BYTES, copy_pieces
from tests.engine.attending import scene
from tests.engine.compile_kernels import HOPPER

ROWS = (1, 2, 3, 16)
BLOCK_TOKENS = 16
CONTEXTS = (1, 16 * BLOCK_TOKENS, 1000, 4096, 8192)
"""In tables of 1, 16 and other numbers of blocks, and as many kinds of numbers of splits."""
SHAPE = AttentionShape(0.2)
CPU = torch.device("cpu")
keys: dict[str, set[str]] = defaultdict(set)


def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """What a JIT function does instead of a launch."""
    del grid, warmup
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*args, **kwargs)
    keys[kernel.__name__].add(f"{specialization} {options}")


def attend(spans: list[tuple[int, int]]) -> None:
    batch = scene(4, 2, 32, BLOCK_TOKENS, spans=spans)
    triton_layer.place_qkv(batch.qkv, batch.kv, batch.packed, None, None)
    triton_attention.paged_attention(batch.query, batch.kv, batch.packed, SHAPE)


def compute(rows: int) -> None:
    """What lies between a layer's matrices, and one of 8 bits."""
    x = torch.zeros(rows, 48)
    triton_layer.add_rms_norm(x, x.clone(), torch.zeros(48), 1e-5)
    triton_layer.gated(x, Activation.SILU)
    weight = ScaledWeight(torch.zeros(40, 48).to(STORED), torch.zeros(40, 3))
    triton_scaled.linear(weight, x, None)


def draw(count: int) -> None:
    rows = DeviceRows(max(ROWS), 8, BLOCK_TOKENS, CPU)
    triton_draw.place_rows(rows, count, BLOCK_TOKENS)
    triton_draw.draw_rows(torch.zeros(count, 2500), rows, 2500)


def copy(count: int, chunks: int, start: int) -> None:
    nbytes = np.full(count, chunks * CHUNK_WORDS * WORD_BYTES)
    copy_pieces(start, 2 * start, Copies(nbytes, nbytes, nbytes), CPU)


if __name__ == "__main__":
    JITFunction.run = noted
    for rows, context in product(ROWS, CONTEXTS):
        attend([(1, context - 1)] * rows)
        attend([(9, context)] * rows)
    for rows in ROWS:
        compute(rows)
        draw(rows)
    for count, chunks in product(ROWS, ROWS):
        copy(count, chunks, start=(1 << 40) + count)
    for name, found in sorted(keys.items()):
        print(name, len(found))
