"""The controller's loop that asks instances to move requests, as the balancer decides."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from engine.errors import InstanceLost
from engine.messages import Migrate
from placement.balancing.pace_balancer import balancer_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.config import MigrationConfig
    from engine.messages import Message
    from placement.balancing.balancer import Move
    from placement.view import View

    Send = Callable[[str, Message], None]

log = logging.getLogger(__name__)


class Note(Protocol):
    def __call__(self, kind: str, subject: str, text: str, **fields: object) -> None: ...


class Balancing:
    """Drains always move; anything else only where the config lets the balancer."""

    def __init__(
        self, config: MigrationConfig, view: Callable[[], View], send: Send, note: Note
    ) -> None:
        self._config, self._view, self._send, self._note = config, view, send, note
        self._balancer = balancer_for(config.balancer)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval_s)
            self.look()

    def look(self) -> None:
        """One round over the cluster as it is now."""
        self._ask(self._balancer.decide(self._view(), drain_only=not self._config.enabled))

    def empty(self) -> None:
        """Goes on emptying what drains, as soon as there is news of it."""
        self._ask(self._balancer.decide(self._view(), drain_only=True))

    def ended(self, request_id: str, outcome: str) -> None:
        """A gateway has seen how a move ended."""
        if outcome != "committed":
            self._balancer.failed(request_id)

    def _ask(self, moves: tuple[Move, ...]) -> None:
        for move in moves:
            try:
                self._send(move.source, Migrate(move.request_id, move.target, move.reason))
            except InstanceLost as lost:
                log.warning("move not asked request=%s reason=%s", move.request_id, lost)
                self._balancer.failed(move.request_id)
                continue
            self._note(
                "migration",
                move.request_id,
                "asked",
                source=move.source,
                target=move.target,
                reason=move.reason,
            )
