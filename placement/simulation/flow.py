"""Decodes that advance by counting rounds: nobody's record is touched until someone reads it."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.blocks import BlockPool
    from engine.request import Sequence


@dataclass(slots=True, eq=False)
class _Member:
    sequence: Sequence
    since: int
    """The round up to which the sequence's own record goes."""
    full_round: int
    """The last round for which its blocks suffice."""


class Flow:
    """Decodes that take one token a round.

    A sequence needs its next block every `block_tokens` rounds; how many do so in which of these
    rounds is all that has to be known to say what memory they need, and when.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._size = pool.block_tokens
        self._members: dict[str, _Member] = {}
        self._ends: list[tuple[int, int, str]] = []
        self._added = 0
        self._round = self._counted_round = 0
        self._full_in = [0] * self._size
        """How many members' blocks are full in a round, by its number modulo the block's size."""
        self.ungrown_blocks = 0
        """Needed by members, and not taken from the pool yet."""
        self._grown: list[int] = []
        """Taken from the pool, and not in any member's table yet."""
        self.kv_read_tokens = 0
        """What the next step reads."""

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._members

    def add(self, sequence: Sequence) -> None:
        """Blocks beyond the one that it fills now are not counted on."""
        size = self._size
        free = len(sequence.blocks) * size - len(sequence.tokens)
        if free < 0:
            self.ungrown_blocks += -(free // size)
        else:
            free %= size
        full_round = self._round + free
        self._full_in[full_round % size] += 1
        request = sequence.request
        self._members[request.id] = _Member(sequence, self._round, full_round)
        self._added += 1
        output_tokens = len(sequence.tokens) - len(request.prompt)
        end_round = self._round + request.sampling.max_tokens - output_tokens
        heappush(self._ends, (end_round, self._added, request.id))
        self.kv_read_tokens += sequence.computed

    @property
    def steps_to_end(self) -> int:
        """Until the first member ends."""
        return self._ends[0][0] - self._round

    def steps_in_memory(self, wanted: int) -> int:
        """How many of the rounds wanted the pool lasts for; the next one once all have grown."""
        members, size = len(self._members), self._size
        cycles, spare = divmod(self._pool.available - self.ungrown_blocks, members)
        lasting = 1 + cycles * size
        phase = self._round % size
        while lasting < wanted and spare >= self._full_in[phase]:
            spare -= self._full_in[phase]
            phase = (phase + 1) % size
            lasting += 1
        return min(lasting, wanted)

    def ungrown_blocks_after(self, steps: int) -> int:
        """What members need by then, and have not taken from the pool yet."""
        return self.ungrown_blocks + self._blocks_due(steps)

    def advance(self, steps: int) -> list[Sequence]:
        """Everyone takes so many tokens; those that end leave."""
        self.ungrown_blocks += self._blocks_due(steps)
        self._round += steps
        self.kv_read_tokens += steps * len(self._members)
        ended = []
        ends = self._ends
        while ends and ends[0][0] == self._round:
            ended.append(self._leave(heappop(ends)[2]))
        return ended

    def remove(self, request_id: str) -> Sequence:
        """One that goes on elsewhere, up to date."""
        self._ends = [end for end in self._ends if end[2] != request_id]
        heapify(self._ends)
        return self._leave(request_id)

    def catch_up(self, request_id: str) -> None:
        """Bring one's record up to date, if it is here."""
        if request_id in self._members:
            self._catch_up(self._members[request_id])

    def catch_up_all(self) -> None:
        for member in self._members.values():
            self._catch_up(member)

    def grow(self) -> bool:
        """Take what members need from the pool; False, and nothing done, if it has not as much."""
        if self.ungrown_blocks > self._pool.available:
            return False
        if self.ungrown_blocks:
            self._grown += self._pool.allocate(self.ungrown_blocks)
            self.ungrown_blocks = 0
        return True

    def release(self) -> None:
        """Hand every member back, up to date, to be scheduled step by step."""
        self.catch_up_all()
        assert not self._grown
        self._members.clear()
        self._ends.clear()
        self._full_in = [0] * self._size
        self.kv_read_tokens = self.ungrown_blocks = 0

    def _blocks_due(self, steps: int) -> int:
        """In so many rounds more: all members once in each cycle of as many as a block has."""
        size = self._size
        if steps == 1:
            return self._full_in[self._round % size]
        cycles, rest = divmod(steps, size)
        first = self._round % size
        last = first + rest
        full = self._full_in
        due = sum(full[first:last]) + (sum(full[: last - size]) if last > size else 0)
        return due + cycles * len(self._members)

    def _leave(self, request_id: str) -> Sequence:
        member = self._members.pop(request_id)
        self._catch_up(member)
        sequence = member.sequence
        lacking = self._lacking_blocks(member)
        if lacking > 0:
            self.ungrown_blocks -= lacking
        self._full_in[member.full_round % self._size] -= 1
        self.kv_read_tokens -= sequence.computed
        return sequence

    def _catch_up(self, member: _Member) -> None:
        steps = self._round - member.since
        if steps:
            member.since = self._round
            member.sequence.tokens.extend([0] * steps)
            member.sequence.computed += steps
        lacking = self._lacking_blocks(member)
        if lacking > 0 and self._grown:
            member.sequence.blocks.extend(self._grown[-lacking:])
            member.full_round += min(lacking, len(self._grown)) * self._size
            del self._grown[-lacking:]

    def _lacking_blocks(self, member: _Member) -> int:
        """For its next token; none are missing where it is not positive."""
        return -((member.full_round - self._round) // self._size)
