"""What a served token costs beyond its forward pass, fitted to a server that was measured.

Between two passes an instance accounts for its tokens and sends them on; a gateway writes them to
streams, and where the machine is busy it takes its time from the passes. Clients see all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.latency.model import LatencyModel
from placement.latency.robust_fit import nonnegative_least_squares

if TYPE_CHECKING:
    from collections.abc import Sequence


class Served(NamedTuple):
    """A closed loop whose users all ask at once, as one of them sees it."""

    instances: int
    users: int
    """Of every instance."""
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    requests: int = 0
    """By all users together."""
    doors_s: float = 0.0
    """Processor time of gateway and clients, and of all else but passes, for all requests."""
    handed_off: bool = False
    """Whether a prefill and a decode instance served it."""

    @property
    def contexts(self) -> list[int]:
        """Of a batch half-way through its answers."""
        return [self.prompt_tokens + self.output_tokens // 2] * self.users


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """Of the instance that serves: its own thread does nothing else meanwhile."""

    step_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class DoorCosts:
    """Processor time beside an instance, on any processor of its machine."""

    step_s: float
    token_s: float
    request_s: float

    def of_step(self, tokens: int, firsts: int) -> float:
        """For tokens that leave it, so many of them the first ones of requests."""
        return self.step_s + self.token_s * tokens + self.request_s * firsts


@dataclass(frozen=True, slots=True)
class Machine:
    """What an instance shares with its neighbours, and with what serves their tokens."""

    processors: int
    threads: int
    """That an instance computes on."""
    doors: DoorCosts

    def demand(self, step_s: float, tokens: int, firsts: int) -> float:
        """Processors that an instance with such steps keeps busy, doors and all."""
        return self.threads + self.doors.of_step(tokens, firsts) / step_s

    def slowed(self, demand: float) -> float:
        """How many times as long all takes where more processors are asked for than there are."""
        return max(1.0, demand / self.processors)


def fit_serving(served: Sequence[Served], latency: LatencyModel) -> ServingCosts:
    """What the passes of this latency leave unexplained of steps that go on for long."""
    longest = max(one.output_tokens for one in served)
    flowing = [one for one in served if one.output_tokens == longest]
    rows = np.array([(1.0, one.users) for one in flowing])
    unexplained = np.array([one.tpot_s - latency.decode_s(one.contexts) for one in flowing])
    shares = np.array([one.tpot_s for one in flowing])
    fitted = nonnegative_least_squares(rows / shares[:, None], unexplained / shares)
    return ServingCosts(*fitted.tolist())


def fit_doors(served: Sequence[Served]) -> DoorCosts | None:
    """None where no processor time was measured."""
    known = [one for one in served if one.requests and one.doors_s]
    if not known:
        return None
    tokens = [one.requests * one.output_tokens for one in known]
    rows = np.array(
        [(all_ / one.users, all_, one.requests) for one, all_ in zip(known, tokens, strict=True)]
    )
    seconds = np.array([one.doors_s for one in known])
    fitted = nonnegative_least_squares(rows / seconds[:, None], np.ones(len(known)))
    return DoorCosts(*fitted.tolist())


def way_of(served: Sequence[Served], latency: LatencyModel, machine: Machine | None) -> float:
    """A request's way to its instance and its first token's way back, where fewest others go."""
    fewest = min(one.users for one in served)
    few = [one for one in served if one.users == fewest]
    shortest = min(one.output_tokens for one in few)
    ways = [
        one.ttft_s
        - latency.prefill_s([(one.prompt_tokens, 0)] * one.users) * _slowed(one, latency, machine)
        for one in few
        if one.output_tokens == shortest
    ]
    return max(median(ways), 0.0)


def _slowed(one: Served, latency: LatencyModel, machine: Machine | None) -> float:
    if machine is None:
        return 1.0
    demand = machine.demand(latency.decode_s(one.contexts), one.users, 0)
    return machine.slowed(one.instances * demand)


def handoff_of(served: Sequence[Served], latency: LatencyModel) -> float:
    """How much longer the second token takes after a hand-off, all of it told by the mean."""
    waits = [
        (one.tpot_s - latency.decode_s(one.contexts)) * (one.output_tokens - 1) for one in served
    ]
    return max(median(waits), 0.0) if waits else 0.0


@dataclass(frozen=True)
class WithServing(LatencyModel):
    """Passes, with what serving their tokens adds to each."""

    passes: LatencyModel
    costs: ServingCosts
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return self.passes.pair_s

    @property
    def read_s(self) -> float:
        return self.passes.read_s

    def fixed_s(self, tokens: int, draws: int) -> float:
        served_s = self.costs.step_s + self.costs.token_s * draws
        return self.passes.fixed_s(tokens, draws) + served_s

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        return self.passes.outside(tokens, kv_read_tokens)
