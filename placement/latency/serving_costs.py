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
    """Medians of a closed loop whose users all ask at once, as one of them sees it."""

    instances: int
    users: int
    """Of every instance."""
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float

    @property
    def contexts(self) -> list[int]:
        """Of a batch half-way through its answers."""
        return [self.prompt_tokens + self.output_tokens // 2] * self.users


@dataclass(frozen=True, slots=True)
class ServingCosts:
    arrival_s: float
    """Of a request: to its instance, and its first token's way back."""
    step_s: float
    token_s: float


def fit_serving(served: Sequence[Served], latency: LatencyModel) -> ServingCosts:
    """What the passes of this latency leave unexplained."""
    rows = np.array([(1.0, one.users) for one in served])
    unexplained = np.array([one.tpot_s - latency.decode_s(one.contexts) for one in served])
    shares = np.array([one.tpot_s for one in served])
    fitted = nonnegative_least_squares(rows / shares[:, None], unexplained / shares)
    step_s, token_s = fitted.tolist()
    fewest = min(one.users for one in served)
    ways = [
        one.ttft_s - latency.prefill_s([(one.prompt_tokens, 0)] * one.users) - step_s
        for one in served
        if one.users == fewest
    ]
    return ServingCosts(max(median(ways), 0.0), step_s, token_s)


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
