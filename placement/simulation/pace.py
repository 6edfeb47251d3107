"""How long batches of a simulated instance take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from placement.latency.model import Step

if TYPE_CHECKING:
    from placement.latency.model import LatencyModel
    from placement.simulation.deployment import InstanceModel

MOST_KEPT = 65_536
"""Sizes of passes whose cost is kept."""


class Pace:
    """A latency model for one instance, what does not change looked up once."""

    __slots__ = ("_fixed_s", "_latency", "_mixed_s", "_pair_s", "_read_s", "_stages")

    def __init__(self, model: InstanceModel, latency: LatencyModel) -> None:
        self._latency = latency
        self._stages = model.pipeline_parallel if model.pipelined else 1
        self._pair_s, self._read_s = latency.pair_s, latency.read_s
        self._mixed_s = latency.mixed_s
        self._fixed_s: dict[tuple[int, int], float] = {}

    def step_s(self, work: Step, *, decodes: bool) -> float:
        """A pass, or with stages working at once: a round of passes over parts of the batch."""
        if self._stages == 1:
            return self._pass_s(work)
        if not decodes:
            return self._latency.stage_s(work)
        stages = self._stages
        part = Step(
            -(-work.tokens // stages),
            -(-work.draws // stages),
            work.pairs // stages,
            work.kv_read_tokens // stages,
            work.mixed,
        )
        return self._pass_s(part)

    def growth_s(self, decodes: int) -> float:
        """How much longer each step of so many decodes is than the one before."""
        return self._read_s * decodes / self._stages

    def drain_s(self, step_s: float) -> float:
        """How long prompts are still in later stages when the next batch may start."""
        return step_s * (self._stages - 1)

    def _pass_s(self, work: Step) -> float:
        tokens, draws, pairs, read, mixed = work
        size = tokens, draws
        fixed_s = self._fixed_s.get(size)
        if fixed_s is None:
            if len(self._fixed_s) >= MOST_KEPT:
                self._fixed_s.clear()
            fixed_s = self._fixed_s[size] = self._latency.fixed_s(tokens, draws)
        attention_s = self._pair_s * pairs + self._read_s * read
        return fixed_s + attention_s + self._mixed_s if mixed else fixed_s + attention_s
