"""Processes of this machine that are no part of what is measured: they make it slower unseen."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

DISTURBING_CORES = 0.1
"""More than what a quiet machine does beside, and enough to make passes wait."""
PROC = Path("/proc")


class Disturbed(Protocol):
    @property
    def others(self) -> float:
        """Cores that other processes took meanwhile."""
        ...


Result = TypeVar("Result", bound=Disturbed)


def least_disturbed(work: Callable[[], Result], most_tries: int) -> Result:
    """What came of it; again while others take too much."""
    tries = [work()]
    while tries[-1].others > DISTURBING_CORES and len(tries) < most_tries:
        tries.append(work())
    return min(tries, key=lambda one: one.others)


class OtherProcesses:
    """All but this one and what it began, from now on."""

    def __init__(self, now: Callable[[], float] = time.monotonic, proc: Path = PROC) -> None:
        self._now, self._proc = now, proc
        self._began_s, self._before_s = now(), self._taken_s()

    @property
    def cores(self) -> float:
        """That they took in the mean."""
        return max(self._taken_s() - self._before_s, 0.0) / (self._now() - self._began_s)

    def _taken_s(self) -> float:
        """Processor time of this machine that went neither to this process nor to what it began."""
        ticks = os.sysconf("SC_CLK_TCK")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = sum(self._ticks_of(one) for one in self._family(os.getpid())) / ticks
        return self._busy_ticks() / ticks - own_s - ended.ru_utime - ended.ru_stime

    def _busy_ticks(self) -> int:
        """That this machine has worked."""
        fields = (self._proc / "stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, soft_irq, *_ = map(int, fields)
        return user + nice + system + irq + soft_irq

    def _family(self, first: int) -> list[int]:
        """A process and all that descend from it."""
        children: dict[int, list[int]] = {}
        for path in self._proc.glob("[0-9]*/stat"):
            fields = _stat_fields(path)
            if fields:
                children.setdefault(int(fields[1]), []).append(int(path.parent.name))
        found = [first]
        for one in found:
            found += children.get(one, [])
        return found

    def _ticks_of(self, process: int) -> int:
        fields = _stat_fields(self._proc / str(process) / "stat")
        return int(fields[11]) + int(fields[12]) if fields else 0


def _stat_fields(path: Path) -> list[str]:
    """From the state on; none of a process that has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
