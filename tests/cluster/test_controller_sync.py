"""How long a member waits for its controller, and what a controller clears away; Ray is a fake."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster.actors import ControllerSync
from cluster.config import Config
from cluster.control import placing
from cluster.roster import Kind, Member, Roster
from engine.errors import DeadlineExceeded, InstanceLost

ME = Member("gateway-0", Kind.GATEWAY, "1", "ipc:///gateway-0")


class FakeController:
    """Answers each call as its script says: an error, a roster, or never."""

    def __init__(self, *script):
        self.script, self.known = list(script), []
        self.sync = SimpleNamespace(remote=self._sync)

    async def _sync(self, me, known, wait_s):
        assert me == ME
        self.known.append(known)
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return await asyncio.Event().wait() if answer is None else answer


def controlled_by(monkeypatch, controller):
    monkeypatch.setattr("cluster.actors.RETRY_S", 0.0)
    monkeypatch.setattr("cluster.actors.find_controller", lambda: controller)


async def test_a_member_asks_again_while_the_controllers_successor_starts(monkeypatch):
    lost = InstanceLost("the actor is restarting")
    controller = FakeController(lost, lost, Roster(7))
    controlled_by(monkeypatch, controller)
    assert await ControllerSync(Config().limits.controller_s)(ME, 5) == Roster(7)
    assert controller.known == [5, 5, 5]


async def test_a_member_gives_a_controller_up_that_does_not_come_back(monkeypatch):
    controlled_by(monkeypatch, FakeController(None))
    with pytest.raises(DeadlineExceeded):
        await ControllerSync(patience_s=0.0, poll_s=0.0)(ME, 5)


async def test_a_leftover_group_is_removed_and_told_once_however_long_ray_takes(
    monkeypatch, caplog
):
    looks, removed = iter(["group", "group", "group"]), []

    def get(name):
        try:
            return next(looks)
        except StopIteration:
            raise ValueError(name) from None

    monkeypatch.setattr(placing, "GONE_POLL_S", 0.001)
    monkeypatch.setattr(placing, "get_placement_group", get)
    monkeypatch.setattr(placing, "remove_placement_group", removed.append)
    await placing._remove_group("tandem-decode-0")
    assert removed == ["group"]
    assert caplog.text.count("leftover removed placement_group=tandem-decode-0") == 1
