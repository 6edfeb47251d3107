"""The thread in which an instance's batches run, each within bounds.

A batch is executed, or, where the executor can do that, launched and collected later, so that
another is launched behind it first: a device then goes from one to the other without the host.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.thread_names import PASSES, name_thread
from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from engine.batch import Batch, Collect, Executor, Launch, StepResult


@dataclass(frozen=True, slots=True)
class Executed:
    batch: Batch
    result: Future[StepResult]


@dataclass(frozen=True, slots=True)
class Launched:
    batch: Batch
    collect: Future[Collect | None]

    @property
    def was_declined(self) -> bool:
        """Whether the executor could not launch it, which the end of the batch before it tells."""
        assert self.collect.done()
        return self.collect.exception() is None and self.collect.result() is None


class Passes:
    def __init__(self, executor: Executor, pass_s: float) -> None:
        """Whatever has not returned after `pass_s` never will: its device hangs."""
        self._executor, self._pass_s = executor, pass_s
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="execute", initializer=name_thread, initargs=(PASSES,)
        )

    @property
    def launches(self) -> bool:
        return self._executor.launch is not None

    def execute(self, batch: Batch, group_done: Callable[[int], None] | None) -> Executed:
        return Executed(batch, self._thread.submit(self._executor.execute, batch, group_done))

    def launch(self, batch: Batch, before: Launched | None = None) -> Launched:
        """To be collected later; `before` is the batch that it follows, if that is under way."""
        launch = self._executor.launch
        assert launch is not None
        return Launched(batch, self._thread.submit(_launch, launch, batch, before))

    async def result(self, one: Executed | Launched) -> StepResult:
        """Raises what the batch failed for, and InstanceLost if it does not return."""
        future = one.result if isinstance(one, Executed) else self._thread.submit(self._end, one)
        try:
            async with asyncio.timeout(self._pass_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as late:
            after = f"after {self._pass_s:g} s"
            raise InstanceLost(f"limits.pass_s: a pass has not returned {after}") from late

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _end(self, one: Launched) -> StepResult:
        collect = one.collect.result()
        return self._executor.execute(one.batch) if collect is None else collect()


def _launch(launch: Launch, batch: Batch, before: Launched | None) -> Collect | None:
    """Nothing follows what must be executed: no device will hold what it draws."""
    if before is not None and before.collect.result() is None:
        return None
    return launch(batch)
