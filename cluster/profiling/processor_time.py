"""Processor time of a family of processes, thread by thread, as Linux tells it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

Thread = tuple[int, int]
"""Its process and its own number."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


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
        (process, int(path.name)): seconds
        for process in _family(first)
        for path in Path(f"/proc/{process}/task").glob("[0-9]*")
        if (seconds := _computed_s(path)) is not None
    }


def spent_between(
    before: Mapping[Thread, float], after: Mapping[Thread, float], *, computing: int
) -> Spent:
    """The busiest so many threads compute passes, and of each of their processes the next busiest
    one is the loop around them."""
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    order = sorted(spent, key=lambda thread: spent[thread], reverse=True)
    passes, others = order[:computing], order[computing:]
    looping = Counter({process: 1 for process, _ in passes})
    passes_s = sum(spent[thread] for thread in passes)
    loops_s = doors_s = 0.0
    for thread in others:
        if looping[thread[0]]:
            looping[thread[0]] -= 1
            loops_s += spent[thread]
        else:
            doors_s += spent[thread]
    return Spent(passes_s, loops_s, doors_s)


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


def _stat(path: Path) -> list[str]:
    """From the state on; nothing of what has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
