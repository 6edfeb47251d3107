"""When layer groups are told, by events that a test lets happen."""

from __future__ import annotations

from threading import Event as Flag

import pytest

from engine.layer_reports import DeviceReports, LayerReports

GROUPS = ((0, 1), (2, 3), (4,))


class FakeEvent:
    """Happens when the test says so."""

    def __init__(self) -> None:
        self._reached = Flag()

    def reach(self) -> None:
        self._reached.set()

    def synchronize(self) -> None:
        assert self._reached.wait(60)


def test_a_cpu_tells_a_group_with_its_last_layer() -> None:
    told: list[int] = []
    with LayerReports(GROUPS).telling(told.append) as report:
        for layer, expected in enumerate(([], [0], [0], [0, 1], [0, 1, 2])):
            report(layer)
            assert told == expected


def test_a_device_is_asked_further_before_it_has_come_to_what_was_asked() -> None:
    events: list[FakeEvent] = []
    last = False

    def event() -> FakeEvent:
        events.append(FakeEvent())
        if last:
            events[-1].reach()
        return events[-1]

    told: list[int] = []
    reports = DeviceReports(GROUPS, event)
    with reports.telling(told.append) as report:
        for layer in range(5):
            report(layer)
        assert told == []
        for each in events:
            each.reach()
        last = True
    assert told == [0, 1, 2]


def test_where_nobody_listens_the_device_is_waited_for_once() -> None:
    events: list[FakeEvent] = []

    def event() -> FakeEvent:
        events.append(FakeEvent())
        events[-1].reach()
        return events[-1]

    with DeviceReports(GROUPS, event).telling(None) as report:
        for layer in range(5):
            report(layer)
        assert events == []
    assert len(events) == 1


def test_what_fails_in_telling_fails_the_batch() -> None:
    def refuse(group: int) -> None:
        raise ConnectionError(group)

    def event() -> FakeEvent:
        made = FakeEvent()
        made.reach()
        return made

    with (
        pytest.raises(ConnectionError),
        DeviceReports(GROUPS, event).telling(refuse) as report,
    ):
        report(1)
