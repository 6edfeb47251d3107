"""What swaps copy, and what waits for what, whichever of a device's streams gets on first."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Swap
from engine.swapping import GROUP_BYTES, HostLane, Swapper, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[], object]

BLOCK_BYTES = GROUP_BYTES // 2
BLOCKS, SLOTS = 8, 6


class FakeDevice:
    """Two streams of work that happens only when somebody waits, the one called `first` first."""

    def __init__(self, first: str) -> None:
        self._order = [first, {"passes": "lane", "lane": "passes"}[first]]
        self._asked: dict[str, deque[tuple[FakeMark | None, Work]]] = {
            "passes": deque(),
            "lane": deque(),
        }
        self._counts = {"passes": 0, "lane": 0}
        self.done = {"passes": 0, "lane": 0}

    def ask(self, stream: str, work: Work, after: FakeMark | None = None) -> FakeMark:
        self._asked[stream].append((after, work))
        self._counts[stream] += 1
        return FakeMark(self, stream, self._counts[stream])

    def here(self, stream: str) -> FakeMark:
        return FakeMark(self, stream, self._counts[stream])

    def run_until(self, mark: FakeMark) -> None:
        while not mark.passed:
            self._run_one()

    def finish(self) -> None:
        while any(self._asked.values()):
            self._run_one()

    def _run_one(self) -> None:
        ready = [s for s in self._order if self._asked[s] and self._may_start(s)]
        stream = ready[0]
        _, work = self._asked[stream].popleft()
        work()
        self.done[stream] += 1

    def _may_start(self, stream: str) -> bool:
        after, _ = self._asked[stream][0]
        return after is None or after.passed


class FakeMark:
    def __init__(self, device: FakeDevice, stream: str, place: int) -> None:
        self._device, self._stream, self._place = device, stream, place

    @property
    def passed(self) -> bool:
        return self._device.done[self._stream] >= self._place

    def wait(self) -> None:
        self._device.ask("passes", nothing, after=self)

    def synchronize(self) -> None:
        self._device.run_until(self)


class FakeLane:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def follow(self) -> None:
        self._device.ask("lane", nothing, after=self._device.here("passes"))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> FakeMark:
        return self._device.ask("lane", partial(target.copy_, source))


def nothing() -> None: ...


def memory() -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks that hold their own number, and host slots that hold 100 more than theirs."""
    pool = torch.arange(BLOCKS, dtype=torch.uint8)[:, None].repeat(1, BLOCK_BYTES)
    slots = torch.arange(100, 100 + SLOTS, dtype=torch.uint8)[:, None].repeat(1, BLOCK_BYTES)
    return pool, slots


def numbers(rows: torch.Tensor) -> list[int]:
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


OUT = Swap("a", (2, 3, 4, 6), (0, 1, 2, 4), to_host=True)


@pytest.mark.parametrize("first", ["passes", "lane"])
def test_a_pass_overwrites_a_block_only_after_it_has_left(first: str) -> None:
    device, (pool, slots) = FakeDevice(first), memory()
    with Swapper(pool, slots, FakeLane(device)).swapping((OUT,), [3, 6]):
        device.ask("passes", partial(pool[3].fill_, 33))
        device.ask("passes", partial(pool[6].fill_, 66))
    assert numbers(slots) == [2, 3, 4, 103, 6, 105]
    device.finish()
    assert numbers(pool) == [0, 1, 2, 33, 4, 5, 66, 7]


@pytest.mark.parametrize("first", ["passes", "lane"])
def test_what_an_earlier_pass_writes_leaves_with_the_block(first: str) -> None:
    device, (pool, slots) = FakeDevice(first), memory()
    device.ask("passes", partial(pool[4].fill_, 44))
    with Swapper(pool, slots, FakeLane(device)).swapping((OUT,), []):
        pass
    assert numbers(slots) == [2, 3, 44, 103, 6, 105]


@pytest.mark.parametrize("first", ["passes", "lane"])
def test_a_pass_reads_blocks_that_came_back_through_slots_just_filled(first: str) -> None:
    device, (pool, slots) = FakeDevice(first), memory()
    back = Swap("b", (2, 7), (5, 1), to_host=False)
    seen: list[int] = []
    with Swapper(pool, slots, FakeLane(device)).swapping((OUT, back), [2, 7]):
        device.ask("passes", lambda: seen.extend(numbers(pool[[2, 7]])))
    device.finish()
    assert seen == [105, 3]


def test_a_pass_that_touches_no_moving_block_waits_for_none() -> None:
    device, (pool, slots) = FakeDevice("passes"), memory()
    with Swapper(pool, slots, FakeLane(device)).swapping((OUT,), [0, 1, 5]):
        device.run_until(device.ask("passes", partial(pool[5].fill_, 55)))
        assert device.done["lane"] == 0
    assert numbers(slots) == [2, 3, 4, 103, 6, 105]


def test_a_pass_waits_for_no_more_than_the_groups_it_touches() -> None:
    device, (pool, slots) = FakeDevice("passes"), memory()
    follow_and_first_group = 2
    with Swapper(pool, slots, FakeLane(device)).swapping((OUT,), [2]):
        device.run_until(device.ask("passes", partial(pool[2].fill_, 22)))
        assert device.done["lane"] == follow_and_first_group
    assert numbers(slots) == [2, 3, 4, 103, 6, 105]


def test_all_has_moved_even_where_the_pass_fails() -> None:
    device, (pool, slots) = FakeDevice("passes"), memory()
    with (
        pytest.raises(FloatingPointError),
        Swapper(pool, slots, FakeLane(device)).swapping((OUT,), []),
    ):
        raise FloatingPointError
    assert numbers(slots) == [2, 3, 4, 103, 6, 105]


def test_a_host_has_copied_before_the_pass() -> None:
    pool, slots = memory()
    with Swapper(pool, slots, HostLane()).swapping((OUT,), [2]):
        assert numbers(slots) == [2, 3, 4, 103, 6, 105]


def test_runs_are_cut_where_either_side_jumps_and_at_the_size_of_a_group() -> None:
    blocks, slots = (2, 3, 4, 6, 7, 8, 9), (0, 1, 2, 3, 4, 6, 7)
    assert runs_of(blocks, slots, 2) == [(2, 0, 2), (4, 2, 1), (6, 3, 2), (8, 6, 2)]
    assert runs_of(blocks, slots, 1) == [(b, s, 1) for b, s in zip(blocks, slots, strict=True)]
    assert runs_of((), (), 4) == []
