"""Hand-offs in virtual time: room first, then a copy over links that others use too."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.request import start_sequence
from placement.simulation.listing import coming

if TYPE_CHECKING:
    from engine.messages import Running
    from engine.request import Sequence
    from placement.simulation.deployment import Deployment
    from placement.simulation.instance import SimulatedInstance
    from placement.simulation.world import World


@dataclass(slots=True, eq=False)
class Handoff:
    """KV on its way from where it was prefilled to where it will be decoded."""

    sequence: Sequence
    source: SimulatedInstance
    target: SimulatedInstance
    prefill_started_s: float
    computed_s: float
    tail_share: float
    """The part of the copy that cannot start before the prefill ends."""
    blocks: list[int] = field(default_factory=list)
    """At the target."""


class Inbox:
    """A target's offers: first come, first served, as there is room."""

    def __init__(self, target: SimulatedInstance, deployment: Deployment, world: World) -> None:
        self._target = target
        self._deployment = deployment
        self._world = world
        self._offers: deque[Handoff] = deque()
        self._coming: dict[str, Handoff] = {}
        self.migrating: dict[str, tuple[Sequence, int]] = {}
        """What moves here live, with the blocks set aside for it."""

    def __len__(self) -> int:
        return len(self._offers) + len(self._coming) + len(self.migrating)

    @property
    def waits(self) -> bool:
        return bool(self._offers)

    @property
    def listed(self) -> tuple[Running, ...]:
        handoffs = [*self._coming.values(), *self._offers]
        arriving = [(one.sequence, len(one.blocks)) for one in handoffs]
        return tuple([coming(*one) for one in [*self.migrating.values(), *arriving]])

    def add(self, handoff: Handoff, now: float) -> None:
        self._offers.append(handoff)
        self.take(now)

    def take(self, now: float) -> None:
        """Reserve room for offers and pull them, as far as the room goes."""
        pool = self._target.pool
        while self._offers:
            blocks = self._deployment.blocks_for(len(self._offers[0].sequence.tokens))
            if blocks > pool.total_blocks:
                self._refuse(self._offers.popleft(), now)
                continue
            if not self._target.has_room(blocks, now):
                return
            handoff = self._offers.popleft()
            handoff.blocks = pool.reserve(blocks)
            self._coming[handoff.sequence.id] = handoff
            self._pull(handoff, now)

    def forget(self, handoff: Handoff) -> None:
        """Its source is gone."""
        if self._coming.pop(handoff.sequence.id, None) is not None:
            self._target.pool.unreserve(handoff.blocks)
        else:
            self._offers.remove(handoff)

    def abandon(self, now: float) -> None:
        """The target is gone: the sources go on by themselves."""
        left = [*self._coming.values(), *self._offers]
        self._coming.clear()
        self._offers.clear()
        for handoff in left:
            handoff.source.keep(handoff, now)

    def _refuse(self, handoff: Handoff, now: float) -> None:
        self._world.failed(handoff.sequence.id)
        handoff.source.freed(handoff, now)

    def _pull(self, handoff: Handoff, now: float) -> None:
        """Layers computed early crossed while the links were free; the rest crosses now."""
        source, target = handoff.source, self._target
        tokens = len(handoff.sequence.tokens) - 1
        copy_s = self._deployment.copy_s(source.model, target.model, tokens)
        free_s = max(source.egress_free_s, target.ingress_free_s)
        idle_s = max(0.0, handoff.computed_s - max(free_s, handoff.prefill_started_s))
        hidden_s = min(idle_s, copy_s * (1 - handoff.tail_share))
        end_s = max(now, free_s) + copy_s - hidden_s
        source.egress_free_s = target.ingress_free_s = end_s
        messages_s = self._world.in_company(self._deployment.overheads.handoff_s)
        self._world.at(end_s + messages_s, self._commit, handoff)

    def _commit(self, handoff: Handoff, now: float) -> None:
        """The target owns a copy and goes on with it; the source lets go."""
        request = handoff.sequence.request
        if self._coming.get(request.id) is not handoff:
            return
        del self._coming[request.id]
        self._world.moment("transferred_s", request.id, now)
        output = tuple(handoff.sequence.output)
        sequence = start_sequence(request, handoff.sequence.epoch + 1, output)
        self._target.pool.claim(handoff.blocks)
        sequence.blocks = handoff.blocks
        sequence.computed = len(sequence.tokens) - 1
        handoff.source.freed(handoff, now)
        self._target.join(sequence, now)
