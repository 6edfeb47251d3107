"""How fast this machine is while something else goes on, as a small process sees it.

What else runs on a virtual machine's host slows its processors down, each for a tenth of a second
or so at a time, and code of one kind more than that of another. So does what runs on the machine
itself, which is no news of the host: readings are compared with those in like company. What is read
are passes of the model itself, since code that calls many small operations is slowed by other
things than one large product or a short loop: those vary by less, and at other times. Only
processor time counts, and every reading comes after a while of the same computing: a processor that
has slept is slow at first, and caches hold what others left there.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from cluster.profiling.one_rank import Rank, RankSettings
from cluster.profiling.passes import Pass
from engine.errors import InstanceLost
from placement.latency.machine import WINDOW_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

PERIOD_S = 0.2
LARGEST_SHARE = 0.08
"""Of a processor that readings take: slow ones come less often."""
WAKE_S = 0.02
"""Of computing before all that is read: a processor that has slept is slow for that long, however
fast the machine is, and what is read at once shows half of what the machine's speed does."""
WARM_S = 0.002
"""Of the same computing before each reading."""
MOST_COMPANY = 2
"""Processes beside which it makes no difference how many more there are."""
ENOUGH = 40
"""Readings that are compared: those in the least company."""
PACES = 12
DECODE, PROMPT = Pass(contexts=(64,)), Pass(((32, 0),))
KV_BYTES = 16 << 20
"""Of the pool: more than these need."""
SMALL_MODEL = "demo"
START_S, ENDING_S = 600.0, 10.0

CODE = ("decodes", "prompts", "small")
"""Kinds that are read: a pass of the model that decodes one sequence, one of a short prompt, and a
decode of the built-in model, whose operations are so small that most of it is what calls them."""
PASSES = {"seconds", "processor_s"}
"""So a profile names the times of passes; they are of prompts where an entry counts some."""
AROUND_PASSES = {"waited_s", "then_s", "way_s", "handoff_s"}
"""And so the times of what is no large operation."""


class Reading(NamedTuple):
    at_s: float
    company: int
    """How many others ran on this machine, at two looks together."""
    seconds: tuple[float, ...]
    """By the kind of code."""


@dataclass(frozen=True, slots=True)
class Company:
    """The readings in like company, by their mean."""

    company: int
    count: int
    means_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Speed:
    readings: tuple[Company, ...]
    paces: tuple[float, ...]
    """How many times as long as on average things took in a window: its quantiles."""

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """As a profile has it."""
        readings = [
            Company(one["company"], one["count"], tuple(one["means_s"]))
            for one in described["readings"]
        ]
        return cls(tuple(readings), tuple(described["paces"]))

    def described(self) -> dict[str, Any]:
        """For a profile: as JSON gives it back."""
        readings = [{**asdict(one), "means_s": list(one.means_s)} for one in self.readings]
        return {"readings": readings, "paces": list(self.paces)}

    def slower_than(self, other: Speed) -> dict[str, float]:
        """How many times as long as then, by the kind of code; over all readings if none were in
        like company."""
        then = {one.company: one for one in other.readings}
        pairs = [(one, then[one.company]) for one in self.readings if one.company in then]
        counts = np.cumsum([min(one.count, before.count) for one, before in pairs])
        pairs = pairs[: int(np.searchsorted(counts, ENOUGH)) + 1]
        if not pairs:
            pairs = [(one, before) for one in self.readings for before in other.readings]
        weights = [min(one.count, before.count) for one, before in pairs]
        times = [np.divide(one.means_s, before.means_s) for one, before in pairs]
        return dict(zip(CODE, np.average(times, axis=0, weights=weights).tolist(), strict=True))


class SpeedProbe:
    """A process that takes a reading every now and then, until the end of the context."""

    def __init__(self, settings: RankSettings) -> None:
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_take_readings, args=(there, settings), daemon=True)

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
    passes = times["prompts" if value.get("prompts") else "decodes"]
    longer = dict.fromkeys(PASSES, passes) | dict.fromkeys(AROUND_PASSES, times["small"])
    return {
        name: one * longer[name] if name in longer else lengthened(one, times)
        for name, one in value.items()
    }


def speed_of(readings: Sequence[Reading]) -> Speed:
    at_s = np.array([one.at_s for one in readings])
    company = np.array([one.company for one in readings])
    seconds = np.array([one.seconds for one in readings])
    pace, seen = np.zeros(len(readings)), []
    for kind in np.unique(company):
        alike = company == kind
        means = seconds[alike].mean(axis=0)
        pace[alike] = (seconds[alike] / means).mean(axis=1)
        seen.append(Company(int(kind), int(alike.sum()), tuple(means.tolist())))
    windows = ((at_s - at_s[0]) // WINDOW_S).astype(int)
    each = [pace[windows == window].mean() for window in np.unique(windows)]
    paces = np.quantile(each, (np.arange(PACES) + 0.5) / PACES)
    return Speed(tuple(seen), tuple((paces / paces.mean()).tolist()))


def _take_readings(connection: Connection, settings: RankSettings) -> None:
    works = _works(settings)
    readings: list[Reading] = []
    pause_s = PERIOD_S
    while True:
        asked = connection.poll(pause_s)
        if not asked or not readings:
            began_s = time.process_time()
            readings.append(_read(works))
            pause_s = max(PERIOD_S, (time.process_time() - began_s) / LARGEST_SHARE)
        if asked:
            connection.recv()
            connection.send(readings)
            readings = []


def _works(settings: RankSettings) -> list[Callable[[], float]]:
    """By the kind of code."""
    timer = Rank(settings, most_kv_bytes=KV_BYTES).timer
    decode = small = partial(timer.once, DECODE)
    if settings.model != SMALL_MODEL:
        other = Rank(replace(settings, model=SMALL_MODEL), most_kv_bytes=KV_BYTES)
        small = partial(other.timer.once, DECODE)
    return [decode, partial(timer.once, PROMPT), small]


def _read(works: Sequence[Callable[[], float]]) -> Reading:
    _compute(works[0], WAKE_S)
    at_s, others = time.monotonic(), _running_beside()
    seconds = {work: _warmed(work) for work in works}
    return Reading(at_s, others + _running_beside(), tuple(seconds[work] for work in works))


def _running_beside() -> int:
    """How many but this process run, or could, at this moment."""
    able, _, _ = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")
    return min(int(able) - 1, MOST_COMPANY)


def _warmed(work: Callable[[], float]) -> float:
    _compute(work, WARM_S)
    return work()


def _compute(work: Callable[[], float], for_s: float) -> None:
    while for_s > 0.0:
        for_s -= work()
