"""Matrices of 8-bit floats: each run of a row's weights has a factor of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
