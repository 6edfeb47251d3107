"""How fast this machine is meanwhile: others on its host slow it down by half at times."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE_S = 0.25
ROUNDS = 80_000
LEAST_LEFT = 0.1


class Speed:
    """Processor time of the same little work, again and again."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._before = self._after = machine_ticks()

    def probe(self) -> None:
        began_s = time.thread_time()
        total = 0
        for number in range(ROUNDS):
            total += number
        self._seconds.append(time.thread_time() - began_s)
        self._after = machine_ticks()

    @property
    def undisturbed_s(self) -> float:
        """The lower quartile, as a profile takes of its passes; of these no time is stolen."""
        return statistics.quantiles(self._seconds, method="inclusive")[0]

    @property
    def stolen(self) -> float:
        """Part of the time in which this machine had something to do, and its host did not."""
        busy, stolen = (
            after - before for before, after in zip(self._before, self._after, strict=True)
        )
        return stolen / max(busy + stolen, 1)

    @property
    def mean_s(self) -> float:
        """Until it was done, stolen time and all."""
        return statistics.fmean(self._seconds) / max(1.0 - self.stolen, LEAST_LEFT)


def machine_ticks() -> tuple[int, int]:
    """That were spent on this machine's work, and that its host kept from it."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, soft_irq, stolen, *_ = map(int, fields)
    return user + nice + system + irq + soft_irq, stolen


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
