"""The live page: its document, its doors, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from cluster.doors.http import HttpDoor
from cluster.doors.keys import Unauthorized
from cluster.watching.dashboard import MOST_VIEWERS, Dashboard
from cluster.watching.live import SHOWN_ENDED, Live
from cluster.watching.observer import Rerouted
from engine.clock import SystemClock
from engine.events import Timeline
from engine.messages import Migrate, Migrated, Role
from engine.slo import Slo
from tests.cluster.browser import Page, chromium, needs_chromium
from tests.cluster.serving import FakeCluster, running, until
from tests.cluster.watching import ended, load, migrated, opened
from tests.cluster.watching import running as sequence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp

PREDICTED = {"ttft_s": {"p50": 0.2, "p90": 0.4, "p99": 0.6}, "attainment": 0.95}


def live() -> Live:
    return Live("demo", Slo(), 0.9, PREDICTED)


def test_a_request_is_followed_from_prefill_to_decode_to_its_end() -> None:
    watched = live()
    watched.opened(opened())
    assert watched.snapshot(100.5)["requests"][0]["at"] == "prefill-0"
    watched.loaded(load(sequences=(sequence("r", output_tokens=3),)), 100.6)
    shown = watched.snapshot(100.7)
    assert (shown["requests"][0]["at"], shown["requests"][0]["output_tokens"]) == ("decode-0", 3)
    assert [(move["kind"], move["source"]) for move in shown["moves"]] == [("handoff", "prefill-0")]
    watched.ended(ended())
    shown = watched.snapshot(103.0)
    assert shown["requests"] == []
    (last,) = shown["ended"]
    assert (last["met"], last["at"], len(last["phases"])) == (True, "decode-0", 6)
    assert shown["observed"]["ttft_s"]["p50"] == pytest.approx(0.3)
    assert shown["observed"]["ttft_parts_s"]["prefill"] == pytest.approx(0.2)


def test_a_migration_moves_the_request_only_when_it_committed() -> None:
    watched = live()
    watched.opened(opened())
    watched.migrated(migrated(outcome="LeaseExpired"), 100.5)
    assert watched.snapshot(101.0)["requests"][0]["at"] == "decode-0"
    watched.migrated(migrated(), 100.6)
    shown = watched.snapshot(101.0)
    assert shown["requests"][0]["at"] == "decode-1"
    assert shown["totals"]["migrations"] == 1


def test_a_failover_is_a_move_with_its_reason() -> None:
    watched = live()
    watched.opened(opened())
    watched.rerouted(Rerouted("r", 100.4, "prefill-1", "decode-1", "replayed", "decode-0 is lost"))
    (move,) = watched.snapshot(101.0)["moves"]
    assert (move["kind"], move["target"], move["why"]) == (
        "failover",
        "prefill-1",
        "decode-0 is lost",
    )


def test_what_is_remembered_is_bounded() -> None:
    watched = live()
    for number in range(3 * SHOWN_ENDED):
        watched.opened(opened(f"r{number}"))
        watched.ended(ended(f"r{number}"))
    shown = watched.snapshot(101.0)
    assert len(shown["ended"]) == SHOWN_ENDED
    assert shown["ended"][0]["id"] == f"r{3 * SHOWN_ENDED - 1}"
    assert watched.snapshot(100_000.0)["observed"]["attainment"] is None, "long ago"


def test_a_refused_request_has_no_latencies_but_counts() -> None:
    watched = live()
    watched.ended(ended("x", "refused", timeline=Timeline(5.0, finished_s=5.0), error="Overloaded"))
    shown = watched.snapshot(6.0)
    assert (shown["totals"]["failed"], shown["observed"]["attainment"]) == (1, 0.0)
    assert json.loads(json.dumps(shown, allow_nan=False))["ended"][0]["phases"] == []


def test_the_page_asks_nobody_else_for_anything() -> None:
    for kind in ("html", "css", "js"):
        text = files("cluster.watching").joinpath(f"static/dashboard.{kind}").read_text()
        outside = re.findall(r"https?://[^\s\"']+|//cdn[^\s\"']+", text)
        assert [url for url in outside if url != "http://www.w3.org/2000/svg"] == []


def asgi(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_the_page_is_open_but_what_it_shows_wants_a_key() -> None:
    def admit(request: Request) -> None:
        if request.headers.get("authorization") != "Bearer secret":
            raise Unauthorized("no valid key")

    app = Starlette(routes=Dashboard(live(), lambda: 1.0, admit).routes())
    async with asgi(app) as client:
        page = await client.get("/dashboard")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert (await client.get("/dashboard/data")).status_code == 401
        assert (await client.get("/dashboard/stream")).status_code == 401
        headers = {"authorization": "Bearer secret"}
        data = await client.get("/dashboard/data", headers=headers)
        assert data.json()["model"] == "demo"


async def test_viewers_are_bounded_and_leave() -> None:
    dashboard = Dashboard(live(), lambda: 1.0, refresh_s=0.001)
    streams = [dashboard._updates() for _ in range(MOST_VIEWERS)]
    for stream in streams:
        assert (await anext(stream)).startswith(b"data: {")
    async with asgi(Starlette(routes=dashboard.routes())) as client:
        assert (await client.get("/dashboard/stream")).status_code == 429
    for stream in streams:
        await stream.aclose()
    assert dashboard._viewers == 0


# The page in a browser, over a gateway with fake instances.


class Scene:
    """What a test needs of the cluster behind the page."""

    def __init__(self, cluster: FakeCluster, url: str) -> None:
        self.cluster, self.url = cluster, url

    async def ask(self, **changes: Any) -> dict[str, Any]:
        body = {"model": "fake", "prompt": "hello", "max_tokens": 8, "ignore_eos": True, **changes}
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(f"{self.url}/v1/completions", json=body)
        return answer.json()


@asynccontextmanager
async def served() -> AsyncIterator[Scene]:
    watched = live()
    names = ("prefill-0", "decode-0", "decode-1")
    async with running(*names, observers=[watched]) as cluster:
        dashboard = Dashboard(watched, SystemClock().now, refresh_s=0.05)
        door = HttpDoor(cluster.gateway, extra=dashboard.routes())
        server = uvicorn.Server(
            uvicorn.Config(door.app, port=0, log_level="error", lifespan="off", ws="none")
        )
        serving = asyncio.create_task(server.serve())
        beating = asyncio.create_task(_beat(cluster))
        await until(lambda: server.started, turns=1_000_000)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Scene(cluster, f"http://127.0.0.1:{port}")
        beating.cancel()
        server.should_exit = server.force_exit = True
        await serving


async def _beat(cluster: FakeCluster) -> None:
    """Heartbeats, as instances send them."""
    while True:
        for name, instance in cluster.instances.items():
            cluster.links[name].send("gateway-0", instance.load())
        await asyncio.sleep(0.02)


@asynccontextmanager
async def seen() -> AsyncIterator[tuple[Scene, Page]]:
    async with served() as scene, chromium() as page:
        await page.look()
        await page.open(f"{scene.url}/dashboard")
        await page.until("#link", lambda text: text == "live")
        yield scene, page
        assert await page.complaints() == []


@needs_chromium
async def test_counts_move_when_requests_come() -> None:
    async with seen() as (scene, page):
        assert await page.text("#model") == "demo"
        assert await page.text('[data-fact="ended"]') == "0"
        await asyncio.gather(*(scene.ask() for _ in range(3)))
        await page.until('[data-fact="ended"]', lambda text: text == "3")
        assert await page.run("return document.querySelectorAll('#ended tbody tr').length") == 3
        assert await page.run("return document.querySelectorAll('.instance').length") == 3
        assert "100%" in await page.until('[data-fact="within targets"]', lambda text: "%" in text)


@needs_chromium
async def test_a_migration_is_seen_to_move() -> None:
    async with seen() as (scene, page):
        cluster = scene.cluster
        cluster.paused.add("decode-0")
        asking = asyncio.create_task(scene.ask(max_tokens=40))
        batch = '[data-instance="decode-0"] [data-fact="batch"]'
        await page.until(batch, lambda text: text == "1")
        request_id = next(iter(cluster.instances["decode-0"].sequences))
        assert request_id in await page.until(
            "#moves", lambda text: "hand-off" in text or text != ""
        )
        cluster.paused.add("decode-1")
        cluster.tell("decode-0", Migrate(request_id, "decode-1", "operator"))
        moved = Migrated(
            request_id, "decode-0", "decode-1", "operator", "committed", 0.004, 0.02, 64
        )
        cluster.resume("decode-0")
        cluster.gateway.receive("decode-0", moved)
        await page.until('[data-fact="migrations"]', lambda text: text == "1")
        await page.until("#moves", lambda text: "decode-0 → decode-1" in text)
        cluster.resume("decode-1")
        await asking
        await page.until('[data-fact="running"]', lambda text: text == "0")


@needs_chromium
async def test_a_timeline_opens_and_closes_from_the_keyboard() -> None:
    async with seen() as (scene, page):
        await scene.ask()
        await page.until("#ended tbody", lambda text: "length" in text)
        await page.run("document.querySelector('#ended button').focus()")
        await page.press("enter")
        assert "first token after" in await page.until("#detail-body", lambda text: text != "")
        assert await page.run("return document.getElementById('detail').open")
        await page.press("escape")
        assert not await page.run("return document.getElementById('detail').open")
        focused = "return document.activeElement.closest('#ended') !== null"
        assert await page.run(focused), "focus is back where it was"


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
async def test_nothing_is_cut_off_at_any_width(width: int) -> None:
    async with seen() as (scene, page):
        await page.look(width=width)
        await scene.ask()
        await page.until('[data-fact="ended"]', lambda text: text == "1")
        overflow = (
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert await page.run(overflow) == 0


@needs_chromium
async def test_an_instance_that_changes_its_role_changes_its_pool() -> None:
    async with seen() as (scene, page):
        scene.cluster.instances["decode-1"].role = Role.MIXED
        await page.until("#pools", lambda text: "mixed" in text)
