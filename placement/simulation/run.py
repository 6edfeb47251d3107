"""Steps under way on a simulated instance, and the work they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from placement.latency.model import Step, pairs_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.batch import Chunk
    from placement.role import Step as RoleStep


@dataclass(slots=True, eq=False)
class Run:
    """Steps under way: one, or several in which the same decodes take a token each."""

    step: RoleStep
    decodes: int
    start_s: float
    first_step_s: float
    growth_s: float
    """How much longer each step is than the one before."""
    steps: int
    steady: bool
    crowded_ratio: float = 1.0
    """How many times as long it takes beside busy neighbours."""
    slowed: float = 1.0
    """How many times as long it takes now."""
    moved_s: float = 0.0
    """How far its start was put back, as if it had always gone at this pace."""

    @property
    def duration_s(self) -> float:
        growing = self.growth_s * (self.steps * (self.steps - 1) / 2)
        return self.steps * self.first_step_s + growing

    @property
    def lasted_s(self) -> float:
        return self.duration_s - self.moved_s

    def split(self, steps: int) -> Run:
        """Its first so many steps as a run of their own; this one goes on after them."""
        first = replace(self, steps=steps)
        duration_s = first.duration_s
        self.start_s += duration_s
        self.first_step_s += self.growth_s * steps
        self.steps -= steps
        self.moved_s = 0.0
        return first

    def go_on(self, slowed: float, now: float) -> None:
        """At another pace, from where it stands."""
        change, elapsed_s = slowed / self.slowed, now - self.start_s
        self.slowed = slowed
        self.start_s = now - elapsed_s * change
        self.moved_s += elapsed_s * (change - 1.0)
        self.first_step_s *= change
        self.growth_s *= change


def work_of(
    chunks: Iterable[Chunk], decodes: int = 0, kv_read_tokens: int = 0, *, mixed: bool
) -> Step:
    """Of these chunks, beside so many decodes that read so much."""
    tokens = draws = decodes
    pairs, read = 0, kv_read_tokens
    for chunk in chunks:
        count = len(chunk.tokens)
        tokens += count
        draws += chunk.draw is not None
        read += chunk.start
        pairs += pairs_of(count, chunk.start) if count > 1 else 0
    return Step(tokens, draws, pairs, read, mixed)
