"""What `tandem serve` waits for before it is ready; the controller is a fake."""

from types import SimpleNamespace

import pytest

from cluster.cli import progress
from cluster.cli.progress import STAGES, show_progress
from cluster.control.controller import InstanceReport
from cluster.gateway.operate import instance_document
from cluster.roster import InstanceSpec
from engine.errors import InstanceLost
from engine.messages import Role

SPEC = InstanceSpec("mixed-0", Role.MIXED, "cpu")
GIVEN_UP = InstanceReport(SPEC, "given up", 0.0, None, None, "CUDA out of memory")


class Reporting:
    """A controller that reports one stage after another."""

    def __init__(self, *reports: InstanceReport) -> None:
        self._reports = iter(reports)
        self.told = 0
        self.report = SimpleNamespace(remote=self._report)

    async def _report(self) -> tuple[InstanceReport, ...]:
        self.told += 1
        return (next(self._reports),)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "LOOK_S", 0.0)


async def test_a_start_is_followed_through_every_stage_until_all_is_ready():
    stages = ("waiting", "placing", "stopping", *STAGES)
    controller = Reporting(*(InstanceReport(SPEC, stage, 0.5, None, None) for stage in stages))
    await show_progress(controller, lambda: controller.told == len(stages))


async def test_a_start_ends_with_the_reason_once_an_instance_is_given_up():
    waiting = InstanceReport(SPEC, "waiting", 0.0, None, None)
    with pytest.raises(InstanceLost, match="mixed-0 has been given up: CUDA out of memory"):
        await show_progress(Reporting(waiting, GIVEN_UP), lambda: False)


def test_status_tells_who_starts_from_who_stops_and_from_who_was_given_up():
    starting, stopping = (
        InstanceReport(SPEC, stage, 0.5, None, None) for stage in ("loading", "stopping")
    )
    states = [instance_document(report)["state"] for report in (starting, stopping, GIVEN_UP)]
    assert states == ["starting", "stopped", "given up"]
