"""Live migrations in virtual time: rounds of copying while the source decodes, then a pause."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from engine.messages import InstanceState
from engine.request import SequenceState

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.request import Sequence
    from placement.balancing.balancer import Move
    from placement.simulation.deployment import Deployment
    from placement.simulation.dynamics import Dynamics, FleetRecord
    from placement.simulation.instance import SimulatedInstance


class World(Protocol):
    instances: dict[str, SimulatedInstance]
    record: FleetRecord

    def in_company(self, seconds: float) -> float: ...
    def at(self, time_s: float, action: Callable[[Any, float], None], subject: Any) -> None: ...
    def moved(self, request_id: str, *, committed: bool) -> None: ...
    def lost(self, sequence: Sequence, now: float) -> None: ...
    def replay(self, sequence: Sequence, now: float) -> None: ...


@dataclass(slots=True, eq=False)
class Migration:
    request_id: str
    source: SimulatedInstance
    target: SimulatedInstance
    blocks: list[int] = field(default_factory=list)
    """At the target."""
    copied_tokens: int = 0
    coming_tokens: int = 0
    """Copied once the round under way ends."""
    rounds: int = 0
    sealed: Sequence | None = None
    """Taken off the source, and not yet on the target."""
    sealed_s: float = 0.0


class Migrations:
    def __init__(self, world: World, deployment: Deployment, dynamics: Dynamics) -> None:
        self._world, self._deployment, self._dynamics = world, deployment, dynamics
        self._under_way: dict[str, Migration] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def ask(self, move: Move, now: float) -> None:
        """Begin a move that the balancer proposes; what waits without KV moves without a copy."""
        source = self._world.instances.get(move.source)
        target = self._world.instances.get(move.target)
        known = move.request_id in self._under_way
        if source is None or target is None or known:
            self._world.moved(move.request_id, committed=False)
            return
        migration = Migration(move.request_id, source, target)
        self._under_way[move.request_id] = migration
        target.between_steps(partial(self._reserve, migration), now)

    def instance_lost(self, gone: SimulatedInstance, now: float) -> None:
        """The other side goes on by itself, or the request is answered anew."""
        for migration in list(self._under_way.values()):
            if gone not in (migration.source, migration.target):
                continue
            if gone is migration.source:
                migration.target.pool.unreserve(migration.blocks)
            self._end(migration, committed=False)
            if migration.sealed is not None and gone is migration.source:
                self._world.lost(migration.sealed, now)
            elif migration.sealed is not None:
                migration.source.join(migration.sealed, now, fresh=False)

    def _reserve(self, migration: Migration, now: float) -> None:
        sequence = self._still_there(migration, now)
        if sequence is None:
            return
        if not sequence.blocks:  # What waits without KV is answered anew.
            migration.source.between_steps(partial(self._send_on, migration), now)
            return
        target, growth = migration.target, self._dynamics.balancer.growth_blocks
        blocks = self._deployment.blocks_for(len(sequence.tokens)) + growth
        open_ = target.state is InstanceState.READY and target.role.decodes
        if not (open_ and target.has_room(blocks, now)):
            self._end(migration, committed=False)
            return
        migration.blocks = target.pool.reserve(blocks)
        target.inbox.migrating[migration.request_id] = sequence, blocks
        self._copy(migration, sequence, now)

    def _send_on(self, migration: Migration, now: float) -> None:
        sequence = self._still_there(migration, now)
        if sequence is None:
            return
        if sequence.blocks:
            self._end(migration, committed=False)
            return
        self._end(migration, committed=True)
        migration.source.withdraw(migration.request_id)
        self._world.replay(sequence, now)

    def _copy(self, migration: Migration, sequence: Sequence, now: float) -> None:
        migration.rounds += 1
        migration.coming_tokens = sequence.computed
        tokens = sequence.computed - migration.copied_tokens
        self._world.at(self._copied_s(migration, tokens, now), self._round_ended, migration)

    def _copied_s(self, migration: Migration, tokens: int, now: float) -> float:
        """When so many tokens have crossed links that others use too."""
        source, target = migration.source, migration.target
        copy_s = self._deployment.copy_s(source.model, target.model, tokens)
        end_s = max(now, source.egress_free_s, target.ingress_free_s) + copy_s
        source.egress_free_s = target.ingress_free_s = end_s
        return end_s

    def _round_ended(self, migration: Migration, now: float) -> None:
        sequence = self._still_there(migration, now)
        if sequence is None:
            return
        migration.copied_tokens = migration.coming_tokens
        source, target = migration.source, migration.target
        left = sequence.computed - migration.copied_tokens
        pause_s = self._deployment.copy_s(source.model, target.model, left)
        last = migration.rounds >= self._dynamics.most_rounds
        if pause_s > self._dynamics.pause_budget_s and not last:
            self._copy(migration, sequence, now)
        else:
            source.between_steps(partial(self._seal, migration), now)

    def _seal(self, migration: Migration, now: float) -> None:
        if self._still_there(migration, now) is None:
            return
        sequence = migration.sealed = migration.source.withdraw(migration.request_id)
        migration.sealed_s = now
        end_s = self._copied_s(migration, sequence.computed - migration.copied_tokens, now)
        messages_s = self._world.in_company(self._deployment.overheads.handoff_s)
        self._world.at(end_s + messages_s, self._commit, migration)

    def _commit(self, migration: Migration, now: float) -> None:
        if self._under_way.get(migration.request_id) is not migration:
            return
        sequence, source, target = migration.sealed, migration.source, migration.target
        assert sequence is not None
        self._end(migration, committed=True)
        self._world.record.pauses_s.append(now - migration.sealed_s)
        source.pool.release(sequence.blocks)
        target.pool.claim(migration.blocks)
        needed = self._deployment.blocks_for(len(sequence.tokens))
        target.pool.release(migration.blocks[needed:])
        sequence.blocks = migration.blocks[:needed]
        sequence.epoch += 1
        target.join(sequence, now, fresh=False)
        source.nudge(now)

    def _still_there(self, migration: Migration, now: float) -> Sequence | None:
        """The sequence, if it still decodes at the source as it did; else the move is over."""
        if self._under_way.get(migration.request_id) is not migration:
            return None
        sequence = migration.source.find(migration.request_id)
        if sequence is not None and _as_before(sequence, migration):
            return sequence
        self._end(migration, committed=False)
        migration.target.pool.unreserve(migration.blocks)
        migration.target.nudge(now)
        return None

    def _end(self, migration: Migration, *, committed: bool) -> None:
        del self._under_way[migration.request_id]
        migration.target.inbox.migrating.pop(migration.request_id, None)
        record = self._world.record
        record.migrations += committed
        record.failed_migrations += not committed
        self._world.moved(migration.request_id, committed=committed)


def _as_before(sequence: Sequence, migration: Migration) -> bool:
    """Not since preempted; what waits without KV has nothing to lose."""
    if not migration.blocks and not sequence.blocks:
        return True
    running = sequence.state is SequenceState.RUNNING
    return running and sequence.computed >= migration.copied_tokens
