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

    from numpy.typing import NDArray


ALONE, BESIDE = 0.2, 0.8
"""Others that computed in the mean of a step up to which, and from which on, it counts as either;
long ones are mostly in between."""
ALIKE = 1e-4
"""What makes two coefficients the same, next to what tells them apart."""


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
        return self.others >= BESIDE

    @property
    def alone(self) -> bool:
        return self.others <= ALONE

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
    warm, most = [one for one in steps if not one.cold], _others(steps)
    prompts, decodes = (
        _times([one for one in warm if one.prompts is kind], passes, most)[beside]
        for kind in (True, False)
    )
    return Times(prompts[0], *decodes)


def _times(
    steps: Sequence[StepsAtWork], passes: LatencyModel, most: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """How many times as long they took, and how much more where several decode: both alone, and
    both beside others."""
    if not steps:
        return (1.0, 0.0), (1.0, 0.0)
    said_s = np.array([passes.step_s(one.step) for one in steps])
    several = np.array([not one.prompts and one.step.draws > 1 for one in steps], dtype=float)
    if several.all():
        several[:] = 0.0  # nothing to tell them from: all is in proportion
    rows = np.column_stack([said_s, several])
    seconds = np.array([one.processor_s for one in steps])
    weights = np.array([one.count for one in steps]) / said_s
    (alone, more_s), (near, more_near_s) = _told_apart(steps, most, rows, seconds, weights)
    return (alone, more_s), (near, more_near_s)


def waits_of(steps: Sequence[StepsAtWork]) -> Waits:
    """None where nothing was seen; as alone where no others were."""
    most = _others(steps)
    prompts, decodes = (
        _wait([one for one in steps if one.prompts is kind], most) for kind in (True, False)
    )
    return Waits(prompts, decodes, most)


def _wait(steps: Sequence[StepsAtWork], most: float) -> Wait:
    if not steps:
        return Wait()
    computed_s = np.array([one.count * one.processor_s for one in steps])
    parts = np.array([one.count * one.waited_s for one in steps]) / computed_s
    rows = np.ones((len(steps), 1))
    (alone,), (near,) = _told_apart(steps, most, rows, parts, computed_s)
    return Wait(alone, near)


def _others(steps: Sequence[StepsAtWork]) -> float:
    """That computed in the mean, where others did."""
    beside = [one for one in steps if one.beside]
    count = sum(one.count for one in beside)
    return sum(one.count * one.others for one in beside) / count if beside else 1.0


def _told_apart(
    steps: Sequence[StepsAtWork],
    most: float,
    rows: NDArray[np.float64],
    target: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> tuple[list[float], list[float]]:
    """Coefficients, none negative, of what is alone and of what is beside others: a step tells of
    both, by the part of it that others computed. Where nothing tells them apart they are the
    same."""
    near = np.minimum([one.others / most for one in steps], 1.0)[:, None]
    roots = np.sqrt(weights)
    columns = np.hstack([rows * (1.0 - near), rows * near]) * roots[:, None]
    same = np.diag(ALIKE * np.linalg.norm(rows * roots[:, None], axis=0))
    features = np.vstack([columns, np.hstack([same, -same])])
    wanted = np.concatenate([target * roots, np.zeros(len(same))])
    found = nonnegative_least_squares(features, wanted).tolist()
    return found[: len(same)], found[len(same) :]


def cold_of(steps: Sequence[StepsAtWork], latency: AtWork) -> float:
    """How much longer a pass takes that begins cold."""
    passes = AtWork(latency.passes, times=latency.times)
    cold = [one for one in steps if one.cold and one.alone]
    longer_s = sum(one.count * (one.processor_s - passes.step_s(one.step)) for one in cold)
    return max(longer_s, 0.0) / sum(one.count for one in cold) if cold else 0.0


def between_passes(steps: Sequence[StepsAtWork], *, beside: bool = False) -> BetweenPasses:
    """Less what it waits for a processor, as passes do; as alone where no others were seen."""
    followed = [one for one in steps if one.followed and (one.beside if beside else one.alone)]
    if not followed:
        return between_passes(steps) if beside else BetweenPasses()
    weights = np.sqrt([one.followed for one in followed])
    rows = np.array([(1.0, one.step.draws, one.prompts) for one in followed])
    waits = waits_of(steps)
    slowed = [waits.slowed(one.others, prompts=one.prompts) for one in followed]
    seconds = np.array([one.then_s for one in followed]) / slowed
    fitted = nonnegative_least_squares(rows * weights[:, None], seconds * weights)
    return BetweenPasses(*fitted.tolist())
