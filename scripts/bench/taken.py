"""What a hypervisor takes of the processors while something is measured."""

from __future__ import annotations

import asyncio
import os
import re
from bisect import bisect_left, bisect_right
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROCESSORS, STOLEN = Path("/proc/stat"), 8
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NOTED_EVERY_S = 0.02


@dataclass
class Taken:
    """How much of each processor it had taken, from moment to moment."""

    at_s: list[float] = field(default_factory=list)
    """Since the start of the watch."""
    taken_s: list[list[float]] = field(default_factory=list)

    def note(self, at_s: float) -> None:
        rows = [line.split() for line in PROCESSORS.read_text().splitlines()]
        ticks = [int(row[STOLEN]) for row in rows if re.fullmatch(r"cpu\d+", row[0])]
        self.at_s.append(at_s)
        self.taken_s.append([one / TICKS_PER_S for one in ticks])

    def between(self, start_s: float, end_s: float) -> float:
        """Of the processor that it took most of, from the note before to the one after."""
        before = max(bisect_right(self.at_s, start_s) - 1, 0)
        after = min(bisect_left(self.at_s, end_s), len(self.at_s) - 1)
        pairs = zip(self.taken_s[before], self.taken_s[after], strict=True)
        return max(late - early for early, late in pairs)


@asynccontextmanager
async def watched_host() -> AsyncIterator[Taken]:
    loop, taken = asyncio.get_running_loop(), Taken()
    start_s = loop.time()
    taken.note(0.0)

    async def watch() -> None:
        while True:
            await asyncio.sleep(NOTED_EVERY_S)
            taken.note(loop.time() - start_s)

    watching = loop.create_task(watch())
    try:
        yield taken
    finally:
        watching.cancel()
        taken.note(loop.time() - start_s)
