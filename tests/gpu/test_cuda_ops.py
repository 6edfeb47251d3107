"""The attention of a CUDA device against plain torch on the same device."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from engine import attention, varlen_attention
from engine.attention import AttentionShape
from engine.cuda_ops import CudaOps
from engine.ops import Activation, QkNorm, Rotary, TorchOps
from engine.runner import choose_ops
from engine.varlen_attention import case_of
from tests.engine.attending import HEADS, SHAPES, assert_close, scene

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (*HEADS, (32, 8, 128, 16), (16, 8, 256, 64), (12, 12, 64, 256))
WHY_NOT = "torch sees no CUDA device"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=WHY_NOT),
]


def never(*_: object) -> str:
    return "only our own kernels are wanted"


@pytest.fixture(autouse=True)
def true_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=[False, True], ids=["own kernels", "chosen kernels"])
def ops(request: pytest.FixtureRequest) -> CudaOps:
    return CudaOps() if request.param else CudaOps(why_not_varlen=never)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("heads", SIZES, ids=str)
def test_a_ragged_batch_attends_as_in_torch(
    ops: CudaOps, heads: tuple[int, int, int, int], shape: AttentionShape, dtype: torch.dtype
) -> None:
    batch = scene(*heads, dtype=dtype, device="cuda")
    exact = replace(batch, pool=batch.pool.float(), qkv=batch.qkv.float())
    wanted = attention.paged_attention(exact.query.contiguous(), exact.kv, exact.packed, shape)
    got = ops.paged_attention(batch.query, batch.kv, batch.packed, shape)
    assert_close(got, wanted.to(dtype))


@pytest.mark.parametrize("window", [None, 5000])
def test_a_long_context_attends_in_splits(ops: CudaOps, window: int | None) -> None:
    shape = AttentionShape(0.1, window=window)
    batch = scene(8, 2, 128, 16, spans=((1, 20_000), (1, 20), (1, 3000)), device="cuda")
    wanted = attention.paged_attention(batch.query.contiguous(), batch.kv, batch.packed, shape)
    assert_close(ops.paged_attention(batch.query, batch.kv, batch.packed, shape), wanted)


def test_a_token_attends_alike_in_any_batch() -> None:
    ops, shape = CudaOps(why_not_varlen=never), AttentionShape(0.2)
    batch = scene(8, 2, 128, 16, spans=((1, 300), (1, 5200), (9, 3)), device="cuda")
    together = ops.paged_attention(batch.query, batch.kv, batch.packed, shape)
    alone = batch.pack(batch.chunks[:1])
    got = ops.paged_attention(batch.query[:1], batch.kv, alone, shape)
    assert torch.equal(got, together[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("heads", SIZES, ids=str)
def test_queries_turn_and_keys_and_values_land_in_their_slots(
    heads: tuple[int, int, int, int], dtype: torch.dtype, *, normed: bool
) -> None:
    batch, dim = scene(*heads, dtype=dtype, device="cuda"), heads[2]
    expected = replace(batch, pool=batch.pool.clone())
    angles = torch.outer(torch.arange(400.0), 100.0 ** -torch.linspace(0.0, 1.0, dim // 2))
    turn = Rotary(torch.cat((angles.cos(), angles.sin()), 1).cuda())
    weights = torch.randn(2, dim, device="cuda")
    norm = QkNorm(weights[0], weights[1], 1e-5) if normed else None
    wanted = TorchOps().place_qkv(batch.qkv.clone(), expected.kv, batch.packed, turn, norm)
    got = CudaOps().place_qkv(batch.qkv.clone(), batch.kv, batch.packed, turn, norm)
    assert_close(got, wanted)
    assert_close(batch.pool, expected.pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_normed_and_gated_as_in_torch(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 7, 4096, device="cuda", dtype=dtype)
    weight, kept = torch.randn(4096, device="cuda"), residual.clone()
    ops, plain = CudaOps(), TorchOps()
    assert_close(ops.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    wanted = plain.add_rms_norm(x, kept, weight, 1e-5)
    assert_close(ops.add_rms_norm(x, residual, weight, 1e-5), wanted)
    assert_close(residual, kept)
    for kind in Activation:
        assert_close(ops.gated(x, kind), plain.gated(x, kind))


def test_what_lies_past_a_sequence_in_its_last_block_is_never_seen(ops: CudaOps) -> None:
    batch = scene(2, 1, 32, 16, spans=((1, 4),), device="cuda")
    batch.pool[:] = float("nan")
    batch.pool[batch.chunks[0].blocks[0], :, :, :, :5] = 1.0
    got = ops.paged_attention(batch.query, batch.kv, batch.packed, AttentionShape(1.0))
    assert torch.equal(got, torch.ones_like(got))


def test_a_gpu_gets_these_operations_and_tells_what_attends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ops = choose_ops(torch.device("cuda", 0), 1, deterministic=False)
    assert isinstance(ops, CudaOps)
    batch = scene(8, 2, 128, 16, dtype=torch.bfloat16, device="cuda")
    with caplog.at_level(logging.INFO, "engine.cuda_ops"):
        ops.paged_attention(batch.query, batch.kv, batch.packed, AttentionShape(0.1))
    case = case_of(batch.query, batch.kv, AttentionShape(0.1))
    reason = varlen_attention.why_not(case, torch.device("cuda", 0))
    assert ("backend=varlen_attn" if reason is None else f"reason={reason}") in caplog.text
