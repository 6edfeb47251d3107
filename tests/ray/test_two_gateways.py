"""Two gateways, the second a process of its own: asked for each other's requests, and killed."""

import asyncio
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import replace
from urllib.request import urlopen

import pytest

from cluster.rpc import tandem_pb2 as pb
from engine.errors import DeadlineExceeded, TandemError
from tests.ray.serving import PATIENCE_S, SMALL, command_of, descendants, metric, serve
from tests.ray.streams import ENDLESS, PROMPTS, Reader, holds_nothing, moved, request, until

CONFIG = f"""
pools: {{prefill: {{instances: 1}}, decode: {{instances: 1}}}}
gateway: {{instances: 2, http_port: 0, grpc_port: 0}}
limits: {{gateway_silence_s: 3600, answer_s: 10}}
{SMALL}
"""
"""Whatever is freed after a gateway's death is freed because it was seen, not by its silence."""
INSTANCES = ("prefill-0", "decode-0")
READY = re.compile(r"gateway ready gateway=gateway-1 http=(\S+) grpc=(\S+)")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What the first gateway's process serves."""
    folder = tmp_path_factory.mktemp("gateways")
    (folder / "config.yaml").write_text(CONFIG)
    serving = serve(folder / "serve.log", str(folder / "config.yaml"))
    yield serving
    assert serving.end() == 0, serving.log.read_text()[-4000:]


@pytest.fixture
def second(first):
    """The same seen through the second gateway's present life."""
    return second_of(first)


def second_of(first):
    http, grpc = READY.findall(first.log.read_text())[-1]
    return replace(first, http=http, grpc=grpc)


def gateway_pid(serving) -> int:
    """Of the second gateway's present life."""
    pids = descendants(serving.process.pid)
    return next(pid for pid in pids if command_of(pid).startswith(b"ray::GatewayProcess"))


async def test_either_gateway_shows_operates_and_ends_the_others_requests(first, second):
    async with second.async_client() as far, first.async_client() as near:
        reader = Reader(far, 0, ENDLESS)
        await reader.has()
        seen = []

        def shown() -> bool:
            with first.client() as client:
                seen[:] = client.status().requests
            return bool(seen)

        await until(shown)
        (one,) = seen
        assert {one.prefill, one.decode} <= set(INSTANCES)
        await until(moved(first, one.id, INSTANCES))
        with suppress(DeadlineExceeded):  # It is done, but the other gateway was slow to say so.
            await near.abort(one.id)
        await reader.task
        assert reader.finish == "abort"
        assert reader.migrations >= 1  # It goes home from an instance that only prefills.
    await until(holds_nothing(first))


async def test_both_show_the_metrics_of_the_whole_cluster(first, second):
    def stopped() -> set[float]:
        return {metric(one, 'tandem_requests_total{outcome="stop"}') for one in (first, second)}

    await until(lambda: len(stopped()) == 1)
    (before,) = stopped()
    for serving in (first, second):
        async with serving.async_client() as client:
            await asyncio.gather(*(stop_at_once(client, number) for number in range(3)))
    await until(lambda: stopped() == {before + 6})


async def stop_at_once(client, number) -> None:
    """No other request here ends with a stop token."""
    only = pb.Sampling(max_tokens=10, temperature=0.0, logit_bias={5: 100.0}, stop_token_ids=[5])
    async for chunk in client.stream(pb.GenerateRequest(text=PROMPTS[number], sampling=only)):
        assert chunk.finish_reason in ("", "stop")


def listed(serving, kind: str) -> set[str]:
    """Requests of the live page; `kind` is requests or ended."""
    with urlopen(f"{serving.http}/dashboard/data", timeout=PATIENCE_S) as reply:
        return {one["id"] for one in json.load(reply)[kind]}


async def test_either_live_page_shows_what_both_are_doing_and_did(first, second):
    async with second.async_client() as far:
        reader = Reader(far, 0, ENDLESS)
        await reader.has()
        await until(lambda: len(listed(second, "requests")) == 1)
        under_way = listed(second, "requests")
        await until(lambda: listed(first, "requests") == under_way)
        await reader.leave()
    for serving in (first, second):
        await until(lambda serving=serving: under_way <= listed(serving, "ended"))
    await until(holds_nothing(first))


async def drained(client, number) -> None:
    async for _ in client.stream(request(number, 10)):
        pass


async def test_a_killed_gateways_blocks_are_freed_and_it_comes_back(first, second):
    lives = len(READY.findall(first.log.read_text()))
    async with second.async_client() as far, first.async_client() as near:
        lost = [Reader(far, number, ENDLESS) for number in range(4)]
        kept = Reader(near, 5, 300)
        await asyncio.gather(*(one.has() for one in (*lost, kept)))
        os.kill(gateway_pid(first), signal.SIGKILL)
        results = await asyncio.gather(*(one.task for one in lost), return_exceptions=True)
        assert all(isinstance(result, TandemError) for result in results)
        await kept.task
        assert kept.finish == "length"
    await until(lambda: "lost gateway=gateway-1" in first.log.read_text())
    await until(holds_nothing(first))
    await until(lambda: len(READY.findall(first.log.read_text())) > lives)
    async with second_of(first).async_client() as again:
        await drained(again, 0)
    await until(holds_nothing(first))
