"""What batches took in a server at work, from the logs of its instances, as a profile tells it."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from math import log2
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from placement.latency.machine import REST_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TOLD_APART = 8
"""Batches of up to so many draws; beyond, by the powers of the square root of two."""
WORK = ("tokens", "draws", "prompts", "pairs", "kv_read_tokens")


class Kind(NamedTuple):
    """Steps that are told by their mean."""

    others: float
    """That computed meanwhile, in fifths."""
    cold: bool
    mixed: bool
    prompts: bool
    draws: int
    tokens: int


@dataclass(slots=True)
class _Steps:
    """All of one kind."""

    work: list[tuple[float, ...]] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """That computed meanwhile."""
    then_s: list[float] = field(default_factory=list)
    """Where the next one followed at once."""

    def add(self, step: dict[str, float], others: float) -> None:
        self.work.append(tuple(step[name] for name in WORK))
        self.processor_s.append(step["processor_s"])
        self.waited_s.append(max(step["pass_s"] - step["processor_s"], 0.0))
        self.others.append(others)
        if not np.isnan(step["then_s"]):
            self.then_s.append(step["then_s"])

    def described(self, kind: Kind) -> dict[str, Any]:
        means = np.mean(self.work, axis=0).tolist()
        found: dict[str, Any] = {
            "count": len(self.work),
            "others": float(np.mean(self.others)),
            "cold": kind.cold,
            "mixed": kind.mixed,
            **dict(zip(WORK, means, strict=True)),
            "processor_s": float(np.mean(self.processor_s)),
            "waited_s": float(np.mean(self.waited_s)),
        }
        if self.then_s:
            found |= {"followed": len(self.then_s), "then_s": float(np.mean(self.then_s))}
        return found


def steps_at_work(logs: Path, since_s: float) -> list[dict[str, Any]]:
    """Means over steps that are much alike."""
    instances = [[*_read(path, since_s)] for path in sorted(logs.glob("*.csv"))]
    spans = [_spans(steps) for steps in instances]
    kinds: dict[Kind, _Steps] = {}
    for number, steps in enumerate(instances):
        others = [span for place, span in enumerate(spans) if place != number]
        ended_s, after_prompts = -np.inf, False
        for step in steps:
            began_s, lasted_s = step["began_s"], step["pass_s"]
            busy_s = sum(_meanwhile(began_s, began_s + lasted_s, one) for one in others)
            cold = began_s - ended_s > REST_S or (after_prompts and not step["prompts"])
            kind = _kind(step, busy_s / lasted_s, cold=cold)
            kinds.setdefault(kind, _Steps()).add(step, busy_s / lasted_s)
            ended_s, after_prompts = began_s + lasted_s, step["prompts"] > 0
    return [kinds[kind].described(kind) for kind in sorted(kinds)]


def prompt_passes(logs: Path, since_s: float, until_s: float) -> tuple[int, float]:
    """In how many prompts were, and how long in all: a pass counts for each of its prompts."""
    steps = [step for path in logs.glob("*.csv") for step in _read(path, since_s)]
    counted = [one for one in steps if one["began_s"] < until_s]
    passes_s = sum(one["prompts"] * one["pass_s"] for one in counted)
    return int(sum(one["prompts"] for one in counted)), passes_s


def _kind(step: dict[str, float], others: float, *, cold: bool) -> Kind:
    tokens, draws = (int(step[name]) for name in ("tokens", "draws"))
    prompts = step["prompts"] > 0
    mixed = prompts and step["decodes"] > 0
    return Kind(round(5 * others) / 5, cold, mixed, prompts, _about(draws), _about(tokens))


def _about(count: int) -> int:
    return count if count <= TOLD_APART else round(2 ** (round(2 * log2(count)) / 2))


def _read(path: Path, since_s: float) -> Iterator[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = {name: float(value or "nan") for name, value in row.items()}
            if step["began_s"] >= since_s:
                yield step


def _spans(steps: Sequence[dict[str, float]]) -> NDArray[np.float64]:
    """When it was busy, in passes and between those that follow one another."""
    began_s = np.array([step["began_s"] for step in steps])
    busy_s = np.array([step["pass_s"] + np.nan_to_num(step["then_s"]) for step in steps])
    return np.column_stack([began_s, began_s + busy_s])


def _meanwhile(began_s: float, ended_s: float, spans: NDArray[np.float64]) -> float:
    """How long it was busy then."""
    first, last = np.searchsorted(spans[:, 1], began_s), np.searchsorted(spans[:, 0], ended_s)
    near = spans[first:last]
    shared_s = np.minimum(near[:, 1], ended_s) - np.maximum(near[:, 0], began_s)
    return float(shared_s.sum())
