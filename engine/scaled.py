"""Matrices of 8-bit floats: each run of a row's weights has a factor of its own."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch

from engine.errors import BadCheckpoint

if TYPE_CHECKING:
    from engine.model.scaling import Scaling
    from engine.tensors import TensorFiles

STORED, STORED_NAME = torch.float8_e4m3fn, "F8_E4M3"
"""As torch and as safetensors call it."""


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    weight: torch.Tensor
    """float8 [outputs, inputs]."""
    factors: torch.Tensor
    """fp32 [outputs, runs]: runs of equally many inputs, one after another."""

    @property
    def run_inputs(self) -> int:
        return self.weight.shape[1] // self.factors.shape[1]

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix itself, rounded once."""
        outputs, runs = self.factors.shape
        wide = self.weight.float().view(outputs, runs, -1) * self.factors[:, :, None]
        return wide.view(self.weight.shape).to(dtype)


def factors_of(
    tensors: TensorFiles,
    name: str,
    scaling: Scaling,
    shape: tuple[int, int],
    cut: tuple[range, range],
) -> torch.Tensor:
    """fp32 [outputs, runs] for a part of the matrix `name`, which is of `shape` as a whole."""
    stored = tensors.whole(name + scaling.suffix).float()
    rows, columns = scaling.block or (1 if stored.numel() > 1 else shape[0], shape[1])
    grid = (-(-shape[0] // rows), -(-shape[1] // columns))
    if stored.numel() != grid[0] * grid[1]:
        rule = f"must hold {grid[0]} x {grid[1]} factors"
        raise BadCheckpoint(name + scaling.suffix, list(stored.shape), rule)
    outputs, inputs = cut
    run = gcd(columns, inputs.start, len(inputs))
    of_rows = torch.arange(outputs.start, outputs.stop) // rows
    of_runs = torch.arange(inputs.start, inputs.stop, run) // columns
    return stored.view(grid)[of_rows][:, of_runs]
