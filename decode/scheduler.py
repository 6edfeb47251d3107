"""Which sequences take their next token, and who gives way when memory is short."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.batch import Chunk, Swap, chunk_ahead, chunk_of
from engine.blocks import blocks_for, prefix_hashes
from engine.request import SequenceState

if TYPE_CHECKING:
    from collections.abc import Collection

    from engine.blocks import BlockPool
    from engine.request import Sequence


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """What a deployment chooses of a decode scheduler."""

    max_sequences: int = 256
    watermark: float = 0.02
    """Part of the pool kept free when admitting, so that running sequences can grow."""
    swap_block_s: float = 2e-4
    """One block to the host and back."""
    recompute_token_s: float = 1e-4
    recompute_budget: int = 512
    """Tokens a batch may spend on recomputing preempted sequences."""


@dataclass(frozen=True, slots=True)
class DecodeSettings(DecodeTuning):
    host_slots: int = 0
    """Blocks of host memory to swap to, as many as the instance's engine has."""


@dataclass(slots=True)
class DecodeStep:
    chunks: list[Chunk] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    """Sequences that lost their place; what reads their blocks must stop."""
    outgrown: list[Sequence] = field(default_factory=list)
    """Sequences that this whole pool cannot hold any longer; no longer scheduled."""


class DecodeScheduler:
    """Continuous batching: every running sequence takes one token a step.

    When blocks run out, the least urgent sequence gives way, the latest arrival first; it is
    swapped to the host or recomputed later, whichever costs less, and it comes back before
    anyone new is let in. The oldest sequence of the highest priority never gives way, so every
    sequence ends.
    """

    def __init__(self, pool: BlockPool, settings: DecodeSettings) -> None:
        self.pool = pool
        self.settings = settings
        self.preemptions = 0
        self._running: dict[str, Sequence] = {}
        self._waiting: dict[str, Sequence] = {}
        """Has its blocks, or has none and must be recomputed; waits for a place."""
        self._swapped: dict[str, tuple[Sequence, tuple[int, ...]]] = {}
        self._host_free = list(range(settings.host_slots))

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._swapped)

    def __contains__(self, request_id: str) -> bool:
        holders = (self._running, self._waiting, self._swapped)
        return any(request_id in held for held in holders)

    def find(self, request_id: str) -> Sequence | None:
        if request_id in self._swapped:
            return self._swapped[request_id][0]
        return self._running.get(request_id) or self._waiting.get(request_id)

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running.values())

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        swapped = (sequence for sequence, _ in self._swapped.values())
        return (*self._running.values(), *self._waiting.values(), *swapped)

    @property
    def free_host_slots(self) -> int:
        return len(self._host_free)

    @property
    def wanted_blocks(self) -> int:
        """What those are short of that gave way."""
        if not self._waiting and not self._swapped:
            return 0
        held = [*self._waiting.values(), *(sequence for sequence, _ in self._swapped.values())]
        return sum([max(self._missing_blocks(sequence), 0) for sequence in held])

    @property
    def displaced(self) -> bool:
        """Whether somebody who had to give way is not back yet."""
        return bool(self._swapped) or any(not s.blocks for s in self._waiting.values())

    def has_room(self, blocks: int) -> bool:
        """Whether newcomers may take so many blocks: never before those that had to give way."""
        reserve = int(self.pool.total_blocks * self.settings.watermark)
        if not self._running and not self._waiting:
            reserve = 0
        return not self.displaced and self.pool.available - blocks >= reserve

    def add(self, sequence: Sequence) -> None:
        assert sequence.id not in self
        assert sequence.blocks, "a newcomer brings its KV"
        sequence.state = SequenceState.WAITING
        self._waiting[sequence.id] = sequence

    def remove(self, request_id: str) -> Sequence:
        """Forget a sequence; its blocks stay with the caller, its host slots become free."""
        if request_id in self._swapped:
            sequence, slots = self._swapped.pop(request_id)
            self._give_slots(slots)
            return sequence
        held = self._running if request_id in self._running else self._waiting
        return held.pop(request_id)

    def next_step(self, held: Collection[str] = ()) -> DecodeStep:
        """The chunks of one step. `held` sequences keep their place but take no token."""
        step = DecodeStep()
        for sequence in self._by_urgency(self._running):
            if sequence.id in self._running and sequence.id not in held:
                self._grow(sequence, held, step)
        if self._swapped:
            self._swap_in(step)
        if self._waiting:
            self._let_in()
            self._unblock(step)
        recompute = self.settings.recompute_budget
        for sequence in self._running.values():
            if sequence.id in held:
                continue
            count = min(sequence.uncomputed, max(recompute, 1))
            if count > 1:
                recompute -= count
            step.chunks.append(chunk_of(sequence, count))
        return step

    def step_ahead(self, under_way: Collection[str]) -> DecodeStep:
        """The step after one in which the sequences `under_way` draw tokens that nobody knows yet.
        Nobody gives way for it: it has no chunks while memory is short, or somebody is not back."""
        step = DecodeStep()
        going_on = [one for one in self._running.values() if _goes_on(one, under_way)]
        missing = [self._missing_blocks(one, int(one.id in under_way)) for one in going_on]
        if self.displaced or sum([max(count, 0) for count in missing]) > self.pool.available:
            return step
        for sequence, count in zip(going_on, missing, strict=True):
            sequence.blocks.extend(self.pool.allocate(count))
        self._let_in()
        for sequence in self._running.values():
            if sequence.id not in under_way:
                step.chunks.append(chunk_of(sequence, sequence.uncomputed))
            elif not sequence.ends_next:
                step.chunks.append(chunk_ahead(sequence))
        return step

    def computed(self, chunk: Chunk) -> Sequence:
        sequence = self._running[chunk.request_id]
        sequence.computed = chunk.end
        return sequence

    def _by_urgency(self, held: dict[str, Sequence]) -> list[Sequence]:
        return sorted(held.values(), key=_urgency)

    def _grow(self, sequence: Sequence, held: Collection[str], step: DecodeStep) -> None:
        """Give the sequence the blocks of its next token, displacing less urgent ones."""
        missing = self._missing_blocks(sequence)
        while missing > self.pool.available:
            victim = next(s for s in reversed(self._by_urgency(self._running)) if s.id not in held)
            if victim is sequence:
                self._give_way(sequence, step)
                return
            self._displace(victim, step)
        sequence.blocks.extend(self.pool.allocate(missing))

    def _missing_blocks(self, sequence: Sequence, unread: int = 0) -> int:
        tokens = len(sequence.tokens) + unread
        return blocks_for(tokens, self.pool.block_tokens) - len(sequence.blocks)

    def _give_way(self, sequence: Sequence, step: DecodeStep) -> None:
        """Nobody less urgent is left: wait for room, or leave if there can never be enough."""
        if blocks_for(len(sequence.tokens), self.pool.block_tokens) > self.pool.total_blocks:
            step.outgrown.append(self._running.pop(sequence.id))
        else:
            self._displace(sequence, step)

    def _displace(self, victim: Sequence, step: DecodeStep) -> None:
        self.preemptions += 1
        self.remove(victim.id)
        step.preempted.append(victim.id)
        filled = self._filled(victim)
        if self._swap_pays(victim):
            slots = self._take_slots(len(filled))
            self._swapped[victim.id] = victim, slots
            step.swaps.append(Swap(victim.id, filled, slots, to_host=True))
            victim.state = SequenceState.SWAPPED
        else:
            victim.computed = 0
            victim.state = SequenceState.WAITING
            self._waiting[victim.id] = victim
        self.pool.release(victim.blocks)
        victim.blocks = []

    def _take_slots(self, count: int) -> tuple[int, ...]:
        """The lowest that are free, rising as a sequence's blocks do: runs move as one."""
        taken = tuple(self._host_free[:count])
        del self._host_free[:count]
        return taken

    def _give_slots(self, slots: tuple[int, ...]) -> None:
        self._host_free = sorted((*self._host_free, *slots))

    def _filled(self, victim: Sequence) -> tuple[int, ...]:
        """Its blocks but those in reserve: one that has moved here brought room to grow."""
        return tuple(victim.blocks[: blocks_for(victim.computed, self.pool.block_tokens)])

    def _swap_pays(self, victim: Sequence) -> bool:
        blocks = len(self._filled(victim))
        if not 0 < blocks <= len(self._host_free):
            return False
        swap_s = blocks * self.settings.swap_block_s
        return swap_s <= victim.computed * self.settings.recompute_token_s

    def _swap_in(self, step: DecodeStep) -> None:
        for sequence in self._by_urgency({k: s for k, (s, _) in self._swapped.items()}):
            if step.preempted or not self._place_for(sequence):
                return
            _, slots = self._swapped.pop(sequence.id)
            sequence.blocks = self.pool.allocate(self._missing_blocks(sequence))
            filled = tuple(sequence.blocks[: len(slots)])
            step.swaps.append(Swap(sequence.id, filled, slots, to_host=False))
            self._give_slots(slots)
            self._run(sequence)

    def _let_in(self) -> None:
        """Sequences that gave way first, then newcomers, as far as places and blocks go; but what
        holds all it needs goes on whoever waits: idle, its blocks would be of no use to anybody."""
        displaced = self._by_urgency({k: s for k, s in self._waiting.items() if not s.blocks})
        newcomers = self._by_urgency({k: s for k, s in self._waiting.items() if s.blocks})
        swapped = [sequence for sequence, _ in self._swapped.values()]
        gave_way = min(map(_urgency, [*displaced, *swapped]), default=None)
        ready = [
            one
            for one in newcomers
            if gave_way is not None and _urgency(one) < gave_way and self._missing_blocks(one) <= 0
        ]
        rest = [one for one in newcomers if one not in ready]
        self._place([*ready, *displaced, *rest])

    def _place(self, order: list[Sequence]) -> None:
        full = False
        for sequence in order:
            if full and self._missing_blocks(sequence) > 0:
                continue
            if not self._place_for(sequence):
                full = bool(self._running)  # else only those behind it will make room for it
                continue
            del self._waiting[sequence.id]
            if not sequence.blocks:
                self._share_prefix(sequence)
            sequence.blocks.extend(self.pool.allocate(self._missing_blocks(sequence)))
            self._run(sequence)

    def _unblock(self, step: DecodeStep) -> None:
        """Nothing runs, since those that wait hold all blocks and each lacks one: the least
        urgent give theirs up until somebody fits."""
        waiting = self._by_urgency(self._waiting)
        for sequence in waiting:
            if blocks_for(len(sequence.tokens), self.pool.block_tokens) > self.pool.total_blocks:
                step.outgrown.append(self._waiting.pop(sequence.id))
        for victim in reversed(waiting[1:]):
            if self._running:
                return
            if victim.blocks and victim.id in self._waiting:
                self._displace(victim, step)
                self._let_in()

    def _place_for(self, sequence: Sequence) -> bool:
        if len(self._running) >= self.settings.max_sequences:
            return False
        missing = self._missing_blocks(sequence)
        if missing <= 0:
            return True
        spare = int(self.pool.total_blocks * self.settings.watermark) if self._running else 0
        return self.pool.available - missing >= spare

    def _share_prefix(self, sequence: Sequence) -> None:
        last_token_block = (len(sequence.tokens) - 1) // self.pool.block_tokens
        hashes = prefix_hashes(sequence.tokens, self.pool.block_tokens, sequence.request.tenant)
        sequence.blocks = self.pool.share_prefix(hashes[:last_token_block])
        sequence.computed = len(sequence.blocks) * self.pool.block_tokens

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        self._running[sequence.id] = sequence


def _goes_on(sequence: Sequence, under_way: Collection[str]) -> bool:
    return sequence.id not in under_way or not sequence.ends_next


def _urgency(sequence: Sequence) -> tuple[int, float, str]:
    """Sorts the most urgent first."""
    return -sequence.request.priority, sequence.request.arrival_s, sequence.id
