"""The native kernels against plain torch, on every instruction set this machine can run."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from numpy.random import _pcg64

import engine.native_library as native
from engine import kernels
from engine.attention import AttentionShape, KvLayer
from engine.batch import Chunk
from engine.drawing import highest_piece
from engine.errors import Unsupported
from engine.kernels import NativeOps, PackedWeight, cpu_ops
from engine.ops import Activation, QkNorm, Rotary, TorchOps
from engine.packing import Packed, pack

LIBRARY = native.load_library()
SETS = () if LIBRARY is None else LIBRARY.instruction_sets
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
RANGE = 400
"""Positions that the rotary tables of these tests cover."""

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native kernels were built")


@pytest.fixture(params=[(name, threads) for name in SETS for threads in (1, 2)], ids=str)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    name, threads = request.param
    assert LIBRARY is not None
    return NativeOps(LIBRARY, threads, name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within a rounding of the largest element: summation order moves small ones by as much."""
    bound = TOLERANCE[got.dtype] * wanted.abs().max().item()
    assert got.shape == wanted.shape
    assert (got.float() - wanted.float()).abs().max().item() <= bound


# --- linear layers -----------------------------------------------------------------------------

SIZES = (
    (1, 64, 64),
    (3, 100, 70),
    (17, 256, 131),
    (40, 1000, 96),
    (64, 64, 400),
    (70, 320, 1000),
    (170, 96, 300),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_agrees_with_double_precision(
    ops: NativeOps, dtype: torch.dtype, *, biased: bool
) -> None:
    for rows, outputs, inputs in SIZES:
        weight = torch.randn(outputs, inputs, dtype=dtype)
        x, bias = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
        wanted = x.double() @ weight.double().T + (bias.double() if biased else 0)
        prepared = ops.prepare_weight(weight)
        assert_close(ops.linear(prepared, x, bias if biased else None), wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_not_rounded(ops: NativeOps, dtype: torch.dtype) -> None:
    for rows, outputs, inputs in SIZES:
        weight, x = (
            torch.randn(outputs, inputs, dtype=dtype),
            torch.randn(rows, inputs, dtype=dtype),
        )
        got = ops.logits(ops.prepare_weight(weight), x)
        assert_close(got, (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_linear_layer_does_not_depend_on_the_others(
    ops: NativeOps, dtype: torch.dtype
) -> None:
    for rows, outputs, inputs in SIZES:
        weight = ops.prepare_weight(torch.randn(outputs, inputs, dtype=dtype))
        x = torch.randn(rows, inputs, dtype=dtype)
        alone = torch.cat([ops.linear(weight, row) for row in torch.split(x, 1)])
        assert torch.equal(ops.linear(weight, x), alone)


def test_linear_takes_rows_of_a_wider_tensor(ops: NativeOps) -> None:
    weight, wide = torch.randn(48, 64), torch.randn(5, 200)
    x = wide[:, 100:164]
    assert_close(ops.linear(ops.prepare_weight(weight), x), x @ weight.T)


def test_a_transposed_weight_is_packed_as_what_it_shows(ops: NativeOps) -> None:
    stored, x = torch.randn(64, 48), torch.randn(5, 64)
    assert_close(ops.linear(ops.prepare_weight(stored.T), x), x @ stored)


def test_no_rows_give_no_rows(ops: NativeOps) -> None:
    weight = torch.randn(48, 64).bfloat16()
    prepared = ops.prepare_weight(weight)
    assert ops.linear(prepared, weight[:0]).shape == (0, 48)
    assert ops.embed(prepared, torch.tensor([], dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_table_gives_its_rows_back(ops: NativeOps, dtype: torch.dtype) -> None:
    for _, outputs, inputs in SIZES:
        table = torch.randn(outputs, inputs, dtype=dtype)
        token_ids = torch.cat((torch.randint(outputs, (20,)), torch.tensor([0, outputs - 1])))
        assert torch.equal(ops.embed(ops.prepare_weight(table), token_ids), table[token_ids])


@pytest.mark.parametrize("beyond", [-1, 48])
def test_a_row_that_a_packed_table_has_not_is_refused(ops: NativeOps, beyond: int) -> None:
    prepared = ops.prepare_weight(torch.randn(48, 64))
    with pytest.raises(IndexError, match=r"\[0, 48\)"):
        ops.embed(prepared, torch.tensor([3, beyond]))


def test_half_precision_is_left_to_torch(ops: NativeOps) -> None:
    weight, x = torch.randn(8, 16).half(), torch.randn(3, 16).half()
    prepared = ops.prepare_weight(weight)
    assert not isinstance(prepared, PackedWeight)
    assert torch.equal(ops.linear(prepared, x), torch.nn.functional.linear(x, weight))
    assert torch.equal(ops.embed(prepared, torch.tensor([5])), weight[5:6])


# --- norms and activations ---------------------------------------------------------------------

WIDTHS = (8, 24, 100, 768)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_agree_with_torch(ops: NativeOps, dtype: torch.dtype) -> None:
    plain = TorchOps()
    for width in WIDTHS:
        x, weight, bias = torch.randn(5, width, dtype=dtype), torch.randn(width), torch.randn(width)
        assert_close(ops.rms_norm(x, weight, 1e-6), plain.rms_norm(x, weight, 1e-6))
        assert_close(ops.layer_norm(x, weight, bias, 1e-5), plain.layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_norm_adds_to_the_residual_in_place(ops: NativeOps, dtype: torch.dtype) -> None:
    plain = TorchOps()
    for width in WIDTHS:
        x, weight = torch.randn(5, width, dtype=dtype), torch.randn(width)
        residual = torch.randn(5, width, dtype=dtype)
        expected = residual.clone()
        wanted = plain.add_rms_norm(x, expected, weight, 1e-6)
        assert_close(ops.add_rms_norm(x, residual, weight, 1e-6), wanted)
        assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", Activation)
def test_activations_agree_with_torch(ops: NativeOps, dtype: torch.dtype, kind: Activation) -> None:
    plain = TorchOps()
    for width in WIDTHS:
        x = 4 * torch.randn(5, width, dtype=dtype)
        assert_close(ops.activate(x, kind), plain.activate(x, kind))
        assert_close(ops.gated(x, kind), plain.gated(x, kind))


def test_activations_saturate_without_nan(ops: NativeOps) -> None:
    x = torch.tensor([[-1e30, -300.0, -100.0, 0.0, 100.0, 300.0, 1e30, 5.0]])
    for kind in (Activation.SILU, Activation.GELU_TANH):
        assert_close(ops.activate(x, kind), TorchOps().activate(x, kind))


# --- attention ---------------------------------------------------------------------------------

HEADS = (
    (4, 2, 64, 16, 64),
    (3, 3, 80, 16, 20),
    (4, 1, 8, 4, 8),
    (8, 8, 128, 32, None),
    (20, 10, 32, 64, 32),
    (18, 1, 64, 8, 64),
)
"""(heads, kv_heads, head_dim, block_tokens, rotary_dim)."""
CHUNKS = ((1, 0), (1, 7), (1, 200), (30, 0), (70, 0), (50, 90), (1, 64), (1, 63), (130, 3))
"""(new tokens, cached tokens) of a ragged batch."""
ATTENDING = (
    AttentionShape(0.125),
    AttentionShape(0.125, window=37),
    AttentionShape(0.125, soft_cap=5.0),
    AttentionShape(0.125, window=100, soft_cap=30.0),
)


def pool_and_batch(
    heads: int, kv_heads: int, dim: int, block_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[Chunk], torch.Tensor]:
    """A pool of two layers full of numbers, a ragged batch scattered over it, a projection."""
    counts = [-(-(new + cached) // block_tokens) for new, cached in CHUNKS]
    scattered = torch.randperm(sum(counts) + 3).tolist()
    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    chunks = [
        Chunk(str(i), tuple(range(new)), cached, tuple(scattered[begin:end]), None)
        for i, ((new, cached), (begin, end)) in enumerate(
            zip(CHUNKS, pairwise(bounds), strict=True)
        )
    ]
    pool = torch.randn(len(scattered), 2, 2, kv_heads, block_tokens, dim).to(dtype)
    tokens = sum(new for new, _ in CHUNKS)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    return pool, chunks, qkv


def second_layer(pool: torch.Tensor) -> KvLayer:
    return KvLayer(pool[:, 1, 0], pool[:, 1, 1])


def batch_of(chunks: list[Chunk], block_tokens: int) -> Packed:
    return pack(chunks, block_tokens, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_placing_turns_queries_and_stores_keys_and_values(
    ops: NativeOps,
    heads: tuple[int, int, int, int, int | None],
    dtype: torch.dtype,
    *,
    normed: bool,
) -> None:
    count, kv_heads, dim, block_tokens, rotary_dim = heads
    pool, chunks, qkv = pool_and_batch(count, kv_heads, dim, block_tokens, dtype)
    rotary = None if rotary_dim is None else Rotary(torch.randn(RANGE, rotary_dim))
    qk_norm = QkNorm(torch.randn(dim), torch.randn(dim), 1e-6) if normed else None
    packed, expected = batch_of(chunks, block_tokens), pool.clone()
    wanted = TorchOps().place_qkv(qkv.clone(), second_layer(expected), packed, rotary, qk_norm)
    got = ops.place_qkv(qkv.clone(), second_layer(pool), packed, rotary, qk_norm)
    assert_close(got, wanted)
    assert_close(pool, expected)
    assert torch.equal(pool[:, 0], expected[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENDING, ids=str)
def test_attention_over_a_ragged_batch_agrees_with_torch(
    ops: NativeOps, shape: AttentionShape, dtype: torch.dtype
) -> None:
    for heads, kv_heads, dim, block_tokens, _ in HEADS:
        pool, chunks, qkv = pool_and_batch(heads, kv_heads, dim, block_tokens, dtype)
        query = qkv.view(len(qkv), -1, dim)[:, :heads]
        packed, kv = batch_of(chunks, block_tokens), second_layer(pool)
        wanted = TorchOps().paged_attention(query.contiguous(), kv, packed, shape)
        assert_close(ops.paged_attention(query, kv, packed, shape), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENDING, ids=str)
def test_a_token_attends_alike_in_any_batch_and_any_chunk(
    ops: NativeOps, shape: AttentionShape, dtype: torch.dtype
) -> None:
    for heads, kv_heads, dim, block_tokens, _ in HEADS:
        pool, chunks, qkv = pool_and_batch(heads, kv_heads, dim, block_tokens, dtype)
        query, kv = qkv.view(len(qkv), -1, dim)[:, :heads], second_layer(pool)
        together = ops.paged_attention(query, kv, batch_of(chunks, block_tokens), shape)[-130:]
        last = chunks[-1]
        alone = ops.paged_attention(query[-130:], kv, batch_of([last], block_tokens), shape)
        decoded = Chunk("r", (1,), last.end - 1, last.blocks, None)
        single = ops.paged_attention(query[-1:], kv, batch_of([decoded], block_tokens), shape)
        assert torch.equal(together, alone)
        assert torch.equal(single, alone[-1:])


def test_what_lies_past_a_sequence_in_its_last_block_is_never_seen(ops: NativeOps) -> None:
    pool = torch.full((2, 2, 2, 1, 16, 32), float("nan"), dtype=torch.bfloat16)
    pool[1, :, :, :, :5] = 1.0
    packed = batch_of([Chunk("r", (1,), 4, (1,), None)], 16)
    query = torch.randn(1, 2, 32).bfloat16()
    got = ops.paged_attention(query, second_layer(pool), packed, AttentionShape(1.0))
    assert torch.equal(got, torch.ones_like(got))


def test_a_cache_of_another_dtype_is_left_to_torch(ops: NativeOps) -> None:
    pool = torch.randn(2, 2, 2, 1, 16, 32)
    packed = batch_of([Chunk("r", (1,), 4, (1,), None)], 16)
    query, shape = torch.randn(1, 2, 32).bfloat16(), AttentionShape(0.2)
    wanted = TorchOps().paged_attention(query, second_layer(pool), packed, shape)
    assert torch.equal(ops.paged_attention(query, second_layer(pool), packed, shape), wanted)


# --- the highest of a row ----------------------------------------------------------------------

COLUMNS = (1, 15, 16, 100, 1024, 1025, 5000)


def highest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert LIBRARY is not None
    return kernels.highest(LIBRARY, rows)


@pytest.mark.usefixtures("ops")
def test_the_first_of_the_highest_is_told_as_torch_tells_it() -> None:
    for columns in COLUMNS:
        rows = (4 * torch.randn(7, columns + 3)).round()[:, :columns]
        rows[3], rows[4, ::2] = float("-inf"), float("-inf")
        for got, wanted in zip(highest(rows), highest_piece(rows), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.usefixtures("ops")
def test_a_row_with_nan_or_without_end_has_no_finite_highest() -> None:
    for columns in COLUMNS:
        rows = torch.randn(4, columns)
        rows[1, columns // 2], rows[2, columns - 1] = float("nan"), float("inf")
        maxima, _ = highest(rows)
        assert maxima.isfinite().tolist() == [True, False, False, True]


# --- loading -----------------------------------------------------------------------------------


def test_without_a_built_library_the_engine_serves_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    native.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert type(cpu_ops(1)) is TorchOps
    finally:
        native.load_library.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "serving without native kernels reason=not built, for want of a C++ compiler"
    ]


def test_a_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_native.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    native.load_library.cache_clear()
    try:
        assert native.load_library() is None
    finally:
        native.load_library.cache_clear()
    assert "_native.so" in caplog.text


def test_a_library_built_of_other_sources_is_refused_with_what_builds_it_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    native.load_library.cache_clear()
    try:
        with pytest.raises(Unsupported, match="build_ext --inplace --force"):
            native.load_library()
    finally:
        native.load_library.cache_clear()


def test_a_library_from_before_interfaces_were_counted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_native.so").write_bytes(Path(_pcg64.__file__).read_bytes())
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    native.load_library.cache_clear()
    try:
        with pytest.raises(Unsupported, match="an interface without a number"):
            native.load_library()
    finally:
        native.load_library.cache_clear()
