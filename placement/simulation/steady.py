"""Batches whose next step is known before the schedulers are asked.

While every sequence has a place and memory suffices, a step takes one token of each decode. The
schedulers here are the real ones, asked only for what is open: who is let in, and which prompt
chunks ride along. Decodes then advance by counting rounds.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from decode.scheduler import DecodeScheduler, DecodeStep
from engine.batch import Batch, Chunk
from engine.blocks import blocks_for
from placement.role import GAIN, RoleBatcher, RoleSettings, Step

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

    def let_all_in(self) -> list[Sequence] | None:
        """Admit those that wait; None if some cannot be, or someone had to give way before."""
        if self._displaced():
            return None
        newcomers = list(self._waiting.values())
        self._let_in()
        return None if self._waiting else newcomers

    @property
    def all_run(self) -> bool:
        return not self._waiting and not self._swapped


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
        self.step_cost.observe(0.0, first_step_s + growth_s * (steps - 1), steps)
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


class Flow:
    """Decodes that take one token a round; a sequence's own record is brought up to date late."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._members: dict[str, tuple[Sequence, int]] = {}
        """With the round up to which the sequence is up to date."""
        self._ends: list[tuple[int, int, str]] = []
        self._added = 0
        self._round = 0
        self._grown_round = 0
        self.kv_read_tokens = 0
        """What the next step reads."""

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._members

    def add(self, sequence: Sequence) -> None:
        remaining = sequence.request.sampling.max_tokens - sequence.output_tokens
        self._members[sequence.id] = sequence, self._round
        self._added += 1
        heappush(self._ends, (self._round + remaining, self._added, sequence.id))
        self.kv_read_tokens += sequence.computed

    @property
    def steps_to_end(self) -> int:
        """Until the first member ends."""
        return self._ends[0][0] - self._round

    @property
    def steps_in_memory(self) -> int:
        """How many rounds the pool's blocks surely last, whoever needs a new one first."""
        lasting = self._pool.available // len(self._members) * self._pool.block_tokens
        return lasting - 1 - (self._round - self._grown_round)

    def most_ungrown_blocks(self, more_steps: int = 0) -> int:
        """At most so many blocks of the pool are spoken for, after so many steps more."""
        rounds = self._round - self._grown_round + more_steps
        if rounds == 0:
            return 0
        return len(self._members) * (rounds // self._pool.block_tokens + 1)

    def advance(self, steps: int) -> list[Sequence]:
        """Everyone takes so many tokens; those that end leave."""
        self._round += steps
        self.kv_read_tokens += steps * len(self._members)
        ended = []
        while self._ends and self._ends[0][0] == self._round:
            ended.append(self._leave(heappop(self._ends)[2]))
        if not self._members:
            self._grown_round = self._round
        return ended

    def remove(self, request_id: str) -> Sequence:
        """One that goes on elsewhere, up to date."""
        self._ends = [end for end in self._ends if end[2] != request_id]
        heapify(self._ends)
        return self._leave(request_id)

    def catch_up(self, request_id: str) -> None:
        """Bring one's record up to date, if it is here."""
        if request_id in self._members:
            sequence, since = self._members[request_id]
            self._catch_up(sequence, since)
            self._members[request_id] = sequence, self._round

    def catch_up_all(self) -> None:
        for request_id in self._members:
            self.catch_up(request_id)

    def _leave(self, request_id: str) -> Sequence:
        sequence, since = self._members.pop(request_id)
        self._catch_up(sequence, since)
        self.kv_read_tokens -= sequence.computed
        return sequence

    def grow(self) -> bool:
        """Bring block tables up to date; False, and nothing done, if memory does not suffice."""
        if self._round == self._grown_round:
            return True
        missing: list[tuple[Sequence, int]] = []
        for request_id, (sequence, since) in self._members.items():
            self._catch_up(sequence, since)
            self._members[request_id] = sequence, self._round
            needed = blocks_for(len(sequence.tokens), self._pool.block_tokens)
            if needed > len(sequence.blocks):
                missing.append((sequence, needed - len(sequence.blocks)))
        if sum(count for _, count in missing) > self._pool.available:
            return False
        for sequence, count in missing:
            sequence.blocks.extend(self._pool.allocate(count))
        self._grown_round = self._round
        return True

    def release(self) -> None:
        """Hand every member back, up to date, to be scheduled step by step."""
        for sequence, since in self._members.values():
            self._catch_up(sequence, since)
        self._members.clear()
        self._ends.clear()
        self.kv_read_tokens = 0
        self._grown_round = self._round

    def _catch_up(self, sequence: Sequence, since: int) -> None:
        steps = self._round - since
        if steps:
            sequence.tokens.extend([0] * steps)
            sequence.computed += steps
