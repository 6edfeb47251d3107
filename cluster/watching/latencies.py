"""Durations by size: counts that add up over steps and gateways, whatever their number."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SHORTEST_S = 1e-5
WIDTH = 0.02
"""Of a bucket, as a logarithm: what is told of a duration is within 1% of it."""
BUCKETS = 1050
"""Up to more than three hours."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

_CENTRES_S: NDArray[np.float64] = SHORTEST_S * np.exp((np.arange(BUCKETS) + 0.5) * WIDTH)


class Latencies:
    """How many durations there were of each size."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BUCKETS, np.int64)

    def add(self, value_s: float) -> None:
        bucket = int(log(max(value_s, SHORTEST_S) / SHORTEST_S) / WIDTH)
        self.counts[min(bucket, BUCKETS - 1)] += 1

    def merge(self, document: Sequence[Sequence[int]]) -> None:
        if document:
            buckets, counts = document
            self.counts[list(buckets)] += counts

    def document(self) -> list[list[int]]:
        """The buckets that hold something and what they hold, for another gateway."""
        (held,) = self.counts.nonzero()
        return [held.tolist(), self.counts[held].tolist()] if len(held) else []

    def spread(self) -> dict[str, float | None]:
        """Percentiles; None where there was nothing."""
        reached = np.cumsum(self.counts)
        count = int(reached[-1])
        if count == 0:
            return dict.fromkeys(QUANTILES)
        places = np.searchsorted(reached, [max(share * count, 1) for share in QUANTILES.values()])
        return dict(zip(QUANTILES, _CENTRES_S[places].tolist(), strict=True))


def total(rows: Sequence[Latencies]) -> Latencies:
    """All of them as one."""
    found = Latencies()
    for row in rows:
        found.counts += row.counts
    return found
