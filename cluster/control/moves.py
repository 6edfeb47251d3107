"""The moves whose end an operator waits for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from engine.errors import (
    BadRequest,
    DeadlineExceeded,
    NotFound,
    StaleEpoch,
    TransferError,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Callable

COMMITTED = "committed"
REPLAYED = "replayed"
REASONS = {
    REPLAYED: "it is computed anew elsewhere",
    StaleEpoch.__name__: "it has ended",
    Unsupported.__name__: "it is being prefilled, or moves already",
}
"""What outcomes mean whose names do not say it."""


class Moves:
    def __init__(self) -> None:
        self._ends: dict[tuple[str, str], asyncio.Future[str]] = {}
        """By request and target."""

    async def over(
        self, request_id: str, target: str, ask: Callable[[], None], within_s: float
    ) -> None:
        """Asks, and returns once the request runs at its target; raises why it does not."""
        key = request_id, target
        if key in self._ends:
            raise BadRequest("request", request_id, f"is on its way to {target} already")
        end = self._ends[key] = asyncio.get_running_loop().create_future()
        try:
            ask()
            async with asyncio.timeout(within_s):
                outcome = await end
        except TimeoutError:
            late = f"{request_id} is not known to be at {target} after {within_s:g} s"
            raise DeadlineExceeded(late) from None
        finally:
            del self._ends[key]
        _check(request_id, target, outcome)

    def ended(self, request_id: str, target: str, outcome: str) -> None:
        end = self._ends.get((request_id, target))
        if end is not None and not end.done():
            end.set_result(outcome)

    def replayed(self, request_id: str) -> None:
        """Its instance has let go of it, or is gone, and nobody tells of the move any more."""
        for moved, target in self._ends:
            if moved == request_id:
                self.ended(moved, target, REPLAYED)


def _check(request_id: str, target: str, outcome: str) -> None:
    if outcome == NotFound.__name__:
        raise NotFound(f"no instance runs {request_id} any more")
    if outcome != COMMITTED:
        why = REASONS.get(outcome, outcome)
        raise TransferError(f"{request_id} has not moved to {target}: {why}")
