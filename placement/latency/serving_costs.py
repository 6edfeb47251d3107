"""What a served token costs beyond its forward pass, fitted to a server that was measured.

Between two passes an instance accounts for its tokens and sends them on; a gateway writes them to
streams, and where the machine is busy it takes its time from the passes. Clients see all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """Processor time of gateway and clients, and of all else but instances, for all requests."""
    loops_s: float = 0.0
    """Of what hands instances their passes, which do not go on meanwhile."""
    prefill_s: float = 0.0
    """Part of the TTFT, as the server tells it: from the prompt's turn to its first token."""
    handed_off: bool = False
    """Whether a prefill and a decode instance served it."""
    passes_s: float = 0.0
    """Processor time of a thread of each instance's passes, for all requests."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Loops of one shape ask the same of their servers."""
        return self.instances, self.users, self.prompt_tokens, self.output_tokens

    @property
    def beside_passes_s(self) -> float:
        """Processor time of a request."""
        return (self.doors_s + self.loops_s) / self.requests

    @property
    def contexts(self) -> list[int]:
        """Of a batch half-way through its answers."""
        return [self.prompt_tokens + self.output_tokens // 2] * self.users

    def slower(self, latency: LatencyModel) -> float:
        """How many times as long its passes took as this latency says."""
        prompts_s = latency.prefill_s([(self.prompt_tokens, 0)] * self.users)
        said_s = prompts_s + (self.output_tokens - 1) * latency.decode_s(self.contexts)
        return self.passes_s * self.users / max(self.requests, 1) / said_s

    def lengthened(self, times: float) -> Served:
        found = {name: times * getattr(self, name) for name in self._fields if name[-2:] == "_s"}
        return self._replace(**found)


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """Of the instance that serves: its own thread does nothing else meanwhile."""

    step_s: float
    token_s: float
    prompts_s: float = 0.0
    """More of a step that holds prompts: one among others is slower than one of many alike."""
    prompt_token_s: float = 0.0

    def of_step(self, tokens: int, draws: int) -> float:
        served_s = self.step_s + self.token_s * draws
        if tokens == draws:
            return served_s
        return served_s + self.prompts_s + self.prompt_token_s * (tokens - draws)


@dataclass(frozen=True, slots=True)
class DoorCosts:
    """Processor time beside an instance, on any processor of its machine."""

    step_s: float
    token_s: float
    request_s: float
    handoff_s: float = 0.0
    """Of both its sides."""

    def of_step(self, tokens: int, firsts: int, handed: int = 0) -> float:
        """For tokens that leave it, so many of them the first ones of requests, and so many of
        those to be decoded elsewhere."""
        requests_s = self.request_s * firsts + self.handoff_s * handed
        return self.step_s + self.token_s * tokens + requests_s


@dataclass(frozen=True, slots=True)
class Machine:
    """What an instance shares with its neighbours, and with what serves their tokens."""

    processors: int
    threads: int
    """That an instance computes on."""
    doors: DoorCosts

    def demand(self, step_s: float, tokens: int, firsts: int, handed: int = 0) -> float:
        """Processors that an instance with such steps keeps busy, doors and all."""
        return self.threads + self.doors.of_step(tokens, firsts, handed) / step_s

    def slowed(self, demand: float) -> float:
        """How many times as long all takes where more processors are asked for than there are."""
        return max(1.0, demand / self.processors)


def at_speed_of(latency: LatencyModel, served: Sequence[Served]) -> list[Served]:
    """The loops of one server as if its passes had taken as long as this latency says: the machine
    may have been slower or faster then. Short answers tell of their prompts rather than of it."""
    longest = max(one.output_tokens for one in served)
    slower = median(one.slower(latency) for one in served if one.output_tokens == longest)
    return [one.lengthened(1.0 / slower) for one in served] if slower else [*served]


def fit_serving(served: Sequence[Served], latency: LatencyModel) -> ServingCosts:
    """What the passes of this latency leave unexplained of steps that go on for long."""
    longest = max(one.output_tokens for one in served)
    flowing = [one for one in served if one.output_tokens == longest]
    rows = np.array([(1.0, one.users) for one in flowing])
    unexplained = np.array([one.tpot_s - latency.decode_s(one.contexts) for one in flowing])
    shares = np.array([one.tpot_s for one in flowing])
    step_s, token_s = nonnegative_least_squares(rows / shares[:, None], unexplained / shares)
    flowing_costs = ServingCosts(float(step_s), float(token_s))
    return replace(flowing_costs, **_fit_prompts(served, WithServing(latency, flowing_costs)))


def _fit_prompts(served: Sequence[Served], latency: LatencyModel) -> dict[str, float]:
    """What is left of prompts that were computed alone."""
    alone = [one for one in served if one.users == 1 and one.prefill_s]
    if not alone:
        return {}
    rows = np.array([(1.0, one.prompt_tokens - 1) for one in alone])
    left = np.array([one.prefill_s - latency.prefill_s([(one.prompt_tokens, 0)]) for one in alone])
    shares = np.array([one.prefill_s for one in alone])
    fitted = nonnegative_least_squares(rows / shares[:, None], left / shares)
    return dict(zip(("prompts_s", "prompt_token_s"), fitted.tolist(), strict=True))


def fit_doors(served: Sequence[Served]) -> DoorCosts | None:
    """None where no processor time was measured."""
    measured = [one for one in served if one.requests and one.doors_s]
    known = [one for one in measured if not one.handed_off]
    if not known:
        return None
    tokens = [one.requests * one.output_tokens for one in known]
    rows = np.array(
        [(all_ / one.users, all_, one.requests) for one, all_ in zip(known, tokens, strict=True)]
    )
    seconds = np.array([one.doors_s for one in known])
    fitted = nonnegative_least_squares(rows / seconds[:, None], np.ones(len(known)))
    longer_s = [handed.beside_passes_s - one.beside_passes_s for handed, one in _pairs(measured)]
    return replace(DoorCosts(*fitted.tolist()), handoff_s=_at_least_nothing(longer_s))


def handing_of(served: Sequence[Served]) -> float:
    """How much longer a first token takes whose request is decoded elsewhere."""
    return _at_least_nothing([handed.ttft_s - one.ttft_s for handed, one in _pairs(served)])


def _pairs(served: Sequence[Served]) -> list[tuple[Served, Served]]:
    """What was handed off, beside the same loop of an instance that kept it."""
    kept = {one.shape: one for one in served if not one.handed_off}
    return [(one, kept[one.shape]) for one in served if one.handed_off and one.shape in kept]


def _at_least_nothing(seconds: Sequence[float]) -> float:
    return max(median(seconds), 0.0) if seconds else 0.0


def way_of(served: Sequence[Served], latency: LatencyModel) -> float:
    """A request's way to its instance and its first token's way back, where fewest others go."""
    fewest = min(one.users for one in served)
    few = [one for one in served if one.users == fewest]
    shortest = min(one.output_tokens for one in few)
    ways = [
        one.ttft_s - (one.prefill_s or latency.prefill_s([(one.prompt_tokens, 0)] * one.users))
        for one in few
        if one.output_tokens == shortest
    ]
    return _at_least_nothing(ways)


def handoff_of(served: Sequence[Served], latency: LatencyModel) -> float:
    """How much longer the second token takes after a hand-off, all of it told by the mean."""
    shortest = min((one.output_tokens for one in served), default=0)
    waits = [
        (one.tpot_s - latency.decode_s(one.contexts)) * (one.output_tokens - 1)
        for one in served
        if one.output_tokens == shortest
    ]
    return _at_least_nothing(waits)


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

    @property
    def mixed_s(self) -> float:
        return self.passes.mixed_s

    def fixed_s(self, tokens: int, draws: int) -> float:
        return self.passes.fixed_s(tokens, draws) + self.costs.of_step(tokens, draws)

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        return self.passes.outside(tokens, kv_read_tokens)
