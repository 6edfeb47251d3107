"""Weights of one process that others of the GPU compute with, by CUDA IPC."""

from __future__ import annotations

import multiprocessing
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.instance.borrowed_weights import borrow_weights, start_keeper
from cluster.instance.weight_keeper import Keeper, listen, load
from cluster.instance.weight_memory import GpuMemory
from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.errors import InstanceLost
from engine.parallel import ALONE
from engine.runner import Runner, choose_ops
from tests.cluster.host_weights import WAIT_S, starting
from tests.engine import tiny
from tests.engine.conftest import tiny_checkpoint  # noqa: F401  # a fixture
from tests.engine.driving import Greedy, chunk, generate

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from cluster.instance.borrowed_weights import Start
    from cluster.instance.weight_keeper import Wanted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda:0"
PROMPT = Batch((chunk("a", tiny.prompt(40), 0, (2, 0, 3)),))


def keep(wanted: Wanted, listening: Connection) -> None:
    listener = listen(wanted.name)
    listening.send(listener is not None)
    if listener is not None:
        ops = choose_ops(torch.device(DEVICE), 1, deterministic=False)
        Keeper(listener, partial(load, wanted, GpuMemory(torch.device(DEVICE)), ops)).run()


def borrowing_runner(directory: str, start: Start) -> Runner:
    checkpoint = open_checkpoint(directory)
    weights = borrow_weights(
        checkpoint,
        None,
        ALONE,
        dtype="float32",
        shared=GpuMemory(torch.device(DEVICE)),
        device=DEVICE,
        progress=lambda *_: None,
        start=start,
    )
    return runner_of(directory, storage=weights.storage())


def runner_of(directory: str, **options: object) -> Runner:
    torch.backends.cuda.matmul.allow_tf32 = False
    checkpoint = open_checkpoint(directory)
    return Runner(checkpoint, sampler=Greedy(), device=DEVICE, blocks=4, **options)  # type: ignore[arg-type]


def another(directory: str, pipe: Connection) -> None:
    """A worker that finds the weights, or has them kept, and stays until it is told to end."""
    runner = borrowing_runner(directory, start_keeper)
    logits = runner.logits(PROMPT)
    assert logits is not None
    pipe.send(logits.cpu().numpy())
    pipe.recv()
    runner.close()


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2"])
def test_workers_say_the_same_over_one_copy(
    family: str,
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    directory = str(tiny_checkpoint(family))
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=another, args=(directory, theirs), daemon=True)
    process.start()
    own, borrowing = runner_of(directory), borrowing_runner(directory, start_keeper)
    wanted, found = own.logits(PROMPT), borrowing.logits(PROMPT)
    assert wanted is not None
    assert found is not None
    torch.testing.assert_close(found, wanted)
    assert pipe.poll(WAIT_S)
    torch.testing.assert_close(torch.from_numpy(pipe.recv()), wanted.cpu())
    pipe.send("done")
    process.join(WAIT_S)
    assert process.exitcode == 0
    assert len(generate(borrowing, tiny.prompt(5), 2, range(4))) == 2, "as long as one reads them"
    own.close()
    borrowing.close()


def test_nothing_counts_that_was_computed_after_the_keeper_was_killed(
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    with starting(keep) as starter:
        runner = borrowing_runner(str(tiny_checkpoint("llama3")), starter)
        assert len(generate(runner, tiny.prompt(5), 2, range(4))) == 2
        starter.processes[0].kill()
        starter.processes[0].join(WAIT_S)
        with pytest.raises(InstanceLost):
            generate(runner, tiny.prompt(5), 1, range(4))
        runner.close()
