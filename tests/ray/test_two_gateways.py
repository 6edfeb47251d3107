"""Two gateways, the second a process of its own: asked for each other's requests, and killed."""

import asyncio
import os
import re
import signal
import urllib.request
from dataclasses import replace

import pytest

from engine.errors import TandemError
from tests.ray.serving import command_of, descendants, serve
from tests.ray.streams import Reader, holds_nothing, request, until

CONFIG = """
pools: {prefill: {instances: 1}, decode: {instances: 1}}
gateway: {instances: 2, http_port: 0, grpc_port: 0}
"""
READY = re.compile(r"gateway ready gateway=gateway-1 http=(\S+) grpc=(\S+)")
FREED_S = 10.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What the first gateway's process serves, and the same seen through the second."""
    folder = tmp_path_factory.mktemp("gateways")
    (folder / "config.yaml").write_text(CONFIG)
    first = serve(folder / "serve.log", str(folder / "config.yaml"))
    yield first, second_of(first)
    assert first.end() == 0, first.log.read_text()[-4000:]


def second_of(first):
    http, grpc = READY.findall(first.log.read_text())[-1]
    return replace(first, http=http, grpc=grpc)


def gateway_pid(serving) -> int:
    """Of the second gateway's present life."""
    pids = descendants(serving.process.pid)
    return next(pid for pid in pids if command_of(pid).startswith(b"ray::GatewayProcess"))


def metric(serving, name: str) -> float:
    with urllib.request.urlopen(f"{serving.http}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def test_either_gateway_shows_operates_and_ends_the_others_requests(pair):
    first, second = pair
    async with second.async_client() as far, first.async_client() as near:
        reader = Reader(far, 0, 900)
        await reader.begun.wait()
        (seen,) = (await near.status()).requests
        assert (seen.prefill, seen.decode) == ("prefill-0", "decode-0")
        await near.migrate(seen.id, "prefill-0")

        def moved() -> bool:
            with first.client() as client:
                return bool(client.status().requests[0].migrations)

        await until(moved)
        await near.abort(seen.id)
        await reader.task
        assert reader.finish == "abort"
        assert reader.migrations >= 1  # it goes home from an instance that only prefills
    await until(holds_nothing(first))


async def test_both_show_the_metrics_of_the_whole_cluster(pair):
    first, second = pair
    total = "tandem_requests_total"
    await until(lambda: metric(first, total) == metric(second, total))
    before = metric(first, total)
    for serving in pair:
        async with serving.async_client() as client:
            await asyncio.gather(*(drained(client, number) for number in range(3)))

    def agree() -> bool:
        return {metric(one, total) for one in pair} == {before + 6}

    await until(agree)


async def drained(client, number) -> None:
    async for _ in client.stream(request(number, 10)):
        pass


async def test_a_killed_gateways_blocks_are_freed_and_it_comes_back(pair):
    first, second = pair
    async with second.async_client() as far, first.async_client() as near:
        lost = [Reader(far, number, 3000) for number in range(4)]
        kept = Reader(near, 5, 300)
        await asyncio.gather(*(one.begun.wait() for one in (*lost, kept)))
        os.kill(gateway_pid(first), signal.SIGKILL)
        results = await asyncio.gather(*(one.task for one in lost), return_exceptions=True)
        assert all(isinstance(result, TandemError) for result in results)
        await kept.task
        assert kept.finish == "length"
    await until(holds_nothing(first), FREED_S)
    await until(lambda: len(READY.findall(first.log.read_text())) == 2)
    async with second_of(first).async_client() as again:
        await drained(again, 0)
    await until(holds_nothing(first))
