"""From shares of requests that met their targets, rate by rate, to a goodput."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence


def lognormal(rng: random.Random, median: int, sigma: float, low: int, high: int) -> int:
    return max(low, min(high, round(rng.lognormvariate(math.log(median), sigma))))


def quantiles(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return "/".join(f"{1000 * float(np.quantile(values, q)):.0f}" for q in (0.5, 0.9))


def bounded(points: Sequence[tuple[float, float]], wanted: float) -> str:
    """Only a bound where all rates that were measured hold, or none does."""
    (lowest, first), (_, last) = points[0], points[-1]
    if first < wanted:
        return f"below {lowest:g}"
    goodput = crossing(points, wanted)
    return f"{goodput:.2f}" if last < wanted else f"at least {goodput:g}"


def crossing(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """Where attainment falls through `wanted`, between the rates that were measured."""
    if points[0][1] < wanted:
        return 0.0
    for (low, above), (high, below) in pairwise(points):
        if below < wanted:
            return low + (high - low) * (above - wanted) / (above - below)
    return points[-1][0]
