"""How a device is waited for: within bounds, and letting others run."""

from __future__ import annotations

import pytest

from engine.device_events import LOOK_S, await_event
from engine.errors import InstanceLost


class Ticking:
    """A second a look; nobody else looks."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        self._now_s += 1.0
        return self._now_s


class After:
    """A device that gets through at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def synchronize(self) -> None:
        raise AssertionError("waited for without bounds")


def test_a_device_is_waited_for_within_bounds() -> None:
    slow, stuck = After(5), After(1000)
    await_event(slow, 10.0, Ticking())
    assert slow.looks == 0
    with pytest.raises(InstanceLost, match=r"not through after 10\.0 s"):
        await_event(stuck, 10.0, Ticking())


def test_other_threads_may_run_between_two_looks_at_a_device() -> None:
    pauses: list[float] = []
    await_event(After(5), 10.0, Ticking(), pauses.append)
    assert pauses == [LOOK_S] * 4
    pauses.clear()
    await_event(After(1), 10.0, Ticking(), pauses.append)
    assert pauses == []
