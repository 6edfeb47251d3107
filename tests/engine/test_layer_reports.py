"""When layer groups are told, by events that a test lets happen."""

from __future__ import annotations

from threading import Event as Flag
from typing import TYPE_CHECKING

import pytest
import torch

from engine.errors import InstanceLost
from engine.layer_reports import DeviceReports, LayerReports

if TYPE_CHECKING:
    from collections.abc import Callable

GROUPS = ((0, 1), (2, 3), (4,))


class FakeEvent:
    """Happens when the test says so."""

    def __init__(self) -> None:
        self._reached = Flag()

    def reach(self) -> None:
        self._reached.set()

    def query(self) -> bool:
        return self._reached.is_set()

    def synchronize(self) -> None:
        assert self._reached.wait(60)


class Device:
    """Has come to everything that it was asked, or to nothing yet."""

    def __init__(self, *, through: bool) -> None:
        self.through = through
        self.events: list[FakeEvent] = []

    def event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        if self.through:
            self.events[-1].reach()
        return self.events[-1]

    def get_through(self) -> None:
        self.through = True
        for each in self.events:
            each.reach()


class Ticking:
    """A second a look; nobody else looks."""

    def __init__(self, at: Callable[[float], None] = lambda _: None) -> None:
        self._now_s, self._at = 0.0, at

    def now(self) -> float:
        self._now_s += 1.0
        self._at(self._now_s)
        return self._now_s


def reports_of(device: Device, clock: Ticking | None = None) -> DeviceReports:
    return DeviceReports(GROUPS, device.event, wait_s=10.0, clock=clock or Ticking())


def test_a_cpu_tells_a_group_with_its_last_layer() -> None:
    told: list[int] = []
    with LayerReports(GROUPS).telling(told.append) as report:
        for layer, expected in enumerate(([], [0], [0], [0, 1], [0, 1, 2])):
            report(layer)
            assert told == expected


def test_a_device_is_asked_further_before_it_has_come_to_what_was_asked() -> None:
    device, told = Device(through=False), list[int]()
    with reports_of(device).telling(told.append) as report:
        for layer in range(5):
            report(layer)
        assert told == []
        device.get_through()
    assert told == [0, 1, 2]


def test_where_nobody_listens_the_device_is_waited_for_once() -> None:
    device = Device(through=True)
    with reports_of(device).telling(None) as report:
        for layer in range(5):
            report(layer)
        assert device.events == []
    assert len(device.events) == 1


def test_what_fails_in_telling_fails_the_batch() -> None:
    def refuse(group: int) -> None:
        raise ConnectionError(group)

    with (
        pytest.raises(ConnectionError),
        reports_of(Device(through=True)).telling(refuse) as report,
    ):
        report(1)


def fail_halfway(reports: DeviceReports, told: list[int], error: Exception) -> None:
    """The host fails while the device is busy with the first group."""
    with reports.telling(told.append) as report:
        for layer in range(3):
            report(layer)
        raise error


def test_a_pass_that_fails_on_the_host_is_over_only_when_the_device_is_through() -> None:
    device, told = Device(through=False), list[int]()

    def at(now_s: float) -> None:
        assert told == []
        if now_s == 5.0:
            device.get_through()

    with pytest.raises(torch.OutOfMemoryError):
        fail_halfway(reports_of(device, Ticking(at)), told, torch.OutOfMemoryError("no memory"))
    assert device.through
    assert told == [0]


def test_a_device_that_does_not_get_through_after_a_failure_is_lost() -> None:
    device, told = Device(through=False), list[int]()
    with pytest.raises(InstanceLost, match=r"not through after 10\.0 s"):
        fail_halfway(reports_of(device), told, RuntimeError("no memory"))
    assert told == []
    device.get_through()


def test_a_device_that_was_given_up_is_not_waited_for_again() -> None:
    device = Device(through=False)
    with pytest.raises(InstanceLost, match="late"):
        fail_halfway(reports_of(device), [], InstanceLost("late"))
    assert len(device.events) == 1
    device.get_through()


class Broken(Device):
    """After an illegal access whatever is asked of the device fails."""

    def event(self) -> FakeEvent:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def end_pass(reports: DeviceReports, error: Exception | None) -> None:
    with reports.telling(None):
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [None, RuntimeError("Triton Error [CUDA]: illegal address")])
def test_a_device_on_which_everything_fails_is_lost_whatever_the_pass_said(
    error: Exception | None,
) -> None:
    with pytest.raises(InstanceLost, match="of no use any more: CUDA error: an illegal"):
        end_pass(reports_of(Broken(through=True)), error)


def test_an_error_after_which_the_device_goes_on_is_the_batchs_own() -> None:
    error = torch.AcceleratorError("CUDA error: invalid configuration argument")
    with pytest.raises(torch.AcceleratorError, match="invalid configuration"):
        end_pass(reports_of(Device(through=True)), error)


def launch(reports: DeviceReports, error: Exception | None) -> None:
    with reports.launching():
        if error is not None:
            raise error


def test_a_launch_leaves_the_device_at_its_work_unless_it_fails() -> None:
    device = Device(through=False)
    launch(reports_of(device), None)
    assert device.events == []
    through = Ticking(lambda now_s: device.get_through() if now_s == 5.0 else None)
    with pytest.raises(torch.OutOfMemoryError):
        launch(reports_of(device, through), torch.OutOfMemoryError("no memory"))
    assert device.through


def test_what_was_launched_is_waited_for_by_itself_and_within_bounds() -> None:
    device = Device(through=False)
    reports, first, behind = reports_of(device), device.event(), device.event()
    first.reach()
    reports.reach(first)
    with pytest.raises(InstanceLost, match=r"not through after 10\.0 s"):
        reports.reach(behind)


class Useless(FakeEvent):
    def query(self) -> bool:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_fails_at_what_was_launched_is_lost() -> None:
    with pytest.raises(InstanceLost, match="of no use any more: CUDA error: an illegal"):
        reports_of(Device(through=True)).reach(Useless())
