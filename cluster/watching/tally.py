"""Counts and histograms as plain numbers: an observation costs a bisection and two additions.

prometheus_client's own metrics take a lock each time; everything here happens on one event
loop, and Prometheus' form is made only when somebody scrapes. What comes with every token is
only put aside and sorted some thousand at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Labels = tuple[str, ...]
MOST_ASIDE = 4096


@dataclass(frozen=True, slots=True)
class Spec:
    """What a metric is called and counts."""

    name: str
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()


class Histogram:
    """One series; bucket counts are kept apart and summed up when read."""

    __slots__ = ("_aside", "_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._aside: list[float] = []
        """Observed, but not in a bucket yet."""

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        """A step's worth at once."""
        self._aside += values
        if len(self._aside) >= MOST_ASIDE:
            self._sort()

    def _sort(self) -> None:
        values = np.array(self._aside)
        found = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        self._counts = [a + b for a, b in zip(self._counts, found.tolist(), strict=True)]
        self._sum += float(values.sum())
        self._aside.clear()

    def snapshot(self) -> tuple[list[int], float]:
        """How many are in each bucket, and their sum."""
        if self._aside:
            self._sort()
        return self._counts, self._sum

    def add(self, snapshot: Any) -> None:
        counts, total = snapshot
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._sum += total

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """The buckets as Prometheus wants them, and the sum."""
        counts, total = self.snapshot()
        reached, found = 0, []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            reached += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(reached)))
        return found, total


@dataclass(slots=True)
class Counter:
    spec: Spec
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, *labels: str, amount: float = 1) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def snapshot(self) -> Any:
        return list(self.values.items())

    def merge(self, snapshot: Any) -> None:
        for labels, value in snapshot:
            self.add(*labels, amount=value)

    def family(self) -> Metric:
        family = CounterMetricFamily(self.spec.name, self.spec.help, labels=self.spec.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


@dataclass(slots=True)
class Histograms:
    """All series of one metric."""

    spec: Spec
    series: dict[Labels, Histogram] = field(default_factory=dict)

    def of(self, *labels: str) -> Histogram:
        found = self.series.get(labels)
        if found is None:
            found = self.series[labels] = Histogram(self.spec.buckets)
        return found

    def snapshot(self) -> Any:
        return [(labels, one.snapshot()) for labels, one in self.series.items()]

    def merge(self, snapshot: Any) -> None:
        for labels, one in snapshot:
            self.of(*labels).add(one)

    def family(self) -> Metric:
        family = HistogramMetricFamily(self.spec.name, self.spec.help, labels=self.spec.labels)
        for labels, one in self.series.items():
            family.add_metric(labels, *one.cumulative())
        return family


class Tallies:
    """Counters and histograms by name: one gateway's, or those of several added up."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        self._specs = tuple(specs)
        self.histograms = {spec.name: Histograms(spec) for spec in self._specs if spec.buckets}
        self.counters = {spec.name: Counter(spec) for spec in self._specs if not spec.buckets}

    def snapshot(self) -> dict[str, Any]:
        """Plain values that JSON can carry to another gateway."""
        return {spec.name: self._of(spec.name).snapshot() for spec in self._specs}

    def merge(self, snapshot: dict[str, Any]) -> None:
        for name, values in snapshot.items():
            self._of(name).merge(values)

    def plus(self, snapshots: Iterable[dict[str, Any]]) -> Tallies:
        total = Tallies(self._specs)
        for snapshot in (self.snapshot(), *snapshots):
            total.merge(snapshot)
        return total

    def families(self) -> list[Metric]:
        return [self._of(spec.name).family() for spec in self._specs]

    def _of(self, name: str) -> Counter | Histograms:
        return self.histograms.get(name) or self.counters[name]


def gauge(spec: Spec, values: Iterable[tuple[Labels, float]]) -> Metric:
    """Read from somewhere else at the moment of the scrape."""
    family = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
    for labels, value in values:
        family.add_metric(labels, value)
    return family
