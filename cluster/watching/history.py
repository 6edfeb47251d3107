"""Latencies and rates over the last minutes, in steps of a few seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.watching.observer import Ended

STEP_S = 2.0
STEPS = 150
STEP_SAMPLES = 2000
"""Latencies kept of one step; beyond that every further one is only counted."""


@dataclass(slots=True)
class Step:
    """What ended and streamed in one step."""

    start_s: float
    ended: int = 0
    judged: int = 0
    met: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    parts_s: dict[str, list[float]] = field(default_factory=dict)


class History:
    """A ring of steps; empty ones are made as time passes."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque(maxlen=STEPS)

    def step(self, now: float) -> Step:
        start_s = now - now % STEP_S
        if not self._steps:
            self._steps.append(Step(start_s))
        last_s = max(self._steps[-1].start_s, start_s - STEPS * STEP_S)
        while last_s < start_s:
            last_s += STEP_S
            self._steps.append(Step(last_s))
        return self._steps[-1]

    def ended(self, event: Ended, now: float) -> bool:
        """Counts a request; whether it met its targets."""
        step = self.step(now)
        step.ended += 1
        met = event.met_targets
        if event.outcome != "abort":
            step.judged += 1
            step.met += met
        if len(step.ttft_s) < STEP_SAMPLES:
            _add_latencies(step, event)
        return met

    def points(self, now: float) -> list[dict[str, Any]]:
        """For plots; the step under way is left out."""
        self.step(now)
        return [_point(step) for step in list(self._steps)[:-1]]

    def observed(self, now: float) -> dict[str, Any]:
        """Everything still remembered, in the shape of a plan's prediction."""
        self.step(now)
        steps = list(self._steps)
        judged = sum(step.judged for step in steps)
        seconds = max(now - steps[0].start_s, STEP_S)
        return {
            "ttft_s": _spread(_joined(step.ttft_s for step in steps)),
            "tpot_s": _spread(_joined(step.tpot_s for step in steps)),
            "attainment": sum(step.met for step in steps) / judged if judged else None,
            "rate_rps": sum(step.ended for step in steps) / seconds,
            "throughput_tokens_s": sum(step.tokens for step in steps) / seconds,
            "ttft_parts_s": {
                part: _mean(_joined(step.parts_s.get(part, ()) for step in steps))
                for part in TTFT_PARTS
            },
        }


def _add_latencies(step: Step, event: Ended) -> None:
    timeline = event.timeline
    tpot_s = timeline.tpot_s(event.output_tokens)
    if tpot_s is not None:
        step.tpot_s.append(tpot_s)
    if timeline.ttft_s is None:
        return
    step.ttft_s.append(timeline.ttft_s)
    # A part that a request skipped took it no time: only so do the means add up.
    for part, took_s in timeline.parts_s().items():
        step.parts_s.setdefault(part, []).append(took_s or 0.0)


def _point(step: Step) -> dict[str, Any]:
    return {
        "at_s": step.start_s,
        "rate_rps": step.ended / STEP_S,
        "tokens_s": step.tokens / STEP_S,
        "attainment": step.met / step.judged if step.judged else None,
        "ttft_s": _spread(step.ttft_s),
        "tpot_s": _spread(step.tpot_s),
    }


def _joined(lists: Iterable[Sequence[float]]) -> list[float]:
    return [value for values in lists for value in values]


def _spread(values: list[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {f"p{q}": _quantile(ordered, q / 100) for q in (50, 90, 99)}


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    if not ordered:
        return None
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
