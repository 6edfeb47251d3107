"""Processor time of a family of processes, thread by thread, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Thread = tuple[int, int]
"""Its process and its own number."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def family_times(first: int) -> dict[Thread, float]:
    """Seconds that each thread of this process, and of all that descend from it, has computed."""
    return {
        (process, int(path.parent.name)): (int(fields[11]) + int(fields[12])) * TICK_S
        for process in _family(first)
        for path in Path(f"/proc/{process}/task").glob("[0-9]*/stat")
        if (fields := _stat(path))
    }


def spent_between(
    before: Mapping[Thread, float], after: Mapping[Thread, float], *, without_busiest: int
) -> float:
    """By all threads but so many, those that computed most of all."""
    spent = sorted(seconds - before.get(thread, 0.0) for thread, seconds in after.items())
    return sum(spent[: len(spent) - without_busiest])


def _family(first: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if fields := _stat(path):
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [first]
    for one in found:
        found += children.get(one, [])
    return found


def _stat(path: Path) -> list[str]:
    """From the state on; nothing of what has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
