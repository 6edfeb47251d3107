"""A progress bar on standard error, redrawn twice a second: it must not cost what it shows."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from cluster.bench.sample import Sample

REDRAWS_PER_S = 2


class Bar:
    """How one stage of a bench gets on."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task
        self._sent = self._ended = self._met = 0

    def sent(self) -> None:
        self._sent += 1

    def ended(self, sample: Sample) -> None:
        self._ended += 1
        self._met += sample.met()
        under_way = self._sent - self._ended
        state = f"{under_way} under way, {self._met / self._ended:.0%} within targets"
        self._bars.update(self._task, completed=self._ended, state=state)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Bar]]:
    """Yields what makes the bar of a stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, refresh_per_second=REDRAWS_PER_S) as bars:
        yield lambda stage, requests: Bar(bars, bars.add_task(stage, total=requests, state=""))
