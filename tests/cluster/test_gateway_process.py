"""The life of a gateway beside the serve process's own, with a front that does as it is told."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from cluster.config import Config
from cluster.gateway import process
from engine.errors import InstanceLost
from tests.cluster.serving import until


class Front:
    """Runs until it is broken or cancelled."""

    http_url, grpc_address = "http://127.0.0.1:1", "127.0.0.1:2"

    def __init__(self, *_) -> None:
        self.gateway = SimpleNamespace(ready=False)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.running = self.doors_open = False
        self.closed = False

    async def run(self) -> None:
        self.running = True
        await self.broken

    async def open_doors(self) -> None:
        self.doors_open = True

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def fronts(monkeypatch):
    made: list[Front] = []
    model: Future[None] = Future()
    model.set_result(None)

    def make(*arguments) -> Front:
        made.append(Front(*arguments))
        return made[-1]

    monkeypatch.setattr(process, "Front", make)
    monkeypatch.setattr(process, "read_model", lambda _: model)
    monkeypatch.setattr(process, "set_up_logging", lambda: None)
    return made


async def opening(fronts: list[Front]) -> tuple[process.GatewayProcess, asyncio.Task, Front]:
    one = process.GatewayProcess(Config().model_dump_json(), None, None, 1)
    task = asyncio.create_task(one.open())
    await until(lambda: fronts and fronts[0].running)
    return one, task, fronts[0]


async def test_it_opens_its_doors_once_requests_would_be_served(fronts):
    one, task, front = await opening(fronts)
    assert not front.doors_open
    front.gateway.ready = True
    assert await task == (front.http_url, front.grpc_address)
    assert front.doors_open
    await end(one)
    assert front.closed


async def end(one: process.GatewayProcess) -> None:
    """As its keeper does, who waits for its end and then has it stopped."""
    ended = asyncio.create_task(one.ended())
    await asyncio.sleep(0)
    await one.stop()
    await ended


async def test_a_front_that_breaks_before_it_is_ready_ends_the_opening(fronts):
    _, task, front = await opening(fronts)
    front.broken.set_exception(InstanceLost("its link is broken"))
    with pytest.raises(InstanceLost, match="its link is broken"):
        await task
    assert front.closed
    assert not front.doors_open


async def test_one_that_is_stopped_before_it_is_ready_does_not_open(fronts):
    one, task, front = await opening(fronts)
    await one.stop()
    with pytest.raises(InstanceLost, match="stopped before it was ready"):
        await task
    assert front.closed
    assert not front.doors_open
