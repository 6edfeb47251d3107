"""KV in 8 bits: what the kernels store and read, in Triton's interpreter, and what a model makes
of it beside KV in its own dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine import attention, triton_attention
from engine.batch import Batch, Swap
from engine.checkpoint import open_checkpoint
from engine.errors import BadCheckpoint, BadConfig
from engine.ops import TorchOps
from engine.runner import Runner, resolve_kv_dtype
from engine.triton_ops import TritonOps
from tests.engine import tiny
from tests.engine.attending import HEADS, SHAPES, Scene, assert_close, scene
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from engine.attention import AttentionShape, KvLayer

E4M3 = torch.float8_e4m3fn
NAME = "float8_e4m3fn"
LARGEST, LEAST_EXACT = 448.0, 2.0**-6
"""Of 8 bits; the interpreter flushes smaller ones to zero."""


def narrowed(batch: Scene) -> tuple[Scene, KvLayer]:
    """The batch over a pool in 8 bits, and the layer with its scales."""
    batch = replace(batch, pool=batch.pool.to(E4M3))
    return batch, replace(batch.kv, key_scale=0.25, value_scale=0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_ragged_batch_attends_to_what_8_bits_stand_for(
    heads: tuple[int, int, int, int], shape: AttentionShape
) -> None:
    batch, kv = narrowed(scene(*heads))
    query = batch.query.contiguous()
    wide = replace(
        kv,
        key=kv.key.float() * kv.key_scale,
        value=kv.value.float() * kv.value_scale,
        key_scale=1.0,
        value_scale=1.0,
    )
    wanted = attention.paged_attention(query, wide, batch.packed, shape)
    assert_close(attention.paged_attention(query, kv, batch.packed, shape), wanted)
    assert_close(triton_attention.paged_attention(query, kv, batch.packed, shape), wanted)


@pytest.mark.parametrize("ops", [TorchOps(), TritonOps()], ids=lambda ops: ops.name)
def test_keys_and_values_are_divided_by_their_scales_and_cut_at_the_largest(ops: TorchOps) -> None:
    batch, kv = narrowed(scene(2, 1, 32, 16, spans=((1, 20), (4, 3))))
    held = batch.qkv.to(E4M3).float()
    held = held.masked_fill(held.abs() < LEAST_EXACT, 0.0).view(len(held), 4, 32)
    query, key, value = held.tensor_split((2, 3), dim=1)
    rows = torch.cat((query, key * kv.key_scale, value * kv.value_scale), 1).flatten(1)
    rows[0, 70], rows[1, 100] = 1e4, -1e4
    key[0, 0, 70 - 64], value[1, 0, 100 - 96] = LARGEST, -LARGEST
    kept, slots = batch.pool.clone(), batch.packed.slots
    ops.place_qkv(rows, kv, batch.packed, None, None)
    block, place = slots // 16, slots % 16
    assert torch.equal(kv.key.float()[block, :, place], key)
    assert torch.equal(kv.value.float()[block, :, place], value)
    untouched = torch.ones(len(kept), dtype=torch.bool)
    untouched[block] = False
    assert torch.equal(batch.pool[untouched].view(torch.uint8), kept[untouched].view(torch.uint8))


class Rounding(TritonOps):
    """Torch rounds to 8 bits: the interpreter loses the carry into the exponent."""

    def place_qkv(self, *batch: Any) -> torch.Tensor:
        return TorchOps().place_qkv(*batch)


def runner_of(directory: Path, kv_dtype: str | None) -> Runner:
    return Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        blocks=12,
        block_tokens=4,
        host_slots=8,
        kv_dtype=kv_dtype,
        ops=Rounding(),
    )


PROMPT = tiny.prompt(14)
TABLE, ELSEWHERE = range(4), range(8, 12)


def logits_of(runner: Runner) -> torch.Tensor:
    """Of the last token of a prompt whose start lies in the pool already."""
    runner.logits(Batch((chunk("a", PROMPT[:10], 0, TABLE, draw=False),)))
    logits = runner.logits(Batch((chunk("a", PROMPT[10:], 10, TABLE),)))
    assert logits is not None
    return logits[0].clone()


def likeness(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.cosine_similarity(left - left.mean(), right - right.mean(), dim=0))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_model_says_nearly_the_same_in_half_the_bytes(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    wide, narrow = (runner_of(tiny_checkpoint(family), kind) for kind in (None, NAME))
    assert narrow.layout.block_bytes(0) * 4 == wide.layout.block_bytes(0)
    exact, near = logits_of(wide), logits_of(narrow)
    assert likeness(near, exact) > 0.98
    assert not torch.equal(near, exact)
    wide.close()
    narrow.close()


def test_8_bits_are_swapped_out_and_back_as_they_are(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    runner = runner_of(tiny_checkpoint("llama3"), NAME)
    wanted = logits_of(runner)
    slots = tuple(range(4))
    runner.execute(Batch(swaps=(Swap("a", tuple(TABLE), slots, to_host=True),)))
    runner.kv.memory.zero_()
    runner.execute(Batch(swaps=(Swap("a", tuple(ELSEWHERE), slots, to_host=False),)))
    logits = runner.logits(Batch((chunk("a", PROMPT[10:], 10, ELSEWHERE),)))
    assert logits is not None
    assert torch.equal(logits[0], wanted)
    runner.close()


def scaled_checkpoint(directory: Path, target: Path, scales: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    save_file(load_file(directory / "model.safetensors") | scales, target / "model.safetensors")
    (target / "config.json").write_text((directory / "config.json").read_text())
    return target


@pytest.mark.parametrize("owner", ["self_attn.", "self_attn.attn.", "self_attn.{}_proj."])
def test_scales_are_read_wherever_a_checkpoint_has_them(
    owner: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    scales = {
        f"model.layers.1.{owner.format(letter)}{letter}_scale": torch.tensor([scale])
        for letter, scale in (("k", 0.01), ("v", 0.02))
    }
    plain = runner_of(tiny_checkpoint("llama3"), None)
    exact = logits_of(plain)
    runner = runner_of(scaled_checkpoint(tiny_checkpoint("llama3"), tmp_path / "c", scales), NAME)
    first, second = (runner._decoder._layers[i].attention.kv for i in (0, 1))
    assert (first.key_scale, first.value_scale) == (1.0, 1.0)
    assert (second.key_scale, second.value_scale) == pytest.approx((0.01, 0.02))
    assert likeness(logits_of(runner), exact) > 0.98
    plain.close()
    runner.close()


@pytest.mark.parametrize("bad", [[0.0], [float("inf")], [1.0, 2.0]])
def test_a_scale_that_is_not_one_number_above_0_is_refused(
    bad: list[float], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    scales = {"model.layers.0.self_attn.v_scale": torch.tensor(bad)}
    directory = scaled_checkpoint(tiny_checkpoint("llama3"), tmp_path / "c", scales)
    with pytest.raises(BadCheckpoint, match=r"self_attn.v_scale.*one number above 0"):
        runner_of(directory, NAME)
    runner_of(directory, None).close()


def test_8_bits_are_for_gpus_and_no_other_dtype_is_known() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_kv_dtype("auto", "bfloat16", cpu) == "bfloat16"
    assert resolve_kv_dtype(NAME, "bfloat16", cuda) == NAME
    with pytest.raises(BadConfig, match="is for GPUs"):
        resolve_kv_dtype(NAME, "bfloat16", cpu)
    with pytest.raises(BadConfig, match="must be auto or float8_e4m3fn"):
        resolve_kv_dtype("int8", "bfloat16", cuda)
