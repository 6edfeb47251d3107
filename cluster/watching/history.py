"""Latencies and rates over the last minutes, in steps of a few seconds that gateways add up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.watching.latencies import Latencies, total
from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.watching.observer import Ended

STEP_S = 2.0
STEPS = 150
COUNTS = ("ended", "judged", "met", "tokens", "begun")


@dataclass(slots=True)
class Step:
    """What ended and streamed in one step."""

    start_s: float
    ended: int = 0
    judged: int = 0
    met: int = 0
    tokens: int = 0
    begun: int = 0
    """Of those that ended: how many had a first token."""
    ttft: Latencies = field(default_factory=Latencies)
    tpot: Latencies = field(default_factory=Latencies)
    parts_s: dict[str, float] = field(default_factory=dict)
    """Sums over those that had one."""

    def add(self, event: Ended) -> None:
        self.ended += 1
        if event.outcome != "abort":
            self.judged += 1
            self.met += event.met_targets
        timeline = event.timeline
        tpot_s = timeline.tpot_s(event.output_tokens)
        if tpot_s is not None:
            self.tpot.add(tpot_s)
        if timeline.ttft_s is None:
            return
        self.begun += 1
        self.ttft.add(timeline.ttft_s)
        # A part that a request skipped took it no time: only so do the means add up.
        for part, took_s in timeline.parts_s().items():
            self.parts_s[part] = self.parts_s.get(part, 0.0) + (took_s or 0.0)

    def document(self) -> dict[str, Any]:
        """Plain values that JSON can carry to another gateway."""
        return {
            "start_s": self.start_s,
            "counts": [getattr(self, name) for name in COUNTS],
            "ttft": self.ttft.document(),
            "tpot": self.tpot.document(),
            "parts_s": self.parts_s,
        }

    def merge(self, document: dict[str, Any]) -> None:
        for name, count in zip(COUNTS, document["counts"], strict=True):
            setattr(self, name, getattr(self, name) + count)
        self.ttft.merge(document["ttft"])
        self.tpot.merge(document["tpot"])
        for part, took_s in document["parts_s"].items():
            self.parts_s[part] = self.parts_s.get(part, 0.0) + took_s


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

    def since(self, start_s: float, now: float) -> list[dict[str, Any]]:
        """The steps from `start_s` on in which anything happened."""
        self.step(now)
        steps = [one for one in self._steps if one.start_s >= start_s]
        return [one.document() for one in steps if one.ended or one.tokens]


class WholeHistory:
    """The same steps of several gateways added up, each told by its life's name."""

    def __init__(self) -> None:
        self._told: dict[float, dict[str, dict[str, Any]]] = {}
        self._added: dict[float, tuple[Step, dict[str, Any]]] = {}
        """Steps as they were added up and drawn last."""

    def heard(self, life: str, documents: Iterable[dict[str, Any]]) -> None:
        for document in documents:
            start_s = document["start_s"]
            self._told.setdefault(start_s, {})[life] = document
            self._added.pop(start_s, None)

    def since(self, life: str) -> float:
        """From which moment on a gateway may have news."""
        return max((start_s for start_s, told in self._told.items() if life in told), default=0.0)

    def points(self, now: float) -> list[dict[str, Any]]:
        """For plots, from the first step in which anything happened to the last that is over."""
        starts_s = self._starts_s(now)
        first = next((place for place, at in enumerate(starts_s) if at in self._told), STEPS)
        return [self._at(start_s)[1] for start_s in starts_s[first:-1]]

    def observed(self, now: float) -> dict[str, Any]:
        """Everything still remembered, in the shape of a plan's prediction."""
        steps = [self._at(start_s)[0] for start_s in self._starts_s(now) if start_s in self._told]
        judged, begun = (sum(getattr(step, name) for step in steps) for name in ("judged", "begun"))
        seconds = max(now - steps[0].start_s, STEP_S) if steps else STEP_S
        return {
            "ttft_s": total([step.ttft for step in steps]).spread(),
            "tpot_s": total([step.tpot for step in steps]).spread(),
            "attainment": sum(step.met for step in steps) / judged if judged else None,
            "rate_rps": sum(step.ended for step in steps) / seconds,
            "throughput_tokens_s": sum(step.tokens for step in steps) / seconds,
            "ttft_parts_s": {
                part: sum(step.parts_s.get(part, 0.0) for step in steps) / begun if begun else None
                for part in TTFT_PARTS
            },
        }

    def _starts_s(self, now: float) -> list[float]:
        """Of the steps that are still remembered, after forgetting the others."""
        last_s = now - now % STEP_S
        starts_s = [last_s - STEP_S * back for back in reversed(range(STEPS))]
        for remembered in (self._told, self._added):
            for start_s in [at for at in remembered if at < starts_s[0]]:
                del remembered[start_s]
        return starts_s

    def _at(self, start_s: float) -> tuple[Step, dict[str, Any]]:
        found = self._added.get(start_s)
        if found is None:
            step = Step(start_s)
            for document in self._told.get(start_s, {}).values():
                step.merge(document)
            found = self._added[start_s] = step, _point(step)
        return found


def _point(step: Step) -> dict[str, Any]:
    return {
        "at_s": step.start_s,
        "rate_rps": step.ended / STEP_S,
        "tokens_s": step.tokens / STEP_S,
        "attainment": step.met / step.judged if step.judged else None,
        "ttft_s": step.ttft.spread(),
        "tpot_s": step.tpot.spread(),
    }
