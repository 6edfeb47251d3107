"""A model cut over ranks says the same as the whole, and a lost rank is noticed."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from engine.batch import Batch, Swap
from engine.checkpoint import open_checkpoint
from engine.errors import BadConfig, InstanceLost
from engine.parallel import Parallel
from tests.engine import tiny
from tests.engine.driving import chunk, generate, step
from tests.engine.ranks import leading, runner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCKS = (7, 3, 11, 0, 14, 5, 9, 2)
STEPS = 10


@pytest.mark.parametrize(("tensor_size", "stages"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", tiny.TINY)
def test_every_family_over_ranks_draws_the_same_tokens(
    name: str,
    tensor_size: int,
    stages: int,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    check_same_tokens(tiny_checkpoint(name), tmp_path / "meet", tensor_size, stages)


def test_ranks_share_kv_heads_where_there_are_fewer_heads_than_ranks(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    check_same_tokens(tiny_checkpoint("llama3"), tmp_path / "meet", 4, 1)


def check_same_tokens(directory: Path, meeting: Path, tensor_size: int, stages: int) -> None:
    wanted = generate(runner(directory, Parallel()), tiny.prompt(20), STEPS, BLOCKS)
    with leading(directory, meeting, tensor_size=tensor_size, stages=stages) as led:
        executor, followers = led
        assert generate(executor, tiny.prompt(20), STEPS, BLOCKS) == wanted
        executor.close()
    assert [follower.exitcode for follower in followers] == [0] * len(followers)


def test_a_lost_rank_fails_the_leaders_call(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with leading(tiny_checkpoint("llama3"), tmp_path / "meet", tensor_size=2, stages=1) as (
        executor,
        (follower,),
    ):
        step(executor, chunk("a", (5, 6), 0, BLOCKS))
        follower.kill()
        follower.join()
        with pytest.raises(InstanceLost, match="a rank of the model failed"):
            step(executor, chunk("a", (7,), 2, BLOCKS))


def test_a_leader_that_fails_says_so_before_it_waits_for_any_group(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Parallel] = []
    monkeypatch.setattr("engine.parallel_runner.leave", left.append)
    with leading(tiny_checkpoint("llama3"), tmp_path / "meet", tensor_size=2, stages=1) as (
        executor,
        (follower,),
    ):
        follower.kill()
        follower.join()
        with pytest.raises(InstanceLost):
            step(executor, chunk("a", (5, 6), 0, BLOCKS))
    assert left == []


@pytest.mark.parametrize(("tensor_size", "stages"), [(2, 1), (1, 2)])
def test_a_rank_that_hangs_fails_the_leaders_call(
    tensor_size: int, stages: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with leading(
        tiny_checkpoint("llama3"),
        tmp_path / "meet",
        tensor_size=tensor_size,
        stages=stages,
        wait_s=6.0,
    ) as (executor, (follower,)):
        step(executor, chunk("a", (5, 6), 0, BLOCKS))
        assert follower.pid is not None
        os.kill(follower.pid, signal.SIGSTOP)
        with pytest.raises(InstanceLost, match="a rank of the model failed"):
            step(executor, chunk("a", (7,), 2, BLOCKS))
        follower.kill()


SWAPS_ONLY = Batch((), (Swap("a", (7,), (0,), to_host=True),))
DRAWS_NOTHING = Batch((chunk("a", (5, 6), 0, BLOCKS, draw=False),))


@pytest.mark.parametrize("batch", [SWAPS_ONLY, DRAWS_NOTHING], ids=["swaps", "fills"])
def test_a_batch_is_over_only_when_it_is_over_in_every_rank(batch: Batch, tmp_path: Path) -> None:
    tiny.make("llama3", tmp_path / "one-layer", num_hidden_layers=1)
    meeting = tmp_path / "meet"
    with leading(
        tmp_path / "one-layer", meeting, tensor_size=2, stages=1, wait_s=6.0, batches=1
    ) as (executor, (follower,)):
        executor.execute(batch)
        with pytest.raises(InstanceLost, match="a rank of the model failed"):
            executor.execute(batch)
        follower.kill()


@pytest.mark.parametrize(
    ("parallel", "field"),
    [
        (Parallel(tensor_size=3), "tensor_parallel"),
        (Parallel(tensor_size=8), "tensor_parallel"),
        (Parallel(stages=3), "pipeline_parallel"),
    ],
)
def test_a_cut_the_model_does_not_allow_is_refused(
    parallel: Parallel, field: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    config = open_checkpoint(str(tiny_checkpoint("llama3"))).config
    with pytest.raises(BadConfig) as refused:
        parallel.check(config)
    assert refused.value.field == field
