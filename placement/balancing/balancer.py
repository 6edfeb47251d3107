"""Which running requests should move where: a decider over the view, that only proposes.

An instance's *freeness* is how many decode steps its batch can take before its blocks run out,
counted with virtual usage: what waits for room counts as if it were there, an urgent request
counts with the headroom it should find, and a draining instance counts as full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.messages import InstanceState
from placement.balancing.recent_moves import RecentMoves
from placement.balancing.settings import BalancerSettings
from placement.balancing.standing import (
    Standing,
    gave_way,
    is_new,
    is_urgent,
    least_urgent_first,
    missing_blocks,
    runs,
    smallest_first,
    virtual_blocks,
    waits_without_kv,
)

if TYPE_CHECKING:
    from engine.messages import Load, Running
    from placement.view import View


@dataclass(frozen=True, slots=True)
class Move:
    request_id: str
    source: str
    target: str
    reason: str
    """drain, role, outgrow, room, defragment, isolate or balance."""


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
            for one in least_urgent_first(source.here.values()):
                if not runs(one) and not (draining and waits_without_kv(one)):
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
            if not runs(one) or self._room_left(one, source) >= self.settings.low_steps:
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
            if not is_new(one) or self._room_for(one, source):
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
                min(fitting, key=lambda choice: smallest_first(choice[0]))
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
            and not any(gave_way(other) for other in target.here.values())
            and self._within_limits(source, target, draining=False)
            and self._steps_left(one, target) >= self.settings.hole_steps
        ]
        return max(targets, key=lambda target: self._steps_left(one, target), default=None)

    def _steps_left(self, one: Running, target: Standing) -> float:
        left = target.free_blocks - self._needs(one, target)
        return left * target.load.block_tokens / (target.batch + 1)

    def _isolate(self, source: Standing, standings: list[Standing], now: float) -> list[Move]:
        """Gives the urgent on an instance their headroom, by moving others away."""
        urgent = [one for one in source.here.values() if is_urgent(one, self.settings)]
        moves: list[Move] = []
        if not source.open or not urgent:
            return moves
        missing = self.settings.headroom_blocks - source.free_blocks
        missing -= self._recent.leaving_blocks(source.name)
        for one in self._movable(source, now):
            if missing <= 0 or is_urgent(one, self.settings):
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
        running = [one for one in source.here.values() if runs(one)]
        return [one for one in least_urgent_first(running) if self._recent.may_move(one, now)]

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
        return any(is_urgent(one, self.settings) for one in standing.here.values())

    def _move(
        self, one: Running, source: Standing, target: Standing, reason: str, now: float
    ) -> Move:
        move = Move(one.request_id, source.name, target.name, reason)
        blocks = self._needs(one, target)
        self._recent.began(one, source.name, target.name, blocks, now)
        del source.here[one.request_id]
        source.virtual_blocks -= one.blocks + missing_blocks(one, source.load)
        if not waits_without_kv(one):
            source.batch = max(source.batch - 1, 0)
        source.leaving += 1
        target.here[one.request_id] = one
        target.free_blocks -= blocks
        target.virtual_blocks += blocks
        target.batch += 1
        target.arriving += 1
        return move
