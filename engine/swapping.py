"""Moves KV blocks between the pool and the host's slots, beside the passes where a device can.

Copies on a GPU have a stream of their own. A pass waits only for the groups of blocks that it
touches; whoever else is given a block that was swapped out waits for the end of the batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from engine.device_events import Past, recorded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from engine.batch import Swap

GROUP_BYTES = 8 << 20
"""Moved as one copy where blocks and slots rise together: some hundred microseconds of a bus."""


class Mark(Protocol):
    """A place in the work that a device was asked for; torch.cuda.Event is one."""

    def wait(self) -> None:
        """Has the passes asked for from now on come after it."""
        ...

    def synchronize(self) -> None:
        """Returns once the device has come to it."""
        ...


class Lane(Protocol):
    """Where copies are asked for."""

    def follow(self) -> None:
        """Has the copies asked for from now on come after the passes asked for so far."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Mark:
        """Copies of one lane happen in the order in which they are asked for."""
        ...


class HostLane:
    """A CPU has copied when the call returns."""

    def follow(self) -> None: ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Mark:
        target.copy_(source)
        return Past()


class DeviceLane:
    """A CUDA stream beside that of the passes; one side of its copies is pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Mark:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return recorded()


def lane_of(device: torch.device) -> Lane:
    return DeviceLane(device) if device.type == "cuda" else HostLane()


class Swapper:
    def __init__(self, pool: torch.Tensor, slots: torch.Tensor, lane: Lane) -> None:
        """`pool` and `slots` are [blocks, block_bytes]."""
        self._pool, self._slots, self._lane = pool, slots, lane
        self._most = max(1, GROUP_BYTES // pool.shape[1])

    @contextmanager
    def swapping(self, swaps: Sequence[Swap], touched: Iterable[int]) -> Iterator[None]:
        """A pass over the blocks `touched` may be asked for inside; all is moved at the end."""
        if not swaps:
            yield
            return
        moving = self._start(swaps)
        wanted = set(touched)
        for blocks, mark in moving:
            if not wanted.isdisjoint(blocks):
                mark.wait()
        try:
            yield
        finally:
            for _, mark in moving[-1:]:
                mark.synchronize()

    def _start(self, swaps: Sequence[Swap]) -> list[tuple[range, Mark]]:
        self._lane.follow()
        moving: list[tuple[range, Mark]] = []
        for swap in swaps:
            for block, slot, count in runs_of(swap.blocks, swap.host_slots, self._most):
                on_device = self._pool[block : block + count]
                on_host = self._slots[slot : slot + count]
                source, target = (on_device, on_host) if swap.to_host else (on_host, on_device)
                moving.append((range(block, block + count), self._lane.copy(source, target)))
        return moving


def runs_of(
    blocks: tuple[int, ...], slots: tuple[int, ...], most: int
) -> list[tuple[int, int, int]]:
    """(first block, first slot, count) of runs of at most `most` pairs that rise together."""
    runs: list[tuple[int, int, int]] = []
    for block, slot in zip(blocks, slots, strict=True):
        first_block, first_slot, count = runs[-1] if runs else (block, slot, most)
        if count < most and (first_block + count, first_slot + count) == (block, slot):
            runs[-1] = (first_block, first_slot, count + 1)
        else:
            runs.append((block, slot, 1))
    return runs
