"""How fast this machine is while something else goes on, as a small process sees it.

What else runs on a virtual machine's host slows its processors down, each for a tenth of a second
or so at a time, and code of one kind more than that of another. Only processor time counts, and
every reading comes after a while of computing, as a processor that has slept is slow at first: so
that readings tell of the host more than of how busy the machine is.
"""

from __future__ import annotations

import time
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from engine.errors import InstanceLost
from placement.latency.machine import WINDOW_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

PERIOD_S = 0.2
WARM_S = 0.005
"""Of computing before a reading."""
REPEATS = 4
PACES = 12
ROWS, WIDTH = 4, 1024
NUMBERS = 2000
START_S, ENDING_S = 60.0, 10.0


KINDS = {
    "seconds": "product",
    "processor_s": "product",
    "waited_s": "python",
    "then_s": "python",
    "way_s": "python",
    "handoff_s": "python",
}
"""Of code, on which it depends how long takes what has this name in a profile."""


class Reading(NamedTuple):
    at_s: float
    product_s: float
    """Of a product that reads as much as a layer."""
    python_s: float
    """Of a loop in Python."""


class Speed(NamedTuple):
    product_s: float
    python_s: float
    paces: tuple[float, ...]
    """How many times as long as on average things took in a window: its quantiles."""

    def slower_than(self, other: Speed) -> dict[str, float]:
        """How many times as long as then, by the kind of code."""
        return {
            "product": self.product_s / other.product_s,
            "python": self.python_s / other.python_s,
        }

    def described(self) -> dict[str, Any]:
        """As a profile has it."""
        return {**self._asdict(), "paces": list(self.paces)}


class SpeedProbe:
    """A process that takes a reading every now and then, until the end of the context."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_take_readings, args=(there,), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self.readings()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join(ENDING_S)
        self._here.close()

    def readings(self) -> list[Reading]:
        """Since they were last asked for; one at least."""
        try:
            self._here.send(None)
            if self._here.poll(START_S):
                found: list[Reading] = self._here.recv()
                return found
        except (EOFError, BrokenPipeError):
            pass
        raise InstanceLost("the process that reads this machine's speed has ended")


def lengthened(value: Any, times: Mapping[str, float]) -> Any:
    """A profile, or a part of it, as of a machine that takes so many times as long by kind."""
    if isinstance(value, list):
        return [lengthened(one, times) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: one * times[KINDS[name]] if name in KINDS else lengthened(one, times)
        for name, one in value.items()
    }


def speed_of(readings: Sequence[Reading]) -> Speed:
    at_s, products_s, pythons_s = np.array(readings).T
    product_s, python_s = float(products_s.mean()), float(pythons_s.mean())
    pace = (products_s / product_s + pythons_s / python_s) / 2
    windows = ((at_s - at_s[0]) // WINDOW_S).astype(int)
    each = [pace[windows == window].mean() for window in np.unique(windows)]
    paces = np.quantile(each, (np.arange(PACES) + 0.5) / PACES)
    return Speed(product_s, python_s, tuple((paces / paces.mean()).tolist()))


def _take_readings(connection: Connection) -> None:
    torch.set_num_threads(1)
    left, right = torch.ones(ROWS, WIDTH), torch.ones(WIDTH, WIDTH)

    def product() -> None:
        torch.mm(left, right)

    def python() -> None:
        sum(number * number for number in range(NUMBERS))

    readings: list[Reading] = []
    while True:
        asked = connection.poll(PERIOD_S)
        if not asked or not readings:
            _warm_up(product, python)
            readings.append(Reading(time.monotonic(), _timed(product), _timed(python)))
        if asked:
            connection.recv()
            connection.send(readings)
            readings = []


def _warm_up(*works: Callable[[], None]) -> None:
    began_s = time.thread_time()
    while time.thread_time() - began_s < WARM_S:
        for work in works:
            work()


def _timed(work: Callable[[], None]) -> float:
    began_s = time.thread_time()
    for _ in range(REPEATS):
        work()
    return (time.thread_time() - began_s) / REPEATS
