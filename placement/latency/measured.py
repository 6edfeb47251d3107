"""Timed passes of one parallelism, and the latency model that is fitted to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.latency.catalog import Link
from placement.latency.model import LatencyModel, Step
from placement.latency.robust_fit import fit_costs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from placement.latency.roofline import Roofline

MOST_KNOTS = 16


class Sample(NamedTuple):
    step: Step
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """Samples of one parallelism."""

    tensor_parallel: int
    pipeline_parallel: int
    kv_capacity_tokens: int | None
    samples: tuple[Sample, ...]
    crowded_samples: tuple[Sample, ...] = ()
    """The same passes, while `neighbours` others compute."""
    neighbours: int = 0

    @property
    def beside(self) -> Run:
        return replace(self, samples=self.crowded_samples, crowded_samples=(), neighbours=0)


@dataclass(frozen=True, slots=True)
class FitReport:
    """How well the fit explains its samples, as shares of the measured time."""

    samples: int
    median_error: float
    p90_error: float

    def __str__(self) -> str:
        errors = f"{self.median_error:.1%} median, {self.p90_error:.1%} p90"
        return f"{self.samples} samples, error {errors}"


@dataclass(frozen=True)
class Measured(LatencyModel):
    """A piecewise linear cost of the tokens in a pass, plus attention, draws, and what passes take
    longer that hold prompts, or prompts and decodes: kernels are others then."""

    knots: tuple[int, ...]
    seconds: tuple[float, ...]
    """At each knot."""
    draw_s: float
    pair_cost_s: float
    read_cost_s: float
    prompts_s: float
    mixed_cost_s: float
    most_kv_read_tokens: int
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return self.pair_cost_s

    @property
    def read_s(self) -> float:
        return self.read_cost_s

    @property
    def mixed_s(self) -> float:
        return self.mixed_cost_s

    def fixed_s(self, tokens: int, draws: int) -> float:
        prompts_s = self.prompts_s if tokens > draws else 0.0
        return _interpolated_s(self.knots, self.seconds, tokens) + self.draw_s * draws + prompts_s

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        beyond = []
        if tokens > self.knots[-1]:
            beyond.append(f"{tokens} tokens in a pass, measured up to {self.knots[-1]}")
        if kv_read_tokens > self.most_kv_read_tokens:
            most = self.most_kv_read_tokens
            beyond.append(f"{kv_read_tokens} KV tokens read in a pass, measured up to {most}")
        return tuple(beyond)


@lru_cache(maxsize=65536)
def _interpolated_s(knots: tuple[int, ...], seconds: tuple[float, ...], tokens: int) -> float:
    """Beyond the last knot the last segment goes on."""
    if len(knots) == 1 or tokens <= knots[0]:
        return seconds[0]
    if tokens <= knots[-1]:
        return float(np.interp(tokens, knots, seconds))
    slope = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2])
    return seconds[-1] + slope * (tokens - knots[-1])


@dataclass(frozen=True)
class CarriedOver(LatencyModel):
    """Measured at one parallelism, scaled to another by what the roofline says of both."""

    measured: LatencyModel
    known: Roofline
    wanted: Roofline
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return self.measured.pair_s * self.wanted.pair_s / self.known.pair_s

    @property
    def read_s(self) -> float:
        return self.measured.read_s * self.wanted.read_s / self.known.read_s

    @property
    def mixed_s(self) -> float:
        return self.measured.mixed_s * self.wanted.fixed_s(1, 1) / self.known.fixed_s(1, 1)

    def fixed_s(self, tokens: int, draws: int) -> float:
        ratio = self.wanted.fixed_s(tokens, draws) / self.known.fixed_s(tokens, draws)
        return self.measured.fixed_s(tokens, draws) * ratio

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        wanted, known = self.wanted, self.known
        carried = (
            f"measured at {known.tensor_parallel}x{known.pipeline_parallel}, carried over to "
            f"{wanted.tensor_parallel}x{wanted.pipeline_parallel}"
        )
        return (carried, *self.measured.outside(tokens, kv_read_tokens))


def fit_run(run: Run) -> tuple[Measured, FitReport]:
    steps = [sample.step for sample in run.samples]
    seconds = np.array([sample.seconds for sample in run.samples])
    knots = _choose_knots(_sizes(steps))
    fit = fit_costs(_features(steps, knots), seconds)
    *segments, draw_s, pair_s, read_s, prompts_s, mixed_s = fit.coefficients.tolist()
    measured = Measured(
        knots,
        _at_knots(segments, knots),
        draw_s=draw_s,
        pair_cost_s=pair_s,
        read_cost_s=read_s,
        prompts_s=prompts_s,
        mixed_cost_s=mixed_s,
        most_kv_read_tokens=max(step.kv_read_tokens for step in steps),
        pipeline_parallel=run.pipeline_parallel,
    )
    return measured, FitReport(len(steps), fit.median_error, fit.p90_error)


def fit_link(transfers: Sequence[tuple[float, float]], name: str = "measured") -> Link:
    """Latency and bandwidth of measured transfers."""
    sizes = np.array([size for size, _ in transfers])
    seconds = np.array([duration for _, duration in transfers])
    fit = fit_costs(np.column_stack([np.ones(len(sizes)), np.sqrt(sizes), sizes]), seconds)
    latency_s, ramp_s, per_byte_s = (float(c) for c in fit.coefficients)
    fastest = float((sizes / seconds).max())
    bandwidth = 1 / per_byte_s if per_byte_s > 0 else fastest
    return Link(name, bandwidth, latency_s, ramp_s_per_sqrt_byte=ramp_s, source="profile")


def _sizes(steps: Sequence[Step]) -> list[int]:
    """Tokens of decodes, and of larger prompts: smaller ones differ by what prompts take."""
    decodes = {step.tokens for step in steps if step.tokens == step.draws}
    prompts = [step for step in steps if step.tokens > step.draws]
    alone = [step for step in prompts if not step.mixed] or prompts
    most = max(decodes, default=0)
    return sorted(decodes | {step.tokens for step in alone if step.tokens > most})


def _choose_knots(tokens: list[int]) -> tuple[int, ...]:
    """At most so many of the measured sizes, evenly in their order."""
    if len(tokens) <= MOST_KNOTS:
        return tuple(tokens)
    chosen = np.linspace(0, len(tokens) - 1, MOST_KNOTS).round().astype(int)
    return tuple(tokens[i] for i in chosen)


def _features(steps: Sequence[Step], knots: tuple[int, ...]) -> NDArray[np.float64]:
    """Columns: one, the part of each segment that is filled, draws, pairs, KV tokens read, whether
    there are prompts, and whether beside decodes."""
    tokens = np.array([step.tokens for step in steps], dtype=float)
    columns = [np.ones(len(steps))]
    for low, high in pairwise(knots):
        columns.append(np.clip(tokens, low, high) - low)
    rest = [(s.draws, s.pairs, s.kv_read_tokens, s.tokens > s.draws, s.mixed) for s in steps]
    return np.column_stack([*columns, np.array(rest, dtype=float)])


def _at_knots(segments: Sequence[float], knots: tuple[int, ...]) -> tuple[float, ...]:
    """Seconds, from what the first column takes and each segment a token."""
    heights = np.concatenate([[segments[0]], np.array(segments[1:]) * np.diff(knots)])
    return tuple(np.cumsum(heights).tolist())
