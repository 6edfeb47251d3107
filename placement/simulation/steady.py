"""Batches whose next step is known before the schedulers are asked.

While every sequence has a place and memory suffices, a step takes one token of each decode. The
schedulers here are the real ones, asked only for what is open: who is let in, and which prompt
chunks ride along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decode.scheduler import DecodeScheduler, DecodeStep
from engine.batch import Batch, Chunk
from placement.role import GAIN, MEMORY, RoleBatcher, RoleSettings, Step

if TYPE_CHECKING:
    from engine.blocks import BlockPool
    from engine.request import Sequence

ANY_DECODE = (Chunk("", (0,), 0, (), None),)
"""Stands for decodes where only their presence matters."""
NO_BATCH = Batch()
NO_PROMPTS = Step(NO_BATCH, (), (), DecodeStep())
ONLY_DECODES = Step(NO_BATCH, (), ANY_DECODE, DecodeStep())


class SteadyDecodeScheduler(DecodeScheduler):
    @property
    def has_newcomers(self) -> bool:
        return bool(self._waiting)

    @property
    def is_steady(self) -> bool:
        """Whether whoever runs goes on, and newcomers that wait bring all that they need: then a
        step changes nothing but the tokens of those that run."""
        return not self.displaced

    def let_in(self) -> list[Sequence]:
        """Those of the newcomers who find a place now; others wait until somebody leaves."""
        newcomers = list(self._waiting.values())
        self._place(self._by_urgency(self._waiting))
        return [one for one in newcomers if one.request.id not in self._waiting]


class SteadyBatcher(RoleBatcher):
    """The instance's batcher, which can also be asked for one half of a step."""

    def __init__(
        self, pool: BlockPool, settings: RoleSettings, tpot_s: float | None = None
    ) -> None:
        """With a `tpot_s`, the target of every request."""
        super().__init__(pool, settings)
        self._tpot_s = tpot_s
        self.steady_decode = SteadyDecodeScheduler(pool, settings.decode)
        self.decode = self.steady_decode

    def tightest_tpot_s(self) -> float:
        return super().tightest_tpot_s() if self._tpot_s is None else self._tpot_s

    def measured_run(self, first_step_s: float, growth_s: float, steps: int) -> None:
        """Learn from steps of decodes only, each so much longer than the one before."""
        self._most_prompts *= MEMORY**steps
        if not self.decode_step_s:
            self.decode_step_s = first_step_s
            first_step_s, steps = first_step_s + growth_s, steps - 1
        # What is smoothed trails a line at this distance once it has caught up with it.
        behind_s = growth_s * (1.0 - GAIN) / GAIN
        to_catch_up_s = self.decode_step_s - (first_step_s - growth_s - behind_s)
        last_s = first_step_s + growth_s * (steps - 1)
        self.decode_step_s = last_s - behind_s + (1.0 - GAIN) ** steps * to_catch_up_s

    def prompts_beside(self, now: float, decodes: int) -> Step:
        """The step in which so many decodes take a token each, with the chunks that fit."""
        alone = ONLY_DECODES if decodes else NO_PROMPTS
        if not len(self.prefill):
            return alone
        prefills = tuple(self.prefill.next_chunks(now, self._prompt_budget(decodes)))
        return Step(NO_BATCH, prefills, alone.decodes, alone.decode_step) if prefills else alone
