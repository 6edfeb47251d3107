"""Follower ranks as processes of their own, forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from engine.checkpoint import open_checkpoint
from engine.parallel import join, leave
from engine.parallel_runner import ParallelRunner, follow
from engine.runner import Runner
from tests.engine.driving import Greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess
    from multiprocessing.synchronize import Semaphore
    from pathlib import Path

    from engine.batch import Batch, StepResult
    from engine.parallel import Parallel

CPU = torch.device("cpu")
PATIENCE_S = 600.0


def runner(directory: Path, parallel: Parallel, *, repeating: bool = False) -> Runner:
    checkpoint, ops = open_checkpoint(str(directory)), None
    if repeating:
        from tests.engine.repeating import Repeating

        ops = Repeating()
    return Runner(
        checkpoint,
        sampler=Greedy(),
        parallel=parallel,
        blocks=16,
        block_tokens=4,
        host_slots=1,
        ops=ops,
    )


class Hesitant:
    """A follower's runner that begins only so many batches."""

    def __init__(self, runner: Runner, permits: Semaphore) -> None:
        self.parallel = runner.parallel
        self._runner, self._permits = runner, permits

    def execute(
        self, batch: Batch, on_layer_group: Callable[[int], None] | None = None
    ) -> StepResult:
        self._permits.acquire()
        return self._runner.execute(batch, on_layer_group)


def follow_one(
    directory: Path,
    rank: int,
    cut: dict[str, Any],
    permits: Semaphore | None = None,
    *,
    repeating: bool = False,
) -> None:
    """What a follower's process runs."""
    mine = runner(directory, join(rank, device=CPU, **cut), repeating=repeating)
    follow(mine if permits is None else cast("Runner", Hesitant(mine, permits)))


@contextmanager
def leading(
    directory: Path,
    meeting: Path,
    *,
    tensor_size: int,
    stages: int,
    wait_s: float = PATIENCE_S,
    batches: int | None = None,
    repeating: bool = False,
) -> Iterator[tuple[ParallelRunner, list[BaseProcess]]]:
    """An executor over followers that begin only so many batches, if a number is given; the
    block must close it or lose it."""
    cut: dict[str, Any] = {
        "tensor_size": tensor_size,
        "stages": stages,
        "init_method": f"file://{meeting}",
        "wait_s": wait_s,
        "ordered": tensor_size > 2,
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.ranks"])
    permits = None if batches is None else context.Semaphore(batches)
    followers: list[BaseProcess] = [
        context.Process(
            target=follow_one,
            args=(directory, rank, cut, permits),
            kwargs={"repeating": repeating},
        )
        for rank in range(1, tensor_size * stages)
    ]
    for follower in followers:
        follower.start()
    try:
        parallel = join(0, device=CPU, **cut)
        try:
            yield ParallelRunner(runner(directory, parallel, repeating=repeating)), followers
            for follower in followers:
                follower.join(PATIENCE_S)
        finally:
            leave(parallel)  # also where it failed, or else the next test could not join
    finally:
        for follower in followers:
            follower.kill()
            follower.join()
