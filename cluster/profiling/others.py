"""What is no part of what is measured and takes processors from it: other processes of this
machine, and other guests of its host. No time that a process counts for itself shows either."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

DISTURBING_CORES = 0.05
"""More than what a quiet machine does beside, and enough to make passes wait."""
PROC = Path("/proc")


class Disturbed(Protocol):
    @property
    def others(self) -> float:
        """Cores that others took meanwhile."""
        ...


Result = TypeVar("Result", bound=Disturbed)


def least_disturbed(work: Callable[[], Result], most_tries: int) -> Result:
    """What came of it; again while others take too much."""
    tries = [work()]
    while tries[-1].others > DISTURBING_CORES and len(tries) < most_tries:
        tries.append(work())
    return min(tries, key=lambda one: one.others)


class Others:
    """All but this process and what it began, from now on."""

    def __init__(self, now: Callable[[], float] = time.monotonic, proc: Path = PROC) -> None:
        self._now, self._proc = now, proc
        self._began_s, self._stolen_s, self._taken_s = now(), *self._so_far_s()

    @property
    def cores(self) -> float:
        """That they took in the mean."""
        stolen_s, taken_s = self._so_far_s()
        by_processes_s = max(taken_s - self._taken_s, 0.0)
        return (stolen_s - self._stolen_s + by_processes_s) / (self._now() - self._began_s)

    def _so_far_s(self) -> tuple[float, float]:
        """Processor time that the host gave to others while this machine wanted it, and what this
        machine gave neither to this process nor to what it began."""
        ticks = os.sysconf("SC_CLK_TCK")
        fields = (self._proc / "stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, soft_irq, stolen, *_ = map(int, fields)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = sum(self._ticks_of(one) for one in self._family(os.getpid())) / ticks
        busy_s = (user + nice + system + irq + soft_irq) / ticks
        return stolen / ticks, busy_s - own_s - ended.ru_utime - ended.ru_stime

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
