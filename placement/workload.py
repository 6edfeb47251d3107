"""Requests over time as columns: read from files, or drawn from distributions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

DAY_S = 86_400.0
MOST_TOKENS = 10_000_000
"""Of one prompt or answer that a file may ask for."""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Prefixes that continue others by a block each."""

    parents: NDArray[np.int64]
    """By prefix id the one that it continues, or -1 where it continues none."""
    block_tokens: int

    def parts(self, prefix: int, tokens: int) -> list[tuple[int, int]]:
        """So many tokens of a prefix: its beginnings, each with what it adds."""
        path = []
        while prefix >= 0:
            path.append(prefix)
            prefix = int(self.parents[prefix])
        return [
            (one, min(self.block_tokens, tokens - depth * self.block_tokens))
            for depth, one in enumerate(reversed(path))
            if depth * self.block_tokens < tokens
        ]


@dataclass(frozen=True, slots=True)
class Workload:
    """Sorted by arrival. Optional columns are None where no request has them.

    Requests with the same non-negative `prefix_id` begin with the same `prefix_tokens` tokens, and
    with a tree also with those that their prefixes continue.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_id: NDArray[np.int64] | None = None
    prefix_tokens: NDArray[np.int64] | None = None
    priority: NDArray[np.int64] | None = None
    slo_ttft_s: NDArray[np.float64] | None = None
    slo_tpot_s: NDArray[np.float64] | None = None
    prefix_tree: PrefixTree | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0

    @property
    def rate_rps(self) -> float:
        return (len(self) - 1) / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def longest_context(self) -> int:
        return int((self.prompt_tokens + self.output_tokens).max())

    def at_rate(self, rate_rps: float) -> Workload:
        """The same requests in the same order, time stretched: common random numbers. One request
        alone comes at any rate."""
        if not 0 < rate_rps < np.inf:
            raise BadConfig("rate", rate_rps, "must be positive and finite")
        if len(self) == 1:
            return self
        if self.rate_rps == 0:
            rule = "requests that all arrive at once cannot be stretched to a rate"
            raise BadConfig("rate", rate_rps, rule)
        start_s = self.arrival_s[0]
        times_as_long = self.rate_rps / rate_rps
        if self.duration_s * times_as_long == np.inf:
            raise BadConfig("rate", rate_rps, "is too low for times to be told")
        stretched = (self.arrival_s - start_s) * times_as_long
        return replace(self, arrival_s=stretched)

    def prefix_parts(self, row: int) -> list[tuple[int, int]]:
        """The shared texts that a prompt begins with: the id of each, and how many tokens of it."""
        if self.prefix_id is None or self.prefix_tokens is None or self.prefix_id[row] < 0:
            return []
        prefix, tokens = int(self.prefix_id[row]), int(self.prefix_tokens[row])
        tree = self.prefix_tree
        return [(prefix, tokens)] if tree is None else tree.parts(prefix, tokens)

    def first(self, count: int) -> Workload:
        return self.select(np.arange(min(count, len(self))))

    def select(self, rows: NDArray[np.int64]) -> Workload:
        """These rows; repeated and reordered ones need new arrival times."""
        columns: dict[str, Any] = {}
        for column in fields(self):
            values = getattr(self, column.name)
            if isinstance(values, np.ndarray):
                columns[column.name] = values[rows]
        return replace(self, **columns)

    def between(self, start_s: float, end_s: float) -> Workload:
        inside = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        return self.select(np.flatnonzero(inside))

    def resampled(self, count: int, rate_rps: float, arrivals: Arrivals) -> Workload:
        """Requests drawn with replacement from these, arriving anew."""
        rows = arrivals.generator.integers(len(self), size=count)
        return replace(self.select(rows), arrival_s=arrivals.times(count, rate_rps))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A renewal process: gamma gaps with this coefficient of variation; 1 is Poisson."""

    generator: np.random.Generator
    burstiness: float = 1.0

    def times(self, count: int, rate_rps: float) -> NDArray[np.float64]:
        if rate_rps <= 0:
            raise BadConfig("rate", rate_rps, "must be positive")
        if self.burstiness < 0:
            raise BadConfig("burstiness", self.burstiness, "must not be negative")
        if self.burstiness == 0:
            return np.arange(count) / rate_rps
        shape = 1 / self.burstiness**2
        gaps = self.generator.gamma(shape, 1 / (rate_rps * shape), size=count)
        times: NDArray[np.float64] = np.cumsum(gaps) - gaps[0] if count else gaps
        return times

    def seasonal(
        self, duration_s: float, rate_rps: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Arrivals at a rate that changes with time, by stretching unit-rate ones."""
        grid = np.linspace(0.0, duration_s, max(2, int(duration_s / 10) + 1))
        rates = rate_rps(grid)
        if (rates < 0).any():
            raise BadConfig("rate", float(rates.min()), "must not be negative")
        steps = np.diff(grid) * (rates[1:] + rates[:-1]) / 2
        expected = np.concatenate([[0.0], np.cumsum(steps)])
        count = int(expected[-1] + 6 * np.sqrt(expected[-1]) + 10)
        unit = self.times(count, 1.0)
        inside = unit[unit < expected[-1]]
        times: NDArray[np.float64] = np.interp(inside, expected, grid)
        return times


def day_of(
    mean_rps: float, swing: float = 0.6, peak_hour: float = 15.0
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A rate that follows the sun: mean * (1 +- swing), highest at `peak_hour`."""
    if not 0 <= swing <= 1:
        raise BadConfig("swing", swing, "must be between 0 and 1")

    def rate(time_s: NDArray[np.float64]) -> NDArray[np.float64]:
        phase = 2 * np.pi * (time_s / DAY_S - peak_hour / 24)
        return mean_rps * (1 + swing * np.cos(phase))

    return rate


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Lengths as a correlated log-normal pair, each within what was seen: five figures a side."""

    log_mean: tuple[float, float]
    log_covariance: tuple[tuple[float, float], tuple[float, float]]
    lowest: tuple[int, int]
    highest: tuple[int, int]

    def draw(
        self, count: int, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(prompt tokens, output tokens)."""
        logs = generator.multivariate_normal(self.log_mean, self.log_covariance, size=count)
        lengths = np.clip(np.rint(np.exp(logs)), self.lowest, self.highest).astype(np.int64)
        return lengths[:, 0], lengths[:, 1]


def fit_lengths(workload: Workload) -> LengthModel:
    """What the log lengths of a workload look like; draws from it have its means and spread."""
    if len(workload) < 2:
        raise BadConfig("workload", len(workload), "needs at least 2 requests to fit")
    pairs = np.stack([workload.prompt_tokens, workload.output_tokens])
    logs = np.log(pairs)
    mean, covariance = logs.mean(axis=1), np.cov(logs)
    (a, b), (c, d) = covariance.tolist()
    low, high = pairs.min(axis=1).tolist(), pairs.max(axis=1).tolist()
    return LengthModel(
        (float(mean[0]), float(mean[1])), ((a, b), (c, d)), (low[0], low[1]), (high[0], high[1])
    )


def synthetic(
    lengths: LengthModel, arrival_s: NDArray[np.float64], generator: np.random.Generator
) -> Workload:
    prompt, output = lengths.draw(len(arrival_s), generator)
    return Workload(arrival_s, prompt, output)


def fixed_lengths(
    prompt_tokens: int, output_tokens: int, arrival_s: NDArray[np.float64]
) -> Workload:
    count = len(arrival_s)
    return Workload(
        arrival_s,
        np.full(count, prompt_tokens, dtype=np.int64),
        np.full(count, output_tokens, dtype=np.int64),
    )
