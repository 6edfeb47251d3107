"""Whether the workload still has the shape that a plan was made for: a two-sample test.

Lengths and prefix hits are compared by the Kolmogorov-Smirnov statistic, the greatest distance
between two empirical distributions; the rate by how far two Poisson counts lie apart. With many
requests any difference is significant, so a drift must be both significant and large.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import erfc, exp, sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SERIES_TERMS = 100
"""Of Kolmogorov's distribution; it converges after a few."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One request as the profiler keeps it."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Of the prompt, that a cached prefix spared."""


@dataclass(frozen=True, slots=True)
class Profiled:
    """Requests that ended within a span of time."""

    requests: tuple[Shape, ...]
    lasted_s: float

    @property
    def rate_rps(self) -> float:
        return len(self.requests) / self.lasted_s if self.lasted_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class DriftSettings:
    least_requests: int = 200
    """In each of both samples, before they are compared."""
    significance: float = 0.01
    """The chance of calling equal workloads different, for each quantity."""
    least_distance: float = 0.15
    """Of two distributions of lengths or prefix hits, to matter."""
    least_rate_change: float = 0.2
    """Of the rate, as a share of what it was, to matter."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one quantity has moved, and how likely that is by chance."""

    quantity: str
    size: float
    chance: float
    before: float
    after: float
    """The means, for the person who wonders."""

    def __str__(self) -> str:
        return f"{self.quantity} {self.before:.4g} -> {self.after:.4g} (p={self.chance:.2g})"


def drift(before: Profiled, after: Profiled, settings: DriftSettings) -> tuple[Difference, ...]:
    """What differs significantly and by enough; nothing while either sample is too small."""
    if min(len(before.requests), len(after.requests)) < settings.least_requests:
        return ()
    pairs = [
        compare(name, _column(before, name), _column(after, name))
        for name in ("prompt_tokens", "output_tokens", "cached_tokens")
    ]
    moved = [one for one in pairs if one.size >= settings.least_distance]
    rate = compare_rates(before, after)
    if rate.size >= settings.least_rate_change:
        moved.append(rate)
    return tuple(one for one in moved if one.chance < settings.significance)


def compare(quantity: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> Difference:
    """The two-sample Kolmogorov-Smirnov test, by its limiting distribution."""
    ordered_before, ordered_after = np.sort(before), np.sort(after)
    points = np.concatenate([ordered_before, ordered_after])
    shares = [
        np.searchsorted(ordered, points, side="right") / len(ordered)
        for ordered in (ordered_before, ordered_after)
    ]
    distance = float(np.abs(shares[0] - shares[1]).max())
    effective = sqrt(len(before) * len(after) / (len(before) + len(after)))
    # Stephens' correction brings small samples closer to the limit.
    chance = kolmogorov_tail((effective + 0.12 + 0.11 / effective) * distance)
    return Difference(quantity, distance, chance, float(before.mean()), float(after.mean()))


def kolmogorov_tail(distance: float) -> float:
    """The chance of a scaled distance of at least this between samples of one distribution."""
    if distance < 0.2:
        return 1.0
    terms = (
        (1.0 if k % 2 else -1.0) * exp(-2 * (k * distance) ** 2) for k in range(1, SERIES_TERMS)
    )
    return min(1.0, max(0.0, 2 * float(sum(terms))))


def compare_rates(before: Profiled, after: Profiled) -> Difference:
    """Given the total, the later count of two equal rates is binomial; taken as normal."""
    first, second = len(before.requests), len(after.requests)
    share = after.lasted_s / (before.lasted_s + after.lasted_s)
    total = first + second
    deviation = abs(second - total * share) / sqrt(total * share * (1 - share))
    change = abs(after.rate_rps / before.rate_rps - 1)
    return Difference("rate", change, erfc(deviation / sqrt(2)), before.rate_rps, after.rate_rps)


def _column(profiled: Profiled, name: str) -> NDArray[np.float64]:
    return np.array([getattr(one, name) for one in profiled.requests], dtype=float)


@dataclass(slots=True)
class Profiler:
    """The requests of a sliding window, and the shape that the plan in force was made for."""

    window_s: float
    settings: DriftSettings = field(default_factory=DriftSettings)
    most_requests: int = 4000
    """Kept of a window."""
    _seen: deque[tuple[float, Shape]] = field(default_factory=deque)
    _began_s: float | None = None
    _baseline: Profiled | None = None

    def add(self, requests: Sequence[Shape], now: float) -> None:
        """Those that ended since the last call."""
        if self._began_s is None:
            self._began_s = now
        self._seen.extend((now, one) for one in requests)
        while self._seen and (
            now - self._seen[0][0] > self.window_s or len(self._seen) > self.most_requests
        ):
            self._began_s = self._seen.popleft()[0]
        self._began_s = max(self._began_s, now - self.window_s)

    def window(self, now: float) -> Profiled:
        began_s = now if self._began_s is None else self._began_s
        return Profiled(tuple(one for _, one in self._seen), now - began_s)

    def drifted(self, now: float) -> tuple[Difference, ...]:
        """Against the baseline; the first full window becomes it."""
        latest = self.window(now)
        full = len(latest.requests) >= self.settings.least_requests
        if self._baseline is None:
            if full and latest.lasted_s >= self.window_s:
                self._baseline = latest
            return ()
        return drift(self._baseline, latest, self.settings) if full else ()

    def settle(self, planned_for: Profiled) -> None:
        """From now on this is what the plan in force was made for."""
        self._baseline = planned_for
