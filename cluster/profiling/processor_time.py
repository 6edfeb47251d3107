"""Processor time of a family of processes, thread by thread, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cluster.thread_names import LOOP, PASSES

if TYPE_CHECKING:
    from collections.abc import Mapping

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Thread(NamedTuple):
    process: int
    number: int
    name: str


class Spent(NamedTuple):
    """Processor time of a server and its clients, by what it was for."""

    passes_s: float
    loops_s: float
    """Of what hands an instance its passes, and waits meanwhile."""
    doors_s: float
    """Of all else."""


def family_times(first: int) -> dict[Thread, float]:
    """Seconds that each thread of this process, and of all that descend from it, has computed."""
    return {
        Thread(process, int(path.name), name): seconds
        for process in _family(first)
        for path in Path(f"/proc/{process}/task").glob("[0-9]*")
        if (seconds := _computed_s(path)) is not None and (name := _name(path)) is not None
    }


def spent_between(before: Mapping[Thread, float], after: Mapping[Thread, float]) -> Spent:
    """A loop's name is also that of threads that it starts: of each process the busiest one is
    meant."""
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    passes_s = sum(seconds for thread, seconds in spent.items() if thread.name == PASSES)
    loops: dict[int, float] = {}
    for thread, seconds in spent.items():
        if thread.name == LOOP:
            loops[thread.process] = max(seconds, loops.get(thread.process, 0.0))
    loops_s = sum(loops.values())
    return Spent(passes_s, loops_s, sum(spent.values()) - passes_s - loops_s)


def _family(first: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if fields := _stat(path):
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [first]
    for one in found:
        found += children.get(one, [])
    return found


def _computed_s(thread: Path) -> float | None:
    """To the nanosecond where the kernel counts so, else in ticks; None once it has ended."""
    try:
        return int((thread / "schedstat").read_text(encoding="ascii").split()[0]) * 1e-9
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        fields = _stat(thread / "stat")
        return (int(fields[11]) + int(fields[12])) * TICK_S if fields else None


def _name(thread: Path) -> str | None:
    try:
        return (thread / "comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return None


def _stat(path: Path) -> list[str]:
    """From the state on; nothing of what has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
