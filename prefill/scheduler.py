"""Which prompt tokens to compute next."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain
from typing import TYPE_CHECKING, Literal

from engine.batch import Chunk, chunk_of
from engine.blocks import blocks_for
from engine.errors import OutOfBlocks
from engine.request import SequenceState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.blocks import BlockPool
    from engine.request import Sequence

    Entry = tuple[tuple[int, float, str], Sequence]
    """What it is sorted by, ending in its id, so that no two are alike."""

NO_HASHES: list[bytes] = []
MEMORY = 0.9
"""What an older batch counts against the one after it."""


@dataclass(frozen=True, slots=True)
class PrefillSettings:
    token_budget: int = 2048
    """Tokens of a batch: where this accelerator saturates, from its latency profile."""
    max_sequences: int = 256
    policy: Literal["deadline", "fcfs"] = "deadline"
    late_share: float = 0.25
    """Part of each batch kept for the oldest prompt that will not meet its target."""
    tokens_per_s: float = 10_000.0
    """First guess of the prefill rate; measured from then on."""


class PrefillScheduler:
    """Packs chunks of waiting prompts into a budget, the most pressing first.

    Pressing means: higher priority, then the earlier deadline among prompts that can all meet
    theirs. Where that is too much, as few as possible are put off: they queue behind the others,
    except for a share of every batch that goes to the oldest of them.
    """

    def __init__(self, pool: BlockPool, settings: PrefillSettings) -> None:
        self.pool = pool
        self.settings = settings
        self.tokens_per_s = settings.tokens_per_s
        self._tokens = self._duration_s = 0.0
        self._sequences: dict[str, Sequence] = {}
        self._hashes: dict[str, list[bytes]] = {}
        """Of the full blocks of those that have some, where prefixes are cached."""
        self._admitted: dict[str, Sequence] = {}
        """Those that hold blocks."""
        self._waiting_tokens = 0
        """Of the others."""
        self._open: list[Entry] = []
        """In the order of the policy."""
        self._expired: list[Entry] = []
        """Past their deadline, the oldest of the most urgent first."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def find(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._sequences.values())

    @property
    def queued_tokens(self) -> int:
        admitted = self._admitted.values()
        return self._waiting_tokens + sum([len(one.tokens) - one.computed for one in admitted])

    @property
    def wanted_blocks(self) -> int:
        """Of prompts without a place; some may find a part of theirs here already."""
        return blocks_for(self._waiting_tokens, self.pool.block_tokens)

    def add(self, sequence: Sequence) -> None:
        """Raises OutOfBlocks for a prompt that an empty pool could not hold."""
        needed = blocks_for(len(sequence.tokens) + 1, self.pool.block_tokens)
        if needed > self.pool.total_blocks:
            raise OutOfBlocks(needed, self.pool.total_blocks)
        assert sequence.id not in self._sequences
        self._sequences[sequence.id] = sequence
        hashes = self.pool.hashes(sequence.tokens, sequence.request.tenant)
        if hashes:
            self._hashes[sequence.id] = hashes
        insort(self._open, (self._rank(sequence), sequence))
        if sequence.blocks:
            self._admitted[sequence.id] = sequence
        else:
            self._waiting_tokens += sequence.uncomputed

    def remove(self, request_id: str) -> Sequence:
        """Forget a sequence; its blocks stay with the caller."""
        self._hashes.pop(request_id, None)
        sequence = self._sequences.pop(request_id)
        if self._admitted.pop(request_id, None) is None:
            self._waiting_tokens -= sequence.uncomputed
        if not _take_out(self._open, self._rank(sequence)):
            _take_out(self._expired, _age(sequence))
        return sequence

    def next_chunks(self, now: float, budget: int, *, admits: bool = True) -> list[Chunk]:
        """Chunks of at most `budget` tokens together; admitted prompts have all their blocks.
        Unless it `admits`, only those go on."""
        if not self._sequences:
            return []
        late_budget = int(budget * self.settings.late_share)
        ahead, late = self._order(now)
        chunks: list[Chunk] = []
        if late and ahead:
            budget -= self._pack([late[0][1]], late_budget, chunks, admits=admits)
        order = chain(ahead, (sequence for _, sequence in late))
        self._pack(order, budget, chunks, admits=admits)
        return chunks

    @property
    def may_go_on(self) -> bool:
        """Whether a batch now might hold a part of some prompt: else `next_chunks` has none."""
        return bool(self._admitted) or any(map(self._might_fit, self._sequences.values()))

    def computed(self, chunk: Chunk) -> Sequence:
        """Account for a chunk that has run, and make its full blocks findable."""
        sequence = self._sequences[chunk.request_id]
        sequence.computed = chunk.end
        hashes = self._hashes_of(sequence)
        if hashes:
            full = sequence.computed // self.pool.block_tokens
            self.pool.remember(sequence.blocks[:full], hashes[:full])
        return sequence

    def measured(self, tokens: int, duration_s: float) -> None:
        """Learn the rate from a batch that prefilled `tokens`: of many, as they all count."""
        if tokens and duration_s > 0.0:
            self._tokens = MEMORY * self._tokens + tokens
            self._duration_s = MEMORY * self._duration_s + duration_s
            self.tokens_per_s = self._tokens / self._duration_s

    def _rank(self, sequence: Sequence) -> tuple[int, float, str]:
        request = sequence.request
        if self.settings.policy == "fcfs":
            return _age(sequence)
        return -request.priority, request.ttft_deadline_s, request.id

    def _order(self, now: float) -> tuple[list[Sequence], list[Entry]]:
        """Prompts that can meet their deadline, and those that are late, most pressing first."""
        if self.settings.policy == "fcfs":
            return [sequence for _, sequence in self._open], []
        self._expire(now)
        waiting = [sequence for _, sequence in self._open]
        put_off = self._too_much(waiting, now)
        if not put_off:
            return waiting, self._expired
        late = self._expired.copy()
        for sequence in put_off:
            insort(late, (_age(sequence), sequence))
        names = {sequence.id for sequence in put_off}
        return [sequence for sequence in waiting if sequence.id not in names], late

    def _expire(self, now: float) -> None:
        """Whatever else waits, these are late from now on, and make nobody else late."""
        if not self._open or self._first_deadline_s > now:
            return
        over = [sequence for (_, deadline_s, _), sequence in self._open if deadline_s <= now]
        self._open = [entry for entry in self._open if entry[0][1] > now]
        for sequence in over:
            insort(self._expired, (_age(sequence), sequence))

    @property
    def _first_deadline_s(self) -> float:
        """Of those not yet late: of the first, where all are equally urgent."""
        (first, deadline_s, _), (last, _, _) = self._open[0][0], self._open[-1][0]
        return deadline_s if first == last else min([rank[1] for rank, _ in self._open])

    def _too_much(self, waiting: list[Sequence], now: float) -> list[Sequence]:
        """The fewest prompts without which all others, in this order, meet their deadlines.

        Whenever one would be late, the longest of the least urgent up to it is put off (Moore and
        Hodgson's rule): in a burst a few long prompts make room for many short ones.
        """
        late: list[Sequence] = []
        if not waiting or self._all_in_time(waiting, now):
            return late
        kept: list[tuple[int, int, int]] = []
        done_s = now
        for place, sequence in enumerate(waiting):
            done_s += sequence.uncomputed / self.tokens_per_s
            heappush(kept, (sequence.request.priority, -sequence.uncomputed, place))
            if done_s > sequence.request.ttft_deadline_s:
                put_off = waiting[heappop(kept)[2]]
                done_s -= put_off.uncomputed / self.tokens_per_s
                late.append(put_off)
        return late

    def _all_in_time(self, waiting: list[Sequence], now: float) -> bool:
        """Whether even the last one computed would meet the first deadline of all."""
        first, last = waiting[0].request, waiting[-1].request
        if first.priority != last.priority:
            return False
        tokens = sum([len(one.tokens) - one.computed for one in waiting])
        over_s = now + tokens / self.tokens_per_s
        return over_s <= first.ttft_deadline_s

    def _pack(
        self, order: Iterable[Sequence], budget: int, chunks: list[Chunk], *, admits: bool
    ) -> int:
        """Append chunks in this order; returns the tokens used. A prompt that finds no room keeps
        those behind it out, or else small prompts would starve it; admitted ones go on."""
        used = 0
        full = not admits
        packed = {chunk.request_id for chunk in chunks}
        computing = self._blocks_under_way()
        most = self.settings.max_sequences
        for sequence in order:
            if used >= budget or len(chunks) >= most:
                break
            if sequence.request.id in packed or self._sibling_computes(sequence, computing):
                continue
            if not sequence.blocks:
                full = full or not self._admit(sequence)
                if full:
                    continue
            count = min(sequence.uncomputed, budget - used)
            chunks.append(chunk_of(sequence, count))
            used += count
            if self._hashes:
                computing.update(self._hashes_to_compute(sequence))
        return used

    @property
    def _block_tokens(self) -> int:
        return self.pool.block_tokens

    def _blocks_under_way(self) -> set[bytes]:
        computing: set[bytes] = set()
        if self._hashes:
            for sequence in self._admitted.values():
                computing.update(self._hashes_to_compute(sequence))
        return computing

    def _hashes_of(self, sequence: Sequence) -> list[bytes]:
        return self._hashes.get(sequence.request.id, NO_HASHES)

    def _hashes_to_compute(self, sequence: Sequence) -> list[bytes]:
        hashes = self._hashes_of(sequence)
        return hashes[sequence.computed // self._block_tokens :] if hashes else hashes

    def _sibling_computes(self, sequence: Sequence, computing: set[bytes]) -> bool:
        """Whether the first block this prompt misses is being computed for another right now:
        waiting one batch for it is cheaper than computing it twice."""
        if sequence.blocks or not self._hashes:
            return False
        hashes = self._hashes_of(sequence)
        if not hashes:
            return False
        cached = self.pool.cached_prefix(hashes)
        return cached < len(hashes) and hashes[cached] in computing

    def _might_fit(self, sequence: Sequence) -> bool:
        """What it would share may count as available, too."""
        shared = self.pool.cached_prefix(self._sharable(sequence))
        return self._blocks_of(sequence) - shared <= self.pool.available

    def _sharable(self, sequence: Sequence) -> list[bytes]:
        """All of its full blocks but the one with its last token, which must be computed."""
        return self._hashes_of(sequence)[: (len(sequence.tokens) - 1) // self._block_tokens]

    def _blocks_of(self, sequence: Sequence) -> int:
        return blocks_for(len(sequence.tokens), self._block_tokens)

    def _admit(self, sequence: Sequence) -> bool:
        """Give the sequence its cached prefix and blocks for the rest, or nothing."""
        shared = self.pool.share_prefix(self._sharable(sequence))
        missing = self._blocks_of(sequence) - len(shared)
        if missing > self.pool.available:
            self.pool.release(shared)
            return False
        self._waiting_tokens -= sequence.uncomputed
        self._admitted[sequence.id] = sequence
        sequence.blocks = shared + self.pool.allocate(missing)
        sequence.computed = len(shared) * self._block_tokens
        sequence.state = SequenceState.RUNNING
        return True


def _age(sequence: Sequence) -> tuple[int, float, str]:
    request = sequence.request
    return -request.priority, request.arrival_s, request.id


def _take_out(entries: list[Entry], rank: tuple[int, float, str]) -> bool:
    """Whether the sequence of this rank was there."""
    place = bisect_left(entries, rank, key=_rank_of)
    found = place < len(entries) and entries[place][0] == rank
    if found:
        del entries[place]
    return found


def _rank_of(entry: Entry) -> tuple[int, float, str]:
    return entry[0]
