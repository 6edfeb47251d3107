"""Tells the controller's event log what a gateway sees of migrations, failovers and hand-offs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.watching.observer import Ended, Opened, Rerouted
    from engine.messages import Load, Migrated

log = logging.getLogger(__name__)


class Reporter:
    """An observer; telling is one Ray call without an answer, and only for what is rare."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    def migrated(self, event: Migrated, at_s: float) -> None:  # noqa: ARG002
        self.tell(
            "migration",
            event.request_id,
            event.outcome,
            source=event.source,
            target=event.target,
            reason=event.reason,
            pause_s=f"{event.pause_s:.4f}",
            total_s=f"{event.total_s:.4f}",
            kv_bytes=event.kv_bytes,
        )

    def rerouted(self, event: Rerouted) -> None:
        self.tell(
            "request",
            event.request_id,
            event.outcome,
            prefill=event.prefill,
            decode=event.decode or event.prefill,
            why=event.why,
        )

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None:  # noqa: ARG002
        self.tell("transfer", request_id, "hand-off failed", reason=reason)

    def opened(self, event: Opened) -> None: ...

    def streamed(self, gaps_s: Sequence[float]) -> None: ...

    def ended(self, event: Ended) -> None: ...

    def loaded(self, load: Load, at_s: float) -> None: ...

    def lost(self, instance: str, at_s: float) -> None: ...

    def tell(self, kind: str, subject: str, text: str, **fields: object) -> None:
        self._controller.note.remote(kind, subject, text, fields)
