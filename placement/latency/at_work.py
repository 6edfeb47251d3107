"""Steps of a server at work: passes slower than one after another, and more to do between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from placement.latency.machine import Wait, Waits
from placement.latency.model import LatencyModel, Step
from placement.latency.robust_fit import nonnegative_least_squares

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class StepsAtWork:
    """So many steps that were much alike, by their mean."""

    count: int
    step: Step
    processor_s: float
    """Of the thread that computes."""
    waited_s: float = 0.0
    """For a processor."""
    others: float = 0.0
    """Instances of the machine that computed meanwhile."""
    drawn_per_s: float = 0.0
    """Tokens that these drew."""
    cold: bool = False
    """Whether the instance had nothing to do before, or prompts where now it has none."""
    followed: int = 0
    """So many were followed by another one at once."""
    then_s: float = 0.0
    """From a pass to the following one."""
    handed_off: bool = False
    """Whether the server was one of prefill and decode instances."""

    @property
    def beside(self) -> bool:
        return self.others > 0.0

    @property
    def prompts(self) -> bool:
        """Whether it holds any."""
        return self.step.pairs > 0


@dataclass(frozen=True, slots=True)
class BetweenPasses:
    """What an instance does between two passes: its own thread computes nothing meanwhile."""

    step_s: float = 0.0
    token_s: float = 0.0
    prompts_s: float = 0.0
    """More after a pass that holds prompts."""

    def of_step(self, draws: int, *, prompts: bool) -> float:
        return self.step_s + self.token_s * draws + (self.prompts_s if prompts else 0.0)


class Times(NamedTuple):
    """How many times as long as one after another passes take."""

    prompts: float = 1.0
    decodes: float = 1.0
    several_s: float = 0.0
    """More where several sequences decode."""


ONE_AFTER_ANOTHER = Times()


@dataclass(frozen=True)
class AtWork(LatencyModel):
    """Steps as they are in service: passes, and what lies between them."""

    passes: LatencyModel
    between: BetweenPasses = BetweenPasses()
    times: Times = ONE_AFTER_ANOTHER
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return self.passes.pair_s * self.times.prompts

    @property
    def read_s(self) -> float:
        return self.passes.read_s * self.times.decodes

    @property
    def mixed_s(self) -> float:
        return self.passes.mixed_s * self.times.prompts

    def fixed_s(self, tokens: int, draws: int) -> float:
        prompts = tokens > draws
        ratio = self.times.prompts if prompts else self.times.decodes
        more_s = 0.0 if prompts or draws == 1 else self.times.several_s
        pass_s = ratio * self.passes.fixed_s(tokens, draws) + more_s
        return pass_s + self.between.of_step(draws, prompts=prompts)

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        return self.passes.outside(tokens, kv_read_tokens)


def times_of(steps: Sequence[StepsAtWork], passes: LatencyModel, *, beside: bool) -> Times:
    """By processor time: what a pass waits for its processor is for the machine to say. Where
    nothing was seen, as long as one after another."""
    warm = [one for one in steps if one.beside is beside and not one.cold]
    decodes = [one for one in warm if not one.prompts]
    prompts = _ratio([one for one in warm if one.prompts], passes)
    if len({one.step.draws > 1 for one in decodes}) < 2:
        return Times(prompts, _ratio(decodes, passes))
    weights = np.sqrt([one.count for one in decodes])
    rows = np.array([(passes.step_s(one.step), one.step.draws > 1) for one in decodes])
    seconds = np.array([one.processor_s for one in decodes])
    fitted = nonnegative_least_squares(rows * weights[:, None], seconds * weights)
    return Times(prompts, *fitted.tolist())


def _ratio(steps: Sequence[StepsAtWork], passes: LatencyModel) -> float:
    said_s = sum(one.count * passes.step_s(one.step) for one in steps)
    return sum(one.count * one.processor_s for one in steps) / said_s if steps else 1.0


def waits_of(steps: Sequence[StepsAtWork]) -> Waits:
    """None where nothing was seen; as alone where no others were."""
    found = []
    for prompts in (True, False):
        alike = [one for one in steps if one.prompts is prompts]
        alone = _wait([one for one in alike if not one.beside])
        beside = [one for one in alike if one.beside]
        found.append(Wait(alone, *_wait_beside(beside)) if beside else Wait(alone, alone))
    beside = [one for one in steps if one.beside]
    others = sum(one.count * one.others for one in beside)
    mean = others / sum(one.count for one in beside) if beside else 1.0
    return Waits(found[0], found[1], mean)


def _wait(steps: Sequence[StepsAtWork]) -> float:
    computed_s = sum(one.count * one.processor_s for one in steps)
    return sum(one.count * one.waited_s for one in steps) / computed_s if computed_s else 0.0


def _wait_beside(steps: Sequence[StepsAtWork]) -> tuple[float, float]:
    """Where others draw nothing, and more for each token a second."""
    computed_s = np.array([one.count * one.processor_s for one in steps])
    weights = np.sqrt(computed_s)
    rows = np.array([(1.0, one.drawn_per_s) for one in steps])
    parts = np.array([one.count * one.waited_s for one in steps]) / computed_s
    nothing_drawn, token_s = nonnegative_least_squares(rows * weights[:, None], parts * weights)
    return float(nothing_drawn), float(token_s)


def cold_of(steps: Sequence[StepsAtWork], latency: AtWork) -> float:
    """How much longer a pass takes that begins cold."""
    passes = AtWork(latency.passes, times=latency.times)
    cold = [one for one in steps if one.cold and not one.beside]
    longer_s = sum(one.count * (one.processor_s - passes.step_s(one.step)) for one in cold)
    return max(longer_s, 0.0) / sum(one.count for one in cold) if cold else 0.0


def between_passes(steps: Sequence[StepsAtWork], *, beside: bool = False) -> BetweenPasses:
    """Less what it waits for a processor, as passes do; as alone where no others were seen."""
    followed = [one for one in steps if one.followed and one.beside is beside]
    if not followed:
        return between_passes(steps) if beside else BetweenPasses()
    weights = np.sqrt([one.followed for one in followed])
    rows = np.array([(1.0, one.step.draws, one.prompts) for one in followed])
    waits = waits_of(steps)
    slowed = [waits.slowed(one.others, one.drawn_per_s, prompts=one.prompts) for one in followed]
    seconds = np.array([one.then_s for one in followed]) / slowed
    fitted = nonnegative_least_squares(rows * weights[:, None], seconds * weights)
    return BetweenPasses(*fitted.tolist())
