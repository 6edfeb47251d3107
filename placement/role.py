"""A role is which schedulers an instance runs: here the two share one batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from decode.scheduler import DecodeScheduler, DecodeSettings
from engine.batch import Batch, Chunk
from placement.line import DriftingLine
from prefill.scheduler import PrefillScheduler, PrefillSettings

if TYPE_CHECKING:
    from collections.abc import Collection

    from decode.scheduler import DecodeStep
    from engine.batch import Draw
    from engine.blocks import BlockPool


GAIN = 0.2
"""How much of its difference to the smoothed duration a new one adds."""
MEMORY = 0.9
"""What an older batch counts against the one after it."""
LEAST_PROMPTS = 0.15
"""Prompts may add so much to a batch of decodes that fills the target by itself: at a crawl they
would only make its sequences fewer, not faster."""
MOST_GROWTH = 4
"""A batch holds at most so many times the prompt tokens of late: costs are only estimates."""
MOST_OFF = 3.0
"""A batch that took longer than so many times what was expected counts as that: it was held up."""


@dataclass(frozen=True, slots=True)
class RoleSettings:
    prefill: PrefillSettings = field(default_factory=PrefillSettings)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    tpot_share: float = 0.9
    """Part of the tightest TPOT target that a batch with decodes in it may take."""
    min_chunk: int = 16
    """Prompt tokens a batch takes even when the target leaves no time for any."""


@dataclass(frozen=True, slots=True)
class Step:
    batch: Batch
    prefills: tuple[Chunk, ...]
    decodes: tuple[Chunk, ...]
    decode_step: DecodeStep

    def is_plain(self, eos: frozenset[int]) -> bool:
        """Whether it holds sequences that draw their next tokens by no more than a temperature, and
        nothing else: then who goes on, and how, is known before the tokens are, but for those
        that stop at theirs."""
        if not self.decodes or self.prefills or self.batch.swaps:
            return False
        return all(len(one.tokens) == 1 and _is_bare(one.draw, eos) for one in self.decodes)


class RoleBatcher:
    """Every decode token rides in every batch; prompt chunks fill what the TPOT target leaves.
    No prompt is let in before a sequence that had to give way is back.

    A prefill instance simply has nothing in its decode scheduler, and a decode instance takes a
    prompt only when the router sends it one; a mixed instance uses both all the time.
    """

    def __init__(self, pool: BlockPool, settings: RoleSettings) -> None:
        self.settings = settings
        self.prefill = PrefillScheduler(pool, settings.prefill)
        self.decode = DecodeScheduler(pool, settings.decode)
        self.decode_step_s = 0.0
        """Smoothed duration of a batch with decodes only."""
        self.step_cost = DriftingLine(1.0 / settings.prefill.tokens_per_s, MEMORY)
        """Duration of a batch that holds both, over its prompt tokens. Decodes alone take a
        cheaper path, and a line through them too would promise little for many tokens."""
        self._most_prompts = 0.0
        """Prompt tokens of a batch lately."""

    def next_step(self, now: float, held: Collection[str] = ()) -> Step:
        decode_step = self.decode.next_step(held)
        decodes = tuple(decode_step.chunks)
        budget = self._prompt_budget(len(decodes))
        admits = not self.decode.displaced
        prefills = tuple(self.prefill.next_chunks(now, budget, admits=admits))
        batch = Batch(decodes + prefills, tuple(decode_step.swaps))
        return Step(batch, prefills, decodes, decode_step)

    def step_ahead(self, before: Step, eos: frozenset[int]) -> Step | None:
        """The step after one that is under way, whose tokens nobody knows yet; None where they, or
        prompts, decide what comes next."""
        if not before.is_plain(eos) or self.prefill.may_go_on:
            return None
        decode_step = self.decode.step_ahead({chunk.request_id for chunk in before.decodes})
        decodes = tuple(decode_step.chunks)
        step = Step(Batch(decodes), (), decodes, decode_step)
        return step if step.is_plain(eos) else None

    @property
    def pace_s(self) -> float:
        """Of a decode step, as routers are to see it. One that idles has none: told how slow it was
        when it was busy, it would be kept from work, and so from telling anything else."""
        return self.decode_step_s if len(self.decode) else 0.0

    def tightest_tpot_s(self) -> float:
        """Of those that decode here, of which there must be some."""
        return min(sequence.request.slo.tpot_s for sequence in self.decode.running)

    def measured(self, step: Step, duration_s: float) -> None:
        """Learn what decodes cost by themselves, and prompt tokens beside them."""
        prompt_tokens = sum([len(chunk.tokens) for chunk in step.prefills])
        if prompt_tokens:
            self.prefill.measured(prompt_tokens, duration_s)
        if not step.decodes:
            return
        self._most_prompts = max(prompt_tokens, self._most_prompts * MEMORY)
        if not prompt_tokens:
            gain = GAIN if self.decode_step_s else 1.0
            self.decode_step_s += gain * (duration_s - self.decode_step_s)
            return
        most_s = MOST_OFF * self.step_cost.at(prompt_tokens)
        counted_s = min(duration_s, most_s) if self.step_cost.observations else duration_s
        self.step_cost.observe(prompt_tokens, counted_s)

    def _prompt_budget(self, decodes: int) -> int:
        budget = self.settings.prefill.token_budget
        if not decodes:
            return budget
        limit_s = self.tightest_tpot_s() * self.settings.tpot_share
        base_s = self.step_cost.base
        spare_s = max(limit_s - base_s, base_s * LEAST_PROMPTS)
        fits = min(budget, int(MOST_GROWTH * max(self._most_prompts, self.settings.min_chunk)))
        if fits * self.step_cost.slope > spare_s:
            fits = int(spare_s / self.step_cost.slope)
        return max(fits, self.settings.min_chunk)


def _is_bare(draw: Draw | None, eos: frozenset[int]) -> bool:
    return draw is not None and draw.is_bare(eos)
