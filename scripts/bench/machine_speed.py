"""How fast this machine is meanwhile: others on its host slow it down by half at times."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE_S = 0.25
ROUNDS = 80_000


class Speed:
    """Processor time of the same little work, again and again."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def probe(self) -> None:
        began_s = time.thread_time()
        total = 0
        for number in range(ROUNDS):
            total += number
        self._seconds.append(time.thread_time() - began_s)

    @property
    def undisturbed_s(self) -> float:
        """The lower quartile, as a profile takes of its passes."""
        return statistics.quantiles(self._seconds, method="inclusive")[0]

    @property
    def mean_s(self) -> float:
        return statistics.fmean(self._seconds)


@contextmanager
def watched() -> Iterator[Speed]:
    """Looks from time to time until the end of the context."""
    speed, over = Speed(), threading.Event()

    def look() -> None:
        speed.probe()
        while not over.wait(PAUSE_S):
            speed.probe()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield speed
    finally:
        over.set()
        thread.join()
