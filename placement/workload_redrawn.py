"""A workload drawn anew from one that was seen: other lengths like those, other arrivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BadConfig
from placement.workload import DAY_S, Arrivals, Workload, day_of, fit_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Lengths(str, Enum):
    SEEN = "seen"
    FITTED = "fitted"


@dataclass(frozen=True, slots=True)
class Redraw:
    lengths: Lengths = Lengths.SEEN
    """Fitted ones are drawn from a distribution like theirs, and share no prefixes."""
    burstiness: float | None = None
    """Coefficient of variation of gaps that are drawn; the requests are then drawn, too."""
    day_swing: float | None = None
    """Over a day, at a rate that rises and falls by this share of its mean."""
    peak_hour: float = 15.0
    requests: int | None = None
    """As many as were seen if not given; a day has what its rate brings."""
    seed: int = 0


def redrawn(load: Workload, redraw: Redraw, rate_rps: float | None = None) -> Workload:
    """At this rate on average, or that of the workload."""
    generator = np.random.default_rng(redraw.seed)
    again = load if redraw.requests is None else load.first(redraw.requests)
    if redraw.burstiness is not None or redraw.day_swing is not None:
        times = _arrivals(redraw, load, rate_rps, generator)
        rows = generator.integers(len(load), size=len(times))
        again = replace(load.select(rows), arrival_s=times)
    if rate_rps is not None and redraw.day_swing is None:
        again = again.at_rate(rate_rps)
    if redraw.lengths is Lengths.SEEN:
        return again
    prompts, outputs = fit_lengths(load).draw(len(again), generator)
    return replace(
        again,
        prompt_tokens=prompts,
        output_tokens=outputs,
        prefix_id=None,
        prefix_tokens=None,
        prefix_tree=None,
    )


def _arrivals(
    redraw: Redraw, load: Workload, rate_rps: float | None, generator: np.random.Generator
) -> NDArray[np.float64]:
    rate_rps = load.rate_rps if rate_rps is None else rate_rps
    if not 0 < rate_rps < np.inf:
        raise BadConfig("rate", rate_rps, "must be positive and finite to draw arrivals")
    arrivals = Arrivals(generator, 1.0 if redraw.burstiness is None else redraw.burstiness)
    if redraw.day_swing is None:
        return arrivals.times(redraw.requests or len(load), rate_rps)
    times = arrivals.seasonal(DAY_S, day_of(rate_rps, redraw.day_swing, redraw.peak_hour))
    if not len(times):
        raise BadConfig("rate", rate_rps, "brings no request in a day")
    return times
