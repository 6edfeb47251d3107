"""The kernels between a layer's matrices against plain torch, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine import attention
from engine.model.config import Activation
from engine.ops import QkNorm, Rotary, TorchOps
from engine.scaled import STORED, ScaledWeight
from engine.triton_ops import TritonOps
from tests.engine.attending import HEADS, Scene, assert_close, scene

PLAIN, KERNELS = TorchOps(), TritonOps()
EPS = 1e-5


def numbers(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def rotary(dim: int) -> Rotary:
    angles = torch.outer(torch.arange(400.0), 100.0 ** -torch.linspace(0.0, 1.0, dim // 2))
    return Rotary(torch.cat((angles.cos(), angles.sin()), 1))


@pytest.mark.parametrize("width", [48, 64, 1500])
def test_rows_are_normed_as_in_torch(width: int) -> None:
    x, weight = numbers(5, 2 * width)[:, :width], numbers(width)
    assert_close(KERNELS.rms_norm(x, weight, EPS), PLAIN.rms_norm(x, weight, EPS))


def test_a_sum_is_left_in_the_residual_and_its_norm_returned() -> None:
    x, residual, weight = numbers(5, 48), numbers(6, 48)[1:], numbers(48)
    kept = residual.clone()
    assert_close(
        KERNELS.add_rms_norm(x, residual, weight, EPS), PLAIN.add_rms_norm(x, kept, weight, EPS)
    )
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("kind", Activation)
@pytest.mark.parametrize("width", [24, 1100])
def test_gates_open_as_in_torch(kind: Activation, width: int) -> None:
    gate_up = numbers(3, 2 * width)
    assert_close(KERNELS.gated(gate_up, kind), PLAIN.gated(gate_up, kind))


@pytest.mark.parametrize("turned", [None, 1.0, 0.5], ids=["no rotary", "whole", "half"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_queries_turn_and_keys_and_values_land_in_their_slots_alone(
    heads: tuple[int, int, int, int], turned: float | None, *, normed: bool
) -> None:
    batch, dim = scene(*heads), heads[2]
    expected = replace(batch, pool=batch.pool.clone())
    turn = None if turned is None else rotary(int(dim * turned))
    norm = QkNorm(numbers(dim), numbers(dim) + 1, EPS) if normed else None
    wanted = PLAIN.place_qkv(batch.qkv.clone(), expected.kv, batch.packed, turn, norm)
    assert_close(KERNELS.place_qkv(batch.qkv, batch.kv, batch.packed, turn, norm), wanted)
    assert_close(batch.pool, expected.pool)
    untouched = unwritten(batch)
    assert torch.equal(batch.pool[untouched], expected.pool[untouched])


def unwritten(batch: Scene) -> torch.Tensor:
    """Which of the pool's blocks this batch stores nothing in."""
    blocks = torch.ones(len(batch.pool), dtype=torch.bool)
    blocks[batch.packed.slots // batch.block_tokens] = False
    return blocks


def test_a_cache_of_another_dtype_is_written_in_its_own() -> None:
    batch = scene(2, 1, 32, 16, spans=((1, 20), (4, 3)))
    half = replace(batch, pool=batch.pool.half())
    expected = replace(batch, pool=half.pool.clone())
    key, value = batch.qkv.view(len(batch.qkv), -1, 32)[:, 2:].split(1, dim=1)
    attention.store_kv(key, value, expected.kv, half.packed.slots)
    KERNELS.place_qkv(batch.qkv, half.kv, half.packed, None, None)
    assert torch.equal(half.pool, expected.pool)


def test_a_row_without_a_slot_stores_nothing() -> None:
    batch = scene(2, 1, 32, 16, spans=((1, 20), (1, 3)))
    kept = batch.pool.clone()
    nowhere = replace(batch.packed, slots=torch.full((2,), -1))
    KERNELS.place_qkv(batch.qkv, batch.kv, nowhere, None, None)
    assert torch.equal(batch.pool, kept)


def test_a_row_without_context_attends_to_nothing() -> None:
    batch = scene(2, 1, 32, 16, spans=((1, 20), (1, 3)))
    empty = replace(batch.packed, context_lens=torch.tensor([21, 0], dtype=torch.int32))
    got = KERNELS.paged_attention(batch.query, batch.kv, empty, attention.AttentionShape(0.2))
    assert got[0].any()
    assert not got[1].any()


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    ("outputs", "inputs", "runs"), [(70, 96, 3), (33, 256, 1), (16, 384, 3)], ids=str
)
def test_a_matrix_of_8_bits_multiplies_as_what_it_stands_for(
    outputs: int, inputs: int, runs: int, rows: int
) -> None:
    weight = ScaledWeight(numbers(outputs, inputs).to(STORED), numbers(outputs, runs))
    x, bias = numbers(rows, inputs + 3)[:, :inputs], numbers(outputs)
    assert KERNELS.keeps(weight)
    for added in (None, bias):
        wanted = PLAIN.scaled_linear(weight, x, added)
        assert_close(KERNELS.scaled_linear(weight, x, added), wanted)


def test_a_matrix_whose_runs_fit_no_tile_is_widened() -> None:
    assert not KERNELS.keeps(ScaledWeight(numbers(4, 36).to(STORED), numbers(4, 3)))
