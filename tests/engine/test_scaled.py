"""Checkpoints of 8-bit floats against the same model with its matrices widened beforehand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.errors import BadCheckpoint
from engine.runner import Runner
from engine.scaled import STORED, ScaledWeight, factors_of
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LARGEST = torch.finfo(STORED).max
BLOCK = [16, 16]


@dataclass(frozen=True)
class Kind:
    """A way to store factors: its config, its suffix, and the block that shares a factor."""

    config: dict[str, Any]
    suffix: str
    block: Callable[[torch.Tensor], tuple[int, int]]


KINDS = {
    "blocks": Kind(
        {"quant_method": "fp8", "weight_block_size": BLOCK},
        "_scale_inv",
        lambda _: (BLOCK[0], BLOCK[1]),
    ),
    "whole": Kind({"quant_method": "fp8"}, "_scale", lambda w: (w.shape[0], w.shape[1])),
    "rows": Kind(
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "_scale",
        lambda w: (1, w.shape[1]),
    ),
}


def scaled(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix in 8 bits, and its factors."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    factors = torch.empty(rows, columns)
    stored = torch.empty(weight.shape, dtype=STORED)
    for row in range(rows):
        for column in range(columns):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            factors[row, column] = weight[part].abs().max() / LARGEST
            stored[part] = (weight[part] / factors[row, column]).to(STORED)
    return stored, factors


def widened(stored: torch.Tensor, factors: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    wide = factors.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return stored.float() * wide[: stored.shape[0], : stored.shape[1]]


def write_both(source: Path, kind: Kind, into: Path) -> tuple[Path, Path]:
    """The checkpoint in 8 bits, and the one that holds what those bits stand for."""
    tensors = load_file(source / "model.safetensors")
    narrow, wide = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            block = kind.block(weight)
            stored, factors = scaled(weight, block)
            narrow[name], narrow[name + kind.suffix] = stored, factors
            wide[name] = widened(stored, factors, block)
    config = json.loads((source / "config.json").read_text())
    directories = into / "narrow", into / "wide"
    for directory, held, extra in zip(
        directories, (narrow, wide), ({"quantization_config": kind.config}, {}), strict=True
    ):
        directory.mkdir()
        save_file(held, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config | extra))
    return directories


def logits(directory: Path, **options: Any) -> torch.Tensor:
    runner = Runner(open_checkpoint(str(directory)), sampler=Greedy(), blocks=8, **options)
    got = runner.logits(Batch((chunk("a", tiny.prompt(20), 0, range(3)),)))
    runner.close()
    assert got is not None
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama3", "phi3", "qwen3-moe"])
def test_a_checkpoint_of_8_bits_computes_as_what_it_stands_for(
    family: str, kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    narrow, wide = write_both(tiny_checkpoint(family), KINDS[kind], tmp_path)
    torch.testing.assert_close(logits(narrow), logits(wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_own_share_of_the_factors(
    rank: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    narrow, wide = write_both(tiny_checkpoint("llama3"), KINDS["blocks"], tmp_path)
    name, checkpoint = "model.layers.1.mlp.down_proj.weight", open_checkpoint(str(narrow))
    assert checkpoint.config.scaling is not None
    whole = load_file(wide / "model.safetensors")[name]
    outputs, inputs = whole.shape
    own = range(rank * inputs // 2, (rank + 1) * inputs // 2)
    cut = (range(outputs), own)
    factors = factors_of(
        checkpoint.tensors, name, checkpoint.config.scaling, (outputs, inputs), cut
    )
    stored = load_file(narrow / "model.safetensors")[name][:, own.start : own.stop]
    got = ScaledWeight(stored, factors).plain(torch.float32)
    assert torch.equal(got, whole[:, own.start : own.stop])


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


NAME = "model.layers.0.self_attn.o_proj.weight"


def drop_factors(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME + "_scale_inv"]


def cut_factors(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME + "_scale_inv"] = tensors[NAME + "_scale_inv"][:1].clone()


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME].float()


@pytest.mark.parametrize(
    ("edit", "field", "rule"),
    [
        (drop_factors, NAME, "must be F8_E4M3 with factors beside it, or neither"),
        (cut_factors, NAME + "_scale_inv", "must hold 2 x 2 factors"),
        (widen, NAME, "must be F8_E4M3 with factors beside it, or neither"),
    ],
)
def test_matrices_and_factors_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], None],
    field: str,
    rule: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    narrow, _ = write_both(tiny_checkpoint("llama3"), KINDS["blocks"], tmp_path)
    change(narrow, edit)
    with pytest.raises(BadCheckpoint) as refused:
        logits(narrow)
    assert refused.value.field == field
    assert refused.value.rule == rule
