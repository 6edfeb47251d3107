"""A line for every batch of an instance: what it held, and how long it took."""

from __future__ import annotations

import csv
import time
from functools import partial
from typing import TYPE_CHECKING

from placement.latency.model import pairs_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import Batch, Collect, Executor, Launch, StepResult

COLUMNS = (
    "began_s",
    "pass_s",
    "processor_s",
    "tokens",
    "draws",
    "prompts",
    "decodes",
    "pairs",
    "kv_read_tokens",
    "then_s",
)
LINES_KEPT = 64
"""In memory, before they are written together."""


class StepLog:
    """Runs batches as the executor within does. A line tells when a pass began, how long it took,
    how much of that its thread computed, the batch in the terms of the latency model, and how long
    it was until the next pass, where a request of this batch went on in it. A pass that was
    launched behind another began when that one ended."""

    def __init__(self, executor: Executor, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._executor = executor
        self._file = path.open("w", newline="", encoding="utf-8")
        self._lines = csv.writer(self._file)
        self._lines.writerow(COLUMNS)
        self._kept: list[tuple[float | int | str, ...]] = []
        self._last: tuple[float | int, ...] | None = None
        self._ended_s = 0.0
        self._ran: frozenset[str] = frozenset()

    def execute(
        self, batch: Batch, on_layer_group: Callable[[int], None] | None = None
    ) -> StepResult:
        began_s, computed_s = time.time(), time.thread_time()
        self._complete(batch, began_s)
        result = self._executor.execute(batch, on_layer_group)
        self._over(batch, began_s, time.thread_time() - computed_s)
        return result

    @property
    def launch(self) -> Launch | None:
        launch = self._executor.launch
        return None if launch is None else partial(self._launch, launch)

    def _launch(self, launch: Launch, batch: Batch) -> Collect | None:
        began_s, computed_s = time.time(), time.thread_time()
        collect = launch(batch)
        if collect is None:
            return None
        return partial(self._collect, collect, batch, began_s, time.thread_time() - computed_s)

    def _collect(
        self, collect: Collect, batch: Batch, began_s: float, launching_s: float
    ) -> StepResult:
        began_s, computed_s = max(began_s, self._ended_s), time.thread_time()
        self._complete(batch, began_s)
        result = collect()
        self._over(batch, began_s, launching_s + time.thread_time() - computed_s)
        return result

    def _over(self, batch: Batch, began_s: float, computed_s: float) -> None:
        self._ended_s = time.time()
        lasted_s = self._ended_s - began_s
        prompts = [chunk for chunk in batch.chunks if len(chunk.tokens) > 1]
        self._last = (
            began_s,
            lasted_s,
            computed_s,
            sum(len(chunk.tokens) for chunk in batch.chunks),
            sum(chunk.draw is not None for chunk in batch.chunks),
            len(prompts),
            len(batch.chunks) - len(prompts),
            sum(pairs_of(len(chunk.tokens), chunk.start) for chunk in prompts),
            sum(chunk.start for chunk in batch.chunks),
        )

    def write(self) -> None:
        """All lines so far, the last one as if nothing followed it."""
        self._complete(None, 0.0)
        self._write_kept()

    def close(self) -> None:
        self.write()
        self._file.close()

    def _complete(self, following: Batch | None, now: float) -> None:
        """The last line, once it is known what came after it."""
        ran = frozenset() if following is None else _requests(following)
        if self._last is not None:
            then_s = now - self._ended_s if ran & self._ran else ""
            self._kept.append((*self._last, then_s))
            self._last = None
            if len(self._kept) >= LINES_KEPT:
                self._write_kept()
        self._ran = ran

    def _write_kept(self) -> None:
        self._lines.writerows(self._kept)
        self._kept.clear()
        self._file.flush()


def _requests(batch: Batch) -> frozenset[str]:
    return frozenset(chunk.request_id for chunk in batch.chunks)
