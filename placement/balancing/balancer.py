"""Which running requests should move where: a decider over the view, that only proposes.

An instance's *freeness* is how many decode steps its batch can take before its blocks run out,
counted with virtual usage: what waits for room counts as if it were there, an urgent request
counts with the headroom it should find, and a draining instance counts as full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.messages import InstanceState
from engine.request import SequenceState
from kvtransfer.transfer import TransferState
from placement.balancing.recent_moves import RecentMoves

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.messages import Load, Running
    from placement.view import View

QUEUED = (SequenceState.WAITING.value, SequenceState.SWAPPED.value, TransferState.OFFERED.value)


class BalancerPolicy(str, Enum):
    """What an instance is judged by."""

    FREENESS = "freeness"
    TPOT = "tpot"


@dataclass(frozen=True, slots=True)
class BalancerSettings:
    policy: BalancerPolicy = BalancerPolicy.FREENESS
    """freeness looks at room alone; tpot also at the step that the profile predicts."""
    low_steps: float = 128.0
    """An instance with room for fewer decode steps is relieved ..."""
    high_steps: float = 256.0
    """... until it has room for so many; only instances with more are targets."""
    hole_steps: float = 32.0
    """Room that an instance keeps which helps another to make a hole for what waits there."""
    headroom_blocks: int = 64
    """Room that the urgent requests of an instance should find, shared by them."""
    urgent_priority: int = 1
    """From this priority on a request is urgent."""
    growth_blocks: int = 2
    """Room that a target must have beyond what moves."""
    reserve_share: float = 0.02
    """Part of a target's blocks that moves leave free."""
    newcomer_share: float = 0.4
    """Part of a target's blocks that balance moves leave free: filled up evenly by what runs long,
    all instances would run out at once, and newcomers find room nowhere."""
    outgoing_moves: int = 4
    """Moves under way from one instance."""
    incoming_moves: int = 4
    """Moves under way to one instance."""
    link_moves: int = 1
    """Moves under way from one instance to another."""
    drain_moves: int = 8
    """Each of these limits for an instance that is being emptied."""
    moves_a_minute: int = 2
    """How often one request may move, drains apart."""
    patience_s: float = 5.0
    """A move that shows no effect for so long is taken to have failed."""
    copy_tokens_s: float = 100_000.0
    """KV that a link moves, for the cost of a move."""
    fixed_cost_s: float = 0.02
    """What any move costs."""
    least_gain: float = 1.0
    """Seconds of decoding gained before blocks run out, per second of moving."""
    tpot_s: float = 0.1
    """With the tpot policy: the target ..."""
    act_share: float = 0.95
    """... an instance whose predicted step exceeds this share of it is relieved ..."""
    rest_share: float = 0.85
    """... until it is below this one, and so are targets."""
    step_s: float = 0.01
    """With the tpot policy, from `tandem profile`: what a decode step takes at least ..."""
    step_sequence_s: float = 1e-4
    """... more for each sequence in it ..."""
    step_kv_token_s: float = 1e-7
    """... and for each token of their context."""


@dataclass(frozen=True, slots=True)
class Move:
    request_id: str
    source: str
    target: str
    reason: str
    """drain, role, outgrow, room, defragment, isolate or balance."""


@dataclass(slots=True, eq=False)
class Standing:
    """An instance as it will be once the moves decided so far are done."""

    load: Load
    free_blocks: int
    virtual_blocks: float
    batch: int
    leaving: int = 0
    arriving: int = 0
    here: dict[str, Running] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.load.instance

    @property
    def open(self) -> bool:
        return self.load.state is InstanceState.READY and self.load.role.decodes

    @property
    def freeness(self) -> float:
        """Decode steps until the blocks run out; negative where more is asked for than is."""
        return self.after(0.0, 0)

    def after(self, blocks: float, sequences: int) -> float:
        """Freeness with so much more, or less, on it."""
        if self.load.state is not InstanceState.READY:
            return float("-inf")
        left = self.load.total_blocks - self.virtual_blocks - blocks
        return left * self.load.block_tokens / max(self.batch + sequences, 1)

    def waits(self) -> bool:
        """Whether something waits for room."""
        return any(_missing(one, self.load) for one in self.here.values())

    def demand(self) -> int:
        """Blocks that the first of those that wait for room is short of; what gave way is to come
        back into what is left, not to take it from newcomers elsewhere."""
        waiting = [one for one in self.here.values() if not _gave_way(one)]
        missing = (_missing(one, self.load) for one in waiting)
        wanted = next((blocks for blocks in missing if blocks), 0)
        return max(wanted - max(self.free_blocks, 0), 0)


def virtual_blocks(load: Load, here: Iterable[Running], settings: BalancerSettings) -> float:
    """Blocks in use, what waits for room, and the headroom of the urgent."""
    sequences = list(here)
    used = load.total_blocks - load.free_blocks
    queued = sum(_missing(one, load) for one in sequences)
    urgent = any(_urgent(one, settings) for one in sequences)
    return used + queued + (settings.headroom_blocks if urgent else 0)


class Balancer:
    """`decide` proposes moves and remembers them, so that it neither repeats nor reverts one."""

    def __init__(self, settings: BalancerSettings | None = None) -> None:
        self.settings = settings or BalancerSettings()
        self._recent = RecentMoves(self.settings.moves_a_minute, self.settings.patience_s)
        self._pressed: set[str] = set()

    def decide(self, view: View, *, drain_only: bool = False) -> tuple[Move, ...]:
        self._recent.look(view)
        standings = self._standings(view)
        moves = self._evacuate(standings, view.now_s)
        if not drain_only:
            self._press(standings)
            for one in standings:
                moves += self._spill(one, standings, view.now_s)
            for one in standings:
                moves += self._send_on(one, standings, view.now_s)
            moves += self._defragment(standings, view.now_s)
            for one in standings:
                moves += self._isolate(one, standings, view.now_s)
            for one in sorted(standings, key=lambda one: one.freeness):
                moves += self._balance(one, standings, view.now_s)
        return tuple(moves)

    def _relieved(self, source: Standing) -> bool:
        return source.freeness > self.settings.high_steps

    def _appeal(self, target: Standing) -> float:
        """The target with most of it is chosen."""
        return target.freeness

    def failed(self, request_id: str) -> None:
        """A move ended without effect: what was set aside for it is free again."""
        self._recent.ended(request_id)

    def _standings(self, view: View) -> list[Standing]:
        return [self._standing(seen.load) for seen in view.instances]

    def _standing(self, load: Load) -> Standing:
        """The load with the effect of the moves under way."""
        recent, name = self._recent, load.instance
        arriving, leaving = recent.to(name), recent.from_(name)
        here = {one.request_id: one for one in load.sequences if one.request_id not in arriving}
        expected = recent.expected_blocks(name)
        reserve = int(load.total_blocks * self.settings.reserve_share)
        virtual = virtual_blocks(load, here.values(), self.settings)
        return Standing(
            load,
            free_blocks=load.free_blocks - reserve - expected,
            virtual_blocks=virtual + expected - recent.leaving_blocks(name),
            batch=max(load.running_sequences + len(arriving) - len(leaving), 0),
            leaving=len(leaving),
            arriving=len(arriving),
            here=here,
        )

    def _press(self, standings: list[Standing]) -> None:
        """Who needs relief: below the low mark, and from then on until above the high one."""
        for one in standings:
            if one.freeness < self.settings.low_steps:
                self._pressed.add(one.name)
            elif one.freeness > self.settings.high_steps:
                self._pressed.discard(one.name)
        self._pressed &= {one.name for one in standings}

    # What to move.

    def _evacuate(self, standings: list[Standing], now: float) -> list[Move]:
        """Everything off instances that drain, and running sequences off those that only
        prefill."""
        moves = []
        for source in standings:
            draining = source.load.state is InstanceState.DRAINING
            if not draining and source.load.role.decodes:
                continue
            for one in _least_urgent(source.here.values()):
                if not _runs(one) and not (draining and _waits_without_kv(one)):
                    continue
                target = self._roomiest(one, source, standings, draining=draining)
                if target is not None and self._recent.may_move(one, now, always=draining):
                    moves.append(
                        self._move(one, source, target, "drain" if draining else "role", now)
                    )
        return moves

    def _spill(self, source: Standing, standings: list[Standing], now: float) -> list[Move]:
        """Takes what is about to outgrow its whole instance to a larger one, with its KV."""
        moves: list[Move] = []
        if not source.open:
            return moves
        for one in list(source.here.values()):
            if not _runs(one) or self._room_left(one, source) >= self.settings.low_steps:
                continue
            target = self._larger(one, source, standings)
            if target is not None and self._recent.may_move(one, now, always=True):
                moves.append(self._move(one, source, target, "outgrow", now))
        return moves

    def _larger(self, one: Running, source: Standing, standings: list[Standing]) -> Standing | None:
        """The freest instance in which this request can grow further than where it is."""
        targets = [
            target
            for target in standings
            if target.open
            and self._room_left(one, target) > self._room_left(one, source)
            and self._room_for(one, target)
            and self._within_limits(source, target, draining=True)
        ]
        return max(targets, key=lambda target: target.freeness, default=None)

    def _room_left(self, one: Running, standing: Standing) -> int:
        """Tokens by which a request could grow if the instance were all its own."""
        capacity = standing.load.total_blocks * standing.load.block_tokens
        return capacity - one.prompt_tokens - one.output_tokens

    def _send_on(self, source: Standing, standings: list[Standing], now: float) -> list[Move]:
        """Prompts for which there is no room here, to where nothing waits: nothing of theirs has
        been computed, so nothing is copied."""
        moves: list[Move] = []
        if not source.open:
            return moves
        for one in list(source.here.values()):
            if not _is_new(one) or self._room_for(one, source):
                continue
            targets = [
                target
                for target in standings
                if target is not source
                and target.open
                and target.load.role.prefills
                and not target.waits()
                and self._room_for(one, target)
                and self._within_limits(source, target, draining=False)
            ]
            target = max(targets, key=self._appeal, default=None)
            if target is not None and self._recent.may_move(one, now):
                moves.append(self._move(one, source, target, "room", now))
        return moves

    def _defragment(self, standings: list[Standing], now: float) -> list[Move]:
        """Makes holes of the room that is scattered, for what waits: the smallest ones first. The
        others help, those too where something waits for a larger hole; but none that has its own
        and is about to fill it."""
        moves: list[Move] = []
        helpers = [one for one in standings if one.open and not self._has_hole(one)]
        waiting = [one for one in helpers if self._short(one) > 0]
        for source in sorted(waiting, key=lambda one: (self._short(one), one.name)):
            helpers.remove(source)
            moves += self._make_hole(source, helpers, now)
        return moves

    def _has_hole(self, standing: Standing) -> bool:
        return standing.waits() and self._short(standing) <= 0

    def _short(self, standing: Standing) -> int:
        return standing.demand() - self._recent.leaving_blocks(standing.name)

    def _make_hole(self, source: Standing, helpers: list[Standing], now: float) -> list[Move]:
        moves: list[Move] = []
        while (short := self._short(source)) > 0:
            choices = [
                (one, target)
                for one in self._movable(source, now)
                if (target := self._helper(one, source, helpers)) is not None
            ]
            fitting = [choice for choice in choices if choice[0].blocks >= short]
            if not choices:
                break
            one, target = (
                min(fitting, key=lambda choice: _smallest(choice[0]))
                if fitting
                else max(choices, key=lambda choice: choice[0].blocks)
            )
            moves.append(self._move(one, source, target, "defragment", now))
        return moves

    def _helper(self, one: Running, source: Standing, helpers: list[Standing]) -> Standing | None:
        """Where it would leave the most room to grow, whatever waits there for more."""
        targets = [
            target
            for target in helpers
            if self._room_for(one, target)
            and not any(_gave_way(other) for other in target.here.values())
            and self._within_limits(source, target, draining=False)
            and self._steps_left(one, target) >= self.settings.hole_steps
        ]
        return max(targets, key=lambda target: self._steps_left(one, target), default=None)

    def _steps_left(self, one: Running, target: Standing) -> float:
        left = target.free_blocks - self._needs(one, target)
        return left * target.load.block_tokens / (target.batch + 1)

    def _isolate(self, source: Standing, standings: list[Standing], now: float) -> list[Move]:
        """Gives the urgent on an instance their headroom, by moving others away."""
        urgent = [one for one in source.here.values() if _urgent(one, self.settings)]
        moves: list[Move] = []
        if not source.open or not urgent:
            return moves
        missing = self.settings.headroom_blocks - source.free_blocks
        missing -= self._recent.leaving_blocks(source.name)
        for one in self._movable(source, now):
            if missing <= 0 or _urgent(one, self.settings):
                break
            calm = [other for other in standings if not self._has_urgent(other)]
            target = self._roomiest(one, source, calm)
            if target is not None:
                missing -= one.blocks
                moves.append(self._move(one, source, target, "isolate", now))
        return moves

    def _balance(self, source: Standing, standings: list[Standing], now: float) -> list[Move]:
        """From an instance that runs short to the freest, as long as it is worth its cost."""
        moves: list[Move] = []
        while source.open and source.name in self._pressed:
            choices = [
                (one.priority, -self._worth(one, source, target), one.request_id, one, target)
                for one in self._movable(source, now)
                if (target := self._roomiest(one, source, standings)) is not None
                and self._spares(one, target)
            ]
            worthy = [choice for choice in choices if -choice[1] >= self.settings.least_gain]
            if not worthy or self._relieved(source):
                break
            one, target = min(worthy, key=lambda choice: choice[:3])[3:]
            moves.append(self._move(one, source, target, "balance", now))
        return moves

    def _worth(self, one: Running, source: Standing, target: Standing) -> float:
        """Seconds until the tighter of both runs out of blocks that the move gains, per second
        of moving."""
        before = min(source.freeness, target.freeness)
        after = min(source.after(-one.blocks, -1), target.after(one.blocks, 1))
        tokens = one.prompt_tokens + one.output_tokens
        cost_s = self.settings.fixed_cost_s + tokens / self.settings.copy_tokens_s
        return (after - before) * max(source.load.step_s, 0.001) / cost_s

    # Where it may go.

    def _movable(self, source: Standing, now: float) -> list[Running]:
        running = [one for one in source.here.values() if _runs(one)]
        return [one for one in _least_urgent(running) if self._recent.may_move(one, now)]

    def _largest(self, source: Standing, now: float) -> Running | None:
        return max(self._movable(source, now), key=lambda one: one.blocks, default=None)

    def _roomiest(
        self,
        one: Running,
        source: Standing,
        standings: list[Standing],
        *,
        draining: bool = False,
    ) -> Standing | None:
        """The best instance that may take it; a draining source is content with less."""
        targets = [
            target
            for target in standings
            if target.open
            and target is not source
            and self._room_for(one, target)
            and self._within_limits(source, target, draining=draining)
            and (draining or self._relaxed(target))
        ]
        return max(targets, key=self._appeal, default=None)

    def _room_for(self, one: Running, target: Standing) -> bool:
        return self._needs(one, target) <= target.free_blocks

    def _needs(self, one: Running, target: Standing) -> int:
        tokens = one.prompt_tokens + one.output_tokens
        return blocks_for(tokens, target.load.block_tokens) + self.settings.growth_blocks

    def _spares(self, one: Running, target: Standing) -> bool:
        """Whether newcomers would still find their share there."""
        left = target.free_blocks - self._needs(one, target)
        return left >= self.settings.newcomer_share * target.load.total_blocks

    def _relaxed(self, target: Standing) -> bool:
        return target.name not in self._pressed and target.freeness > self.settings.high_steps

    def _within_limits(self, source: Standing, target: Standing, *, draining: bool) -> bool:
        most = self.settings
        if draining:
            return max(source.leaving, target.arriving) < most.drain_moves
        between = self._recent.between(source.name, target.name)
        return (
            source.leaving < most.outgoing_moves
            and target.arriving < most.incoming_moves
            and between < most.link_moves
        )

    def _has_urgent(self, standing: Standing) -> bool:
        return any(_urgent(one, self.settings) for one in standing.here.values())

    def _move(
        self, one: Running, source: Standing, target: Standing, reason: str, now: float
    ) -> Move:
        move = Move(one.request_id, source.name, target.name, reason)
        blocks = self._needs(one, target)
        self._recent.began(one, source.name, target.name, blocks, now)
        del source.here[one.request_id]
        source.virtual_blocks -= one.blocks + _missing(one, source.load)
        if not _waits_without_kv(one):
            source.batch = max(source.batch - 1, 0)
        source.leaving += 1
        target.here[one.request_id] = one
        target.free_blocks -= blocks
        target.virtual_blocks += blocks
        target.batch += 1
        target.arriving += 1
        return move


def _runs(one: Running) -> bool:
    """Decodes: a prompt that is being computed cannot move."""
    return one.state == SequenceState.RUNNING.value and one.output_tokens > 0


def _waits_without_kv(one: Running) -> bool:
    return one.state == SequenceState.WAITING.value and one.blocks == 0


def _is_new(one: Running) -> bool:
    """Nothing of it has been computed or drawn: wherever it goes it begins alike."""
    return _waits_without_kv(one) and one.output_tokens == 0


def _gave_way(one: Running) -> bool:
    """It is let in before anything new."""
    displaced = one.state in (SequenceState.WAITING.value, SequenceState.SWAPPED.value)
    return displaced and one.blocks == 0 and one.output_tokens > 0


def _missing(one: Running, load: Load) -> int:
    """Blocks that a sequence waits for."""
    if one.state not in QUEUED:
        return 0
    wanted = blocks_for(one.prompt_tokens + one.output_tokens, load.block_tokens)
    return max(wanted - one.blocks, 0)


def _urgent(one: Running, settings: BalancerSettings) -> bool:
    return one.priority >= settings.urgent_priority


def _smallest(one: Running) -> tuple[int, int, str]:
    return one.priority, one.blocks, one.request_id


def _least_urgent(sequences: Iterable[Running]) -> list[Running]:
    return sorted(sequences, key=_smallest)
