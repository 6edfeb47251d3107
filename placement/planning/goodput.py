"""The highest rate at which a deployment still meets its targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TYPE_CHECKING

import numpy as np

from placement.simulation.simulator import simulate

if TYPE_CHECKING:
    from placement.simulation.deployment import Deployment
    from placement.simulation.dynamics import Dynamics
    from placement.simulation.outcome import Outcome
    from placement.workload import Workload

RESOLUTION = 0.02
"""Bisection ends once the bounds are so close, relative to the rate."""
STRIDE = 0.4
"""By which the rate grows or shrinks until one is found that meets the targets, and one that does
not."""
MOST_TIMES_GUESS = 4.0
"""A few requests at once may meet their targets at any rate; that says nothing."""
THROUGHPUT = "throughput: no more can be computed in the long run, whatever waits meanwhile"
"""The limit of what meets its targets up to the rate that mean loads allow."""
LEAST_RATE_SHARE = 1 / 256
"""Of the first guess; what cannot meet its targets even there is given up."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A rate that is carried within the targets, and what was seen there."""

    copies: int
    """The fewest that carry what was asked for, each this part of it."""
    rate_rps: float
    outcome: Outcome
    attainment: float
    """What was to be reached."""

    @property
    def strain(self) -> float:
        """The share of their targets within which as many requests stay as must."""
        seen = self.outcome
        late = np.where(seen.finished, seen.ttft_s / seen.slo_ttft_s, inf)
        worst = np.fmax(late, seen.tpot_s / seen.slo_tpot_s)
        return float(np.quantile(worst, self.attainment, method="higher"))


@dataclass(frozen=True, slots=True)
class Goodput:
    """A rate that meets the attainment, and what was seen there; None if no rate does."""

    rate_rps: float
    outcome: Outcome | None
    simulations: int
    limit: str
    """What is missed first beyond that rate."""


def find_goodput(
    deployment: Deployment,
    workload: Workload,
    attainment: float,
    guess_rps: float,
    *,
    worth_rps: float = 0.0,
    most_rps: float = inf,
    resolution: float = RESOLUTION,
    stride: float = STRIDE,
    carried: Carried | None = None,
    dynamics: Dynamics | None = None,
) -> Goodput:
    """Bisection over one sequence of requests, stretched in time; never beyond `most_rps`.

    A rate of 0 means that not even `worth_rps` can be served; none is below what is `carried`.
    """
    if worth_rps > most_rps:
        return Goodput(0.0, None, 0, THROUGHPUT)
    runs = _Runs(deployment, workload, attainment, dynamics)
    low, high = (0.0, None) if carried is None else (carried.rate_rps, None)
    highest = min(max(worth_rps, guess_rps) * MOST_TIMES_GUESS, most_rps)
    rate, limit = min(worth_rps or guess_rps, highest), THROUGHPUT
    best = None if carried is None else carried.outcome
    while high is None or high - low > resolution * high:
        outcome = runs.at(rate)
        if outcome.attainment >= attainment:
            low, best = rate, outcome
            if rate >= highest:
                break
            up = min(max(guess_rps, rate * (1 + stride)), highest)
            rate = up if high is None else (rate + high) / 2
        else:
            high, limit = rate, what_is_missed(outcome)
            if best is None and (rate <= worth_rps or rate < guess_rps * LEAST_RATE_SHARE):
                return Goodput(0.0, None, runs.count, limit)
            rate = (low + high) / 2 if low else high / (1 + stride)
    return Goodput(low, best, runs.count, limit)


def find_fewest_copies(
    deployment: Deployment,
    workload: Workload,
    attainment: float,
    rate_rps: float,
    *,
    least: int,
    guess: int,
    most: int,
    dynamics: Dynamics | None = None,
) -> Carried | None:
    """That carry a rate together, each an even part of it; None if not even `most` do."""
    runs = _Runs(deployment, workload, attainment, dynamics)
    low, high, found = least - 1, most + 1, None
    copies = min(max(guess, least), most)
    while high - low > 1:
        outcome = runs.at(rate_rps / copies)
        if outcome.attainment >= attainment:
            high, found = copies, Carried(copies, rate_rps / copies, outcome, attainment)
        else:
            low = copies
        copies = min(max(round(sqrt(max(low, 1) * high)), low + 1), high - 1)
    return found


class _Runs:
    def __init__(
        self,
        deployment: Deployment,
        workload: Workload,
        attainment: float,
        dynamics: Dynamics | None,
    ) -> None:
        self._deployment, self._workload, self._attainment = deployment, workload, attainment
        self._dynamics = dynamics
        self.count = 0

    def at(self, rate_rps: float) -> Outcome:
        self.count += 1
        load = self._workload.at_rate(rate_rps)
        return simulate(self._deployment, load, self._attainment, self._dynamics)


def what_is_missed(outcome: Outcome) -> str:
    """The target that more requests missed, and the cause where memory shows it."""
    late = int((outcome.ttft_s > outcome.slo_ttft_s).sum())
    slow = int((outcome.tpot_s > outcome.slo_tpot_s).sum())
    if outcome.preemptions > len(outcome.arrived_s) // 50:
        return "KV memory"
    waits = outcome.parts_s()["transfer"]
    handed_off = not np.isnan(waits).all()
    if slow > late and handed_off and np.nanmean(waits) > np.nanmean(outcome.slo_tpot_s) * 10:
        return "KV memory on the decode side"
    return "TTFT" if late >= slow else "TPOT"


def first_tokens_only(workload: Workload) -> Workload:
    """The same prompts, each answered by a single token: the prefill phase alone."""
    return replace(workload, output_tokens=np.ones(len(workload), dtype=np.int64))
