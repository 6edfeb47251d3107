"""Which share of the requests that ended lately met their targets."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.watching.observer import Ended, Opened, Rerouted
    from engine.messages import Load, Migrated


class SloWindow:
    """An observer; a request that failed or was refused did not meet them."""

    def __init__(self, window_s: float = 300.0, kept: int = 100_000) -> None:
        self.window_s = window_s
        self._met: deque[tuple[float, bool]] = deque(maxlen=kept)

    def attainment(self, now: float) -> float | None:
        """None while nothing has ended within the window."""
        met, ended = self.attained(now)
        return met / ended if ended else None

    def attained(self, now: float) -> tuple[int, int]:
        """How many met them, and how many ended."""
        while self._met and now - self._met[0][0] > self.window_s:
            self._met.popleft()
        return sum(met for _, met in self._met), len(self._met)

    def ended(self, event: Ended) -> None:
        if event.outcome == "abort":
            return
        timeline = event.timeline
        self._met.append((timeline.finished_s or timeline.arrived_s, event.met_targets))

    def opened(self, event: Opened) -> None: ...

    def streamed(self, gaps_s: Sequence[float]) -> None: ...

    def rerouted(self, event: Rerouted) -> None: ...

    def migrated(self, event: Migrated, at_s: float) -> None: ...

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None: ...

    def loaded(self, load: Load, at_s: float) -> None: ...

    def lost(self, instance: str, at_s: float) -> None: ...
