"""One model over several ranks: rank 0 leads, the others run each batch it broadcasts.

A rank that fails says so and keeps its groups, which end with its process: to take it out would
be to wait, without bounds, for sums that its device will never finish.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from engine.batch import Batch, StepResult
from engine.errors import InstanceLost
from engine.parallel import await_all, leave
from engine.wire import decode_record, encode_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    from engine.parallel import Parallel
    from engine.runner import Runner

LEADER = 0


class ParallelRunner:
    """The executor of an instance of several ranks, in rank 0's process; waits for the others."""

    launch = None
    """Ranks are told of a batch once they are through with the last one."""

    def __init__(self, runner: Runner) -> None:
        assert runner.parallel.rank == LEADER, runner.parallel.rank
        self.runner, self._parallel = runner, runner.parallel
        try:
            await_all(self._parallel)
        except RuntimeError as error:
            raise InstanceLost(f"a rank of the model did not start: {error}") from error

    def execute(
        self, batch: Batch, on_layer_group: Callable[[int], None] | None = None
    ) -> StepResult:
        """`on_layer_group` tells of this rank's layers; each follower has its own."""
        try:
            _broadcast(encode_record(batch), self._parallel)
            result = self.runner.execute(batch, on_layer_group)
            return self._answer(result)
        except RuntimeError as error:
            raise InstanceLost(f"a rank of the model failed: {error}") from error

    def close(self) -> None:
        """Ends the followers and takes this rank out."""
        try:
            _broadcast(b"", self._parallel)
        except RuntimeError as error:
            raise InstanceLost(f"a rank of the model was already gone: {error}") from error
        leave(self._parallel)

    def _answer(self, result: StepResult) -> StepResult:
        """The drawn tokens, from wherever they were drawn."""
        drawing_rank = self._parallel.drawing_rank
        if drawing_rank == LEADER:
            return result
        remote = decode_record(StepResult, _receive(drawing_rank, self._parallel.answers))
        return StepResult(remote.drawn, result.duration_s)


def follow(runner: Runner, on_layer_group: Callable[[int], None] | None = None) -> None:
    """Runs the leader's batches until it closes; returns then, and raises if a rank is lost."""
    parallel = runner.parallel
    try:
        await_all(parallel)
        while data := _receive_broadcast(parallel):
            result = runner.execute(decode_record(Batch, data), on_layer_group)
            if parallel.rank == parallel.drawing_rank:
                _send(encode_record(result), LEADER, parallel.answers)
    except RuntimeError as error:
        raise InstanceLost(f"rank {parallel.rank}: another rank failed: {error}") from error
    leave(parallel)


def _broadcast(data: bytes, parallel: Parallel) -> None:
    """The leader waits within bounds where followers, idle, wait for ever."""
    wait = timedelta(seconds=parallel.wait_s)
    pieces = [torch.tensor([len(data)]), _as_tensor(data)] if data else [torch.tensor([0])]
    for piece in pieces:
        distributed.broadcast(piece, LEADER, group=parallel.control, async_op=True).wait(wait)


def _receive_broadcast(parallel: Parallel) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    distributed.broadcast(size, LEADER, group=parallel.control)
    data = torch.empty(int(size), dtype=torch.uint8)
    if data.numel():
        distributed.broadcast(data, LEADER, group=parallel.control)
    return data.numpy().tobytes()


def _send(data: bytes, to: int, group: ProcessGroup | None) -> None:
    distributed.send(torch.tensor([len(data)]), to, group=group)
    distributed.send(_as_tensor(data), to, group=group)


def _receive(rank: int, group: ProcessGroup | None) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    distributed.recv(size, rank, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    distributed.recv(data, rank, group=group)
    return data.numpy().tobytes()


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
