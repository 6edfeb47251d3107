"""KV in 8 bits on the device, against plain torch and against KV in the model's own dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from engine import attention
from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.cuda_ops import CudaOps
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.attending import HEADS, SHAPES, assert_close, scene
from tests.engine.conftest import tiny_checkpoint  # noqa: F401  # a fixture
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.attention import AttentionShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
E4M3 = torch.float8_e4m3fn
SIZES = (*HEADS, (32, 8, 128, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("heads", SIZES, ids=str)
def test_a_ragged_batch_attends_to_what_8_bits_stand_for(
    heads: tuple[int, int, int, int], shape: AttentionShape, dtype: torch.dtype
) -> None:
    batch = scene(*heads, dtype=dtype, device="cuda")
    narrow = replace(batch, pool=batch.pool.to(E4M3))
    kv = replace(narrow.kv, key_scale=0.25, value_scale=0.5)
    wide = attention.KvLayer(kv.key.float() * 0.25, kv.value.float() * 0.5)
    wanted = attention.paged_attention(batch.query.float(), wide, batch.packed, shape)
    got = CudaOps().paged_attention(batch.query, kv, batch.packed, shape)
    assert_close(got, wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", SIZES, ids=str)
def test_keys_and_values_are_rounded_as_torch_rounds_them(
    heads: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch = scene(*heads, dtype=dtype, device="cuda")
    narrow = replace(batch, pool=batch.pool.to(E4M3))
    narrow.qkv[0, -1] = 1e4
    expected = replace(narrow, pool=narrow.pool.clone())
    layers = [replace(one.kv, key_scale=0.25, value_scale=0.5) for one in (narrow, expected)]
    CudaOps().place_qkv(narrow.qkv.clone(), layers[0], narrow.packed, None, None)
    rows = narrow.qkv.view(len(narrow.qkv), -1, heads[2])
    key, value = rows[:, -2 * heads[1] : -heads[1]], rows[:, -heads[1] :]
    attention.store_kv(key, value, layers[1], narrow.packed.slots)
    assert torch.equal(narrow.pool.view(torch.uint8), expected.pool.view(torch.uint8))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_model_says_nearly_the_same(
    family: str,
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    said = []
    for kv_dtype in (None, "float8_e4m3fn"):
        runner = Runner(
            open_checkpoint(str(tiny_checkpoint(family))),
            sampler=Greedy(),
            device="cuda",
            blocks=4,
            kv_dtype=kv_dtype,
        )
        prompt = tiny.prompt(40)
        runner.logits(Batch((chunk("a", prompt[:30], 0, range(2), draw=False),)))
        logits = runner.logits(Batch((chunk("a", prompt[30:], 30, range(3)),)))
        assert logits is not None
        said.append(logits[0] - logits[0].mean())
        runner.close()
    assert float(torch.cosine_similarity(said[0], said[1], dim=0)) > 0.98
