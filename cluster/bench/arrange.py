"""What to send and when: from a workload file, or drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from cluster.bench.load import Conversation
from cluster.bench.prompts import Prefix
from cluster.bench.server import Turn
from engine.errors import BadInput
from engine.slo import Slo
from placement.workload import Arrivals, LengthModel, Workload, fixed_lengths, synthetic

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Requests that are drawn; lengths are lognormal around their median, fixed with spread 0."""

    requests: int = 200
    rate_rps: float = 1.0
    ramp_to_rps: float | None = None
    burstiness: float = 1.0
    """Coefficient of variation of the gaps; 1 is Poisson."""
    prompt_tokens: int = 256
    output_tokens: int = 64
    spread: float = 0.0
    """Standard deviation of the lengths' logarithm."""
    longest_prompt: int = 4096
    longest_output: int = 1024
    prefixes: int = 0
    prefix_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Talk:
    """How many turns a conversation has, and how long its user thinks between them."""

    turns: int = 1
    think_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A workload, its targets and its conversations, at any rate that is asked for."""

    workload: Workload
    slo: Slo = field(default_factory=Slo)
    talk: Talk = field(default_factory=Talk)

    @property
    def text(self) -> bool:
        """Whether prompts must be text, because answers become part of later ones."""
        return self.talk.turns > 1

    def at_rate(self, rate_rps: float, least_s: float) -> Arrangement:
        """The workload stretched to a rate, and over again until it lasts long enough."""
        load = self.workload.at_rate(rate_rps)
        times = -(-int(least_s * rate_rps) // len(load))
        return replace(self, workload=_repeated(load, times, rate_rps) if times > 1 else load)

    def conversations(self) -> list[Conversation]:
        load = self.workload
        start_s = float(load.arrival_s[0])
        return [
            Conversation(float(load.arrival_s[row]) - start_s, self._turns(row))
            for row in range(len(load))
        ]

    def _turns(self, row: int) -> tuple[Turn, ...]:
        load, talk = self.workload, self.talk
        first = Turn(
            row * talk.turns,
            int(load.prompt_tokens[row]),
            int(load.output_tokens[row]),
            self._slo(row),
            self._prefixes(row),
            0 if load.priority is None else int(load.priority[row]),
        )
        later = (
            replace(first, index=first.index + place, prefixes=(), think_s=talk.think_s)
            for place in range(1, talk.turns)
        )
        return (first, *later)

    def _slo(self, row: int) -> Slo:
        return Slo(
            _cell(self.workload.slo_ttft_s, row, self.slo.ttft_s),
            _cell(self.workload.slo_tpot_s, row, self.slo.tpot_s),
        )

    def _prefixes(self, row: int) -> tuple[Prefix, ...]:
        return tuple(Prefix(*part) for part in self.workload.prefix_parts(row))


def _repeated(load: Workload, times: int, rate_rps: float) -> Workload:
    """Joined by gaps of the mean length."""
    turn_s = load.duration_s + 1 / rate_rps
    again = load.select(np.tile(np.arange(len(load)), times))
    shift_s = np.repeat(np.arange(times) * turn_s, len(load))
    return replace(again, arrival_s=again.arrival_s + shift_s)


def _cell(column: NDArray[np.float64] | None, row: int, default: float) -> float:
    """An empty cell means the run's target."""
    return default if column is None or np.isnan(column[row]) else float(column[row])


def draw(recipe: Synthetic) -> Workload:
    """The same recipe gives the same requests."""
    generator = np.random.default_rng(recipe.seed)
    arrivals = _arrivals(recipe, Arrivals(generator, recipe.burstiness))
    if recipe.spread == 0:
        load = fixed_lengths(recipe.prompt_tokens, recipe.output_tokens, arrivals)
    else:
        load = synthetic(_lengths(recipe), arrivals, generator)
    return _with_prefixes(load, recipe, generator) if recipe.prefixes else load


def _arrivals(recipe: Synthetic, arrivals: Arrivals) -> NDArray[np.float64]:
    """As many as were asked for, at the rate that was asked for: a short draw would miss it."""
    low, high = recipe.rate_rps, recipe.ramp_to_rps
    for name, rate_rps in (("rate", low), ("ramp-to", high)):
        if rate_rps is not None and rate_rps <= 0:
            raise BadInput(name, rate_rps, "must be positive")
    due = arrivals.times(recipe.requests, 1.0)
    if due[-1] > 0:
        due *= (recipe.requests - 1) / due[-1]
    return due / low if high is None or high == low else _ramped(due, low, high)


def _ramped(due: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Arrivals of unit rate, moved to when a rate that changes evenly has brought as many."""
    growth = (high**2 - low**2) / (2 * len(due))
    times: NDArray[np.float64] = (np.sqrt(low**2 + 2 * growth * due) - low) / growth
    return times


def _lengths(recipe: Synthetic) -> LengthModel:
    variance = recipe.spread**2
    return LengthModel(
        (float(np.log(recipe.prompt_tokens)), float(np.log(recipe.output_tokens))),
        ((variance, 0.0), (0.0, variance)),
        (1, 1),
        (recipe.longest_prompt, recipe.longest_output),
    )


def _with_prefixes(load: Workload, recipe: Synthetic, generator: np.random.Generator) -> Workload:
    """Each prompt begins with one of a few texts and goes on for its own length."""
    ids = generator.integers(recipe.prefixes, size=len(load))
    tokens = np.full(len(load), recipe.prefix_tokens, dtype=np.int64)
    prompts = load.prompt_tokens + tokens
    return replace(load, prompt_tokens=prompts, prefix_id=ids, prefix_tokens=tokens)
