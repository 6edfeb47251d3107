"""Rotary position embeddings and the ways checkpoints stretch them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    dims: int
    """Leading dimensions of a head that turn."""
    scaling: Linear | Llama3 | Yarn | LongRope | None = None

    def table(self, positions: int, device: torch.device) -> torch.Tensor:
        """fp32 [positions, dims]: cosines, then sines."""
        import torch

        powers = torch.arange(0, self.dims, 2, dtype=torch.int64).float() / self.dims
        frequencies = 1.0 / (self.theta**powers)
        amplitude = 1.0
        if self.scaling is not None:
            frequencies = self.scaling.stretch(frequencies, self)
            amplitude = self.scaling.amplitude
        angles = torch.outer(torch.arange(positions).float(), frequencies)
        table = torch.empty(positions, self.dims)
        torch.cos(angles, out=table[:, : self.dims // 2])
        torch.sin(angles, out=table[:, self.dims // 2 :])
        return table.mul_(amplitude).to(device)


@dataclass(frozen=True, slots=True)
class Linear:
    factor: float

    amplitude = 1.0

    def stretch(self, frequencies: torch.Tensor, _rope: Rope) -> torch.Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    amplitude = 1.0

    def stretch(self, frequencies: torch.Tensor, _rope: Rope) -> torch.Tensor:
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return (1 - keep) * frequencies / self.factor + keep * frequencies


@dataclass(frozen=True, slots=True)
class Yarn:
    """Interpolates by part: dimensions that turn often keep their frequency."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def stretch(self, frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
        low, high = self._dimension(self.beta_fast, rope), self._dimension(self.beta_slow, rope)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dims - 1)
        span = high - low or 0.001
        dimensions = frequencies.new_tensor(range(rope.dims // 2))
        stretched = ((dimensions - low) / span).clamp(0.0, 1.0)
        return frequencies / self.factor * stretched + frequencies * (1 - stretched)

    def _dimension(self, turns: float, rope: Rope) -> float:
        """The dimension that turns so many times over the original length."""
        wavelength = self.original_length / (turns * 2 * math.pi)
        return rope.dims * math.log(wavelength) / (2 * math.log(rope.theta))


@dataclass(frozen=True, slots=True)
class LongRope:
    """One divisor a dimension; which set is fixed by the longest sequence served.

    A cache is shared by sequences of all lengths, so the choice cannot follow each of them.
    """

    divisors: tuple[float, ...]
    attention_factor: float

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def stretch(self, frequencies: torch.Tensor, _rope: Rope) -> torch.Tensor:
        return frequencies / frequencies.new_tensor(self.divisors)
