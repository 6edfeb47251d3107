"""The life of a deployment, without a Ray: who is told to stop, and when."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster import deploy
from cluster.config import Config
from engine.errors import InstanceLost


class Part:
    """A front, or the gateways beside it."""

    http_url, grpc_address = "http://127.0.0.1:1", "127.0.0.1:2"

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def run(self) -> None:
        await asyncio.Event().wait()

    def __getattr__(self, verb):
        async def asked() -> None:
            self.asked.append(verb)

        return asked


class FakeController:
    def __init__(self) -> None:
        self.stopped = 0
        self.renew = SimpleNamespace(remote=self._renew)
        self.shut_down = SimpleNamespace(remote=self._shut_down)

    async def _renew(self) -> None: ...

    async def _shut_down(self) -> None:
        self.stopped += 1


@pytest.fixture
def parts(monkeypatch):
    front, companions = Part(), Part()
    front.ready = lambda: True
    monkeypatch.setattr(deploy, "Front", lambda *_: front)
    monkeypatch.setattr(deploy, "Companions", lambda *_: companions)
    monkeypatch.setattr(deploy, "spare_what_is_loaded", lambda: None)
    return front, companions


async def test_a_start_that_fails_leaves_no_instance_behind(monkeypatch, parts):
    async def fails(*_) -> None:
        raise InstanceLost("mixed-0 has been given up")

    monkeypatch.setattr(deploy, "show_progress", fails)
    controller, said = FakeController(), []
    with pytest.raises(ExceptionGroup) as caught:
        await deploy._Deployment(Config(), None, controller, said.append).run(None)
    assert isinstance(deploy._first_cause(caught.value), InstanceLost)
    assert (controller.stopped, said) == (1, [])
    assert parts[0].asked == ["close"]


async def test_an_ending_drains_every_gateway_before_the_instances_stop(monkeypatch, parts):
    async def shown(*_) -> None: ...

    monkeypatch.setattr(deploy, "show_progress", shown)
    controller = FakeController()
    one = deploy._Deployment(
        Config(), None, controller, lambda _: one._end(deploy.signal.Signals.SIGTERM)
    )
    await one.run(None)
    assert controller.stopped == 1
    assert parts[0].asked == ["open_doors", "drain", "close"]
    assert parts[1].asked == ["opened", "drain", "stop"]
