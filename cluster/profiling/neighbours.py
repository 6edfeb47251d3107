"""Other instances of a model that compute on this machine while one is measured."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING

from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.synchronize import Event

START_S = 600.0
ENDING_S = 10.0
LOOK_S = 0.2


@contextmanager
def busy_neighbours(count: int, work: Callable[[Event], None]) -> Iterator[list[int]]:
    """So many processes work until the end of the context; each sets its event once it does."""
    context = get_context("spawn")
    begun = [context.Event() for _ in range(count)]
    processes = [context.Process(target=work, args=(event,), daemon=True) for event in begun]
    try:
        for process in processes:
            process.start()
        for process, event in zip(processes, begun, strict=True):
            waited_s = 0.0
            while not event.wait(LOOK_S):
                waited_s += LOOK_S
                if waited_s > START_S or not process.is_alive():
                    raise InstanceLost("a neighbour to be measured beside did not start")
        yield [process.pid for process in processes if process.pid is not None]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join(ENDING_S)
