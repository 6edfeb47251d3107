"""Follower ranks as processes of their own, forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint import open_checkpoint
from engine.parallel import join
from engine.parallel_runner import ParallelRunner, follow
from engine.runner import Runner
from tests.engine.driving import Greedy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from engine.parallel import Parallel

CPU = torch.device("cpu")


def runner(directory: Path, parallel: Parallel) -> Runner:
    checkpoint = open_checkpoint(str(directory))
    return Runner(
        checkpoint,
        sampler=Greedy(),
        parallel=parallel,
        blocks=16,
        block_tokens=4,
        host_slots=1,
    )


def follow_one(directory: Path, rank: int, cut: dict[str, Any]) -> None:
    """What a follower's process runs."""
    follow(runner(directory, join(rank, device=CPU, **cut)))


@contextmanager
def leading(
    directory: Path, meeting: Path, *, tensor_size: int, stages: int, wait_s: float = 20.0
) -> Iterator[tuple[ParallelRunner, list[BaseProcess]]]:
    """An executor over followers; the block must close it or lose it."""
    cut: dict[str, Any] = {
        "tensor_size": tensor_size,
        "stages": stages,
        "init_method": f"file://{meeting}",
        "wait_s": wait_s,
        "ordered": tensor_size > 2,
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.ranks"])
    followers: list[BaseProcess] = [
        context.Process(target=follow_one, args=(directory, rank, cut))
        for rank in range(1, tensor_size * stages)
    ]
    for follower in followers:
        follower.start()
    try:
        yield ParallelRunner(runner(directory, join(0, device=CPU, **cut))), followers
        for follower in followers:
            follower.join(20.0)
    finally:
        for follower in followers:
            follower.kill()
            follower.join()
