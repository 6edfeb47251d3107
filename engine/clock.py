"""The only place that reads the time; deciders are handed `now`."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float: ...


class SystemClock:
    """Seconds since the epoch: comparable between the processes of one cluster."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Never steps backwards within a process, whatever happens to the wall clock."""
        return self._offset + time.monotonic()


class VirtualClock:
    """Time that moves only when told to; tests and simulations run on it."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance_to(self, now: float) -> None:
        assert now >= self._now, f"time runs forward: {now} < {self._now}"
        self._now = now
