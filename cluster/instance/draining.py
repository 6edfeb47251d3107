"""When an instance that drains may go: pure, driven by its leader and by the controller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.messages import Load


@dataclass(slots=True)
class Emptying:
    """Over once nothing has been there for a while: what was sent before everyone had heard of
    the drain is still on its way here."""

    settle_s: float
    _empty_since_s: float | None = None

    def is_over(self, load: Load, now: float) -> bool:
        """`load` lists also what only arrives; blocks stay pinned while somebody reads them."""
        if load.sequences or load.pinned_blocks:
            self._empty_since_s = None
            return False
        if self._empty_since_s is None:
            self._empty_since_s = now
        return now - self._empty_since_s >= self.settle_s


def is_awaited(name: str, loads: Iterable[Load]) -> bool:
    """Whether others have requests that they are to hand to this instance, which may not even have
    been offered to it: their prompts wait, or are being computed."""
    return any(running.target == name for load in loads for running in load.sequences)
