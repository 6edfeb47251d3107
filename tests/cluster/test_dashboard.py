"""The live page: its document, its doors, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from cluster.config import Config
from cluster.doors.http import HttpDoor
from cluster.doors.keys import Keyring, Unauthorized
from cluster.gateway.call import Call
from cluster.watching.dashboard import MOST_VIEWERS, Dashboard
from cluster.watching.everything import Watching
from cluster.watching.history import WholeHistory
from cluster.watching.latencies import Latencies
from cluster.watching.live import SHOWN_ENDED, SHOWN_HANDOFFS, Live
from cluster.watching.observer import Rerouted
from engine.clock import SystemClock
from engine.events import Timeline
from engine.messages import Lost, Migrate, Migrated, Role
from tests.cluster.browser import Page, chromium, needs_chromium
from tests.cluster.seats import Seat, patience, watched_by_all
from tests.cluster.serving import FakeCluster, ask, running, until
from tests.cluster.test_security import ADMIN, ALICE, write_keys
from tests.cluster.watching import ended, load, migrated, opened, timeline
from tests.cluster.watching import running as sequence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from starlette.requests import Request


CLOSE = 0.011
"""Durations are told within one per cent."""


def share(watched: Live, now: float) -> dict[str, Any]:
    return watched.share(now, 0.0, ())


def history(watched: Live, now: float) -> WholeHistory:
    whole = WholeHistory()
    whole.heard(watched.life, share(watched, now)["steps"])
    return whole


def test_a_request_is_followed_from_prefill_to_decode_to_its_end() -> None:
    watched = Live()
    watched.opened(opened())
    assert share(watched, 100.5)["requests"][0]["at"] == "prefill-0"
    watched.loaded(load(sequences=(sequence("r", output_tokens=3),)), 100.6)
    shown = share(watched, 100.7)
    assert (shown["requests"][0]["at"], shown["requests"][0]["output_tokens"]) == ("decode-0", 3)
    assert [(one["kind"], one["source"]) for one in shown["handoffs"]] == [("handoff", "prefill-0")]
    watched.ended(ended())
    shown = share(watched, 103.0)
    assert shown["requests"] == []
    (last,) = shown["ended"]
    assert (last["met"], last["at"], len(last["phases"])) == (True, "decode-0", 6)
    seen = history(watched, 103.0).observed(103.0)
    assert seen["ttft_s"]["p50"] == pytest.approx(0.3, rel=CLOSE)
    assert seen["ttft_parts_s"]["prefill"] == pytest.approx(0.2)


def test_a_request_under_way_shows_the_phases_that_are_known_so_far() -> None:
    watched, whole = Live(), timeline()
    moments = Timeline(whole.arrived_s)
    watched.opened(opened(timeline=moments))

    def names(now: float) -> list[str]:
        return [phase["name"] for phase in share(watched, now)["requests"][0]["phases"]]

    assert names(100.1) == ["to_first_token"]
    moments.prefill_started_s, moments.first_token_s = whole.prefill_started_s, whole.first_token_s
    assert names(100.32) == ["queue", "prefill", "to_second_token"]
    moments.transferred_s, moments.decode_started_s = whole.transferred_s, whole.decode_started_s
    moments.second_token_s = whole.second_token_s
    assert names(100.5)[2:] == ["transfer", "decode_queue", "first_step", "decode"]
    (running_now,) = share(watched, 100.5)["requests"]
    assert running_now["phases"][-1]["end_s"] == pytest.approx(0.5)


def test_a_migration_moves_the_request_only_when_it_committed() -> None:
    watched = Live()
    watched.opened(opened())
    watched.migrated(migrated(outcome="LeaseExpired"), 100.5)
    assert share(watched, 101.0)["requests"][0]["at"] == "decode-0"
    watched.migrated(migrated(), 100.6)
    shown = share(watched, 101.0)
    assert shown["requests"][0]["at"] == "decode-1"
    assert shown["totals"]["migrations"] == 1


def test_a_migration_stays_in_sight_however_many_hand_offs_follow() -> None:
    watched = Live()
    watched.opened(opened("moved"))
    watched.migrated(migrated("moved"), 100.1)
    for number in range(3 * SHOWN_HANDOFFS):
        watched.opened(opened(f"r{number}"))
        watched.loaded(load(sequences=(sequence(f"r{number}"),)), 101.0 + number)
    shown = share(watched, 200.0)
    assert [(move["kind"], move["request"]) for move in shown["moves"]] == [("migration", "moved")]
    assert len(shown["handoffs"]) == SHOWN_HANDOFFS


def test_a_failover_is_a_move_with_its_reason() -> None:
    watched = Live()
    watched.opened(opened())
    watched.rerouted(Rerouted("r", 100.4, "prefill-1", "decode-1", "replayed", "decode-0 is lost"))
    (move,) = share(watched, 101.0)["moves"]
    assert (move["kind"], move["target"], move["why"]) == (
        "failover",
        "prefill-1",
        "decode-0 is lost",
    )


def test_what_is_remembered_is_bounded() -> None:
    watched = Live()
    for number in range(3 * SHOWN_ENDED):
        watched.opened(opened(f"r{number}"))
        watched.ended(ended(f"r{number}"))
    shown = share(watched, 101.0)
    assert len(shown["ended"]) == SHOWN_ENDED
    assert shown["ended"][0]["id"] == f"r{3 * SHOWN_ENDED - 1}"
    whole = history(watched, 101.0)
    assert whole.observed(101.0)["attainment"] == 1.0
    assert whole.observed(100_000.0)["attainment"] is None, "long ago"
    assert whole.since(watched.life) == 0.0, "nothing is kept of it"


def test_a_refused_request_has_no_latencies_but_counts() -> None:
    watched = Live()
    watched.ended(ended("x", "refused", timeline=Timeline(5.0, finished_s=5.0), error="Overloaded"))
    shown = share(watched, 6.0)
    assert shown["totals"]["failed"] == 1
    assert json.loads(json.dumps(shown, allow_nan=False))["ended"][0]["phases"] == []
    assert history(watched, 6.0).observed(6.0)["attainment"] == 0.0


def test_percentiles_are_within_one_per_cent() -> None:
    found, values_s = Latencies(), [0.0004 * 1.01**n for n in range(1000)]
    for value_s in values_s:
        found.add(value_s)
    again = Latencies()
    again.merge(json.loads(json.dumps(found.document())))
    assert again.spread() == found.spread()
    for name, place in (("p50", 499), ("p90", 899), ("p99", 989)):
        assert found.spread()[name] == pytest.approx(values_s[place], rel=CLOSE)
    assert Latencies().spread() == {"p50": None, "p90": None, "p99": None}


def test_steps_of_several_gateways_add_up_whenever_they_are_told() -> None:
    one, two = Live(), Live()
    one.ended(ended())
    two.ended(ended("s"))
    two.ended(ended("t", "error"))
    whole = history(one, 101.0)
    assert whole.observed(101.0)["attainment"] == 1.0
    whole.heard(two.life, share(two, 101.0)["steps"])
    whole.heard(two.life, share(two, 101.0)["steps"])
    assert whole.observed(101.0)["attainment"] == pytest.approx(2 / 3), "told twice, counted once"
    assert [point["rate_rps"] for point in whole.points(104.0)] == [1.5, 0.0]
    assert two.share(101.0, whole.since(two.life), ())["steps"] != [], "it may still grow"
    two.ended(ended("u", timeline=timeline(104.0)))
    news = two.share(106.0, whole.since(two.life), ())["steps"]
    assert [step["start_s"] for step in news] == [100.0, 104.0]


# All gateways together.


async def test_each_gateway_shows_the_requests_of_all() -> None:
    async with watched_by_all("prefill-0", "decode-0") as seats:
        for seat in seats:
            await ask(seat.gateway, Call(prompts=("hello",), max_tokens=4))
        shown, other = [await seat.whole.document() for seat in seats]
        assert shown["totals"]["requests"] == 2
        assert {one["outcome"] for one in shown["ended"]} == {"length"}
        assert shown["gateways"] == [
            {"id": "gateway-0", "answers": True},
            {"id": "gateway-1", "answers": True},
        ]
        assert {one["id"] for one in other["ended"]} == {one["id"] for one in shown["ended"]}
        assert shown["observed"]["attainment"] == other["observed"]["attainment"] == 1.0


async def test_requests_under_way_are_shown_whichever_gateway_holds_them() -> None:
    async with watched_by_all("mixed-0") as (first, second):
        answer = await second.gateway.open(Call(prompts=("hello",), max_tokens=1900))
        await until(lambda: answer.output_tokens > 3)
        shown = await first.whole.document()
        assert [one["at"] for one in shown["requests"]] == ["mixed-0"]
        assert (shown["totals"]["running"], shown["totals"]["waiting"]) == (1, 0)
        second.gateway.close(answer)


async def test_requests_that_nobody_could_take_yet_are_shown_as_waiting() -> None:
    async with watched_by_all("mixed-0") as (first, second):
        second.gateway.receive("controller", Lost("mixed-0"))
        waits = await second.gateway.open(Call(prompts=("hello",), max_tokens=4))
        shown = await first.whole.document()
        assert [(one["id"], one["at"]) for one in shown["requests"]] == [(waits.id, None)]
        assert (shown["totals"]["running"], shown["totals"]["waiting"]) == (1, 1)
        second.gateway.close(waits)


async def test_what_a_gateway_did_is_still_shown_when_it_is_gone_but_nothing_under_way() -> None:
    async with watched_by_all("mixed-0") as (first, second):
        await ask(second.gateway, Call(prompts=("hello",), max_tokens=4))
        answer = await second.gateway.open(Call(prompts=("hello",), max_tokens=1900))
        await until(lambda: answer.output_tokens > 3)
        assert (await first.whole.document())["totals"]["running"] == 1
        first.gateway.peers.follow(("gateway-0",))
        shown = await first.whole.document()
        assert (shown["totals"]["requests"], shown["totals"]["running"]) == (1, 0)
        assert shown["requests"] == []
        assert [one["id"] for one in shown["gateways"]] == ["gateway-0"]
        second.gateway.close(answer)


async def test_a_gateway_that_does_not_answer_is_named() -> None:
    async with watched_by_all("mixed-0") as (first, second):
        first.cluster.network.kill(second.gateway.link.name)
        shown = await first.whole.document()
        assert [one["answers"] for one in shown["gateways"]] == [True, False]


async def test_all_who_look_at_once_see_the_same_document() -> None:
    async with watched_by_all("mixed-0", kept_s=60.0) as (first, _):
        one, two = await asyncio.gather(first.whole.document(), first.whole.document())
        assert one is two


def test_the_page_asks_nobody_else_for_anything() -> None:
    for kind in ("html", "css", "js"):
        text = files("cluster.watching").joinpath(f"static/dashboard.{kind}").read_text()
        outside = re.findall(r"https?://[^\s\"']+|//cdn[^\s\"']+", text)
        assert [url for url in outside if url != "http://www.w3.org/2000/svg"] == []


def asgi_of(seat: Seat, admit: Callable[[Request], object]) -> httpx.AsyncClient:
    app = Starlette(routes=Dashboard(seat.whole, admit).routes())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_the_page_is_open_but_what_it_shows_wants_a_key() -> None:
    def admit(request: Request) -> None:
        if request.headers.get("authorization") != "Bearer secret":
            raise Unauthorized("no valid key")

    async with watched_by_all("mixed-0", gateways=1) as (seat,), asgi_of(seat, admit) as client:
        page = await client.get("/dashboard")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert (await client.get("/dashboard/data")).status_code == 401
        assert (await client.get("/dashboard/stream")).status_code == 401
        headers = {"authorization": "Bearer secret"}
        data = await client.get("/dashboard/data", headers=headers)
        assert data.json()["model"] == "demo"


async def test_what_the_page_shows_of_every_tenant_wants_an_operators_key(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.yaml")
    keys = Keyring(tmp_path / "keys.yaml", 0.0)
    async with watched_by_all("mixed-0", gateways=1) as (seat,):
        app = Starlette(routes=Watching(Config(), SystemClock()).routes(seat.whole, keys))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path in ("/dashboard/data", "/dashboard/stream"):
                assert (await client.get(path)).status_code == 401
                refused = await client.get(path, headers={"authorization": f"Bearer {ALICE}"})
                assert refused.status_code == 403
                assert refused.json()["error"]["code"] == "not_an_operator"
            headers = {"authorization": f"Bearer {ADMIN}"}
            assert (await client.get("/dashboard/data", headers=headers)).status_code == 200


async def test_viewers_are_bounded_and_leave() -> None:
    async with watched_by_all("mixed-0", gateways=1) as (seat,):
        dashboard = Dashboard(seat.whole, refresh_s=0.001)
        streams = [dashboard._updates() for _ in range(MOST_VIEWERS)]
        for stream in streams:
            assert (await anext(stream)).startswith(b"data: {")
        transport = httpx.ASGITransport(Starlette(routes=dashboard.routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/dashboard/stream")).status_code == 429
        for stream in streams:
            await stream.aclose()
        assert dashboard._viewers == 0


# The page in a browser, over a gateway with fake instances.


class Scene:
    """What a test needs of the cluster behind the page."""

    def __init__(self, cluster: FakeCluster, urls: list[str]) -> None:
        self.cluster, self.urls = cluster, urls

    @property
    def url(self) -> str:
        return self.urls[0]

    async def ask(self, gateway: int = 0, **changes: Any) -> dict[str, Any]:
        body = {"model": "fake", "prompt": "hello", "max_tokens": 8, "ignore_eos": True, **changes}
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(f"{self.urls[gateway]}/v1/completions", json=body)
        return answer.json()


@asynccontextmanager
async def served(gateways: int = 1) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        stack.enter_context(patience(5.0))  # less than a page is waited for
        names = ("prefill-0", "decode-0", "decode-1")
        cluster = await stack.enter_async_context(running(*names, gateways=gateways))
        urls = [
            await stack.enter_async_context(_door(Seat.at(cluster, gateway, 0.0)))
            for gateway in cluster.gateways.values()
        ]
        beating = asyncio.create_task(_beat(cluster))
        yield Scene(cluster, urls)
        beating.cancel()


@asynccontextmanager
async def _door(seat: Seat) -> AsyncIterator[str]:
    dashboard = Dashboard(seat.whole, refresh_s=0.05)
    door = HttpDoor(seat.gateway, extra=dashboard.routes())
    server = uvicorn.Server(
        uvicorn.Config(door.app, port=0, log_level="error", lifespan="off", ws="none")
    )
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = server.force_exit = True
    await serving


async def _beat(cluster: FakeCluster) -> None:
    """Heartbeats, as instances send them."""
    while True:
        for name, instance in cluster.instances.items():
            for gateway in cluster.gateways:
                cluster.links[name].send(gateway, instance.load())
        await asyncio.sleep(0.02)


@asynccontextmanager
async def seen(gateways: int = 1) -> AsyncIterator[tuple[Scene, Page]]:
    async with served(gateways) as scene, chromium() as page:
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
async def test_one_gateways_page_counts_and_lists_the_requests_of_the_other() -> None:
    async with seen(gateways=2) as (scene, page):
        await page.until("#gateways", lambda text: text == "2 gateways")
        answers = await asyncio.gather(scene.ask(0), scene.ask(1), scene.ask(1))
        await page.until('[data-fact="ended"]', lambda text: text == "3")
        listed = await page.until("#ended tbody", lambda text: text.count("length") == 3)
        assert all(answer["id"] in listed for answer in answers)
        del scene.cluster.gateways["gateway-1"]  # nobody sends it heartbeats either
        scene.cluster.network.kill("gateway-1")
        await page.until("#gateways", lambda text: text == "gateway-1 does not answer")
        assert await page.text('[data-fact="ended"]') == "3"


@needs_chromium
async def test_a_migration_is_seen_to_move() -> None:
    async with seen() as (scene, page):
        cluster = scene.cluster
        cluster.paused.add("decode-0")
        asking = asyncio.create_task(scene.ask(max_tokens=40))
        batch = '[data-instance="decode-0"] [data-fact="batch"]'
        await page.until(batch, lambda text: text == "1")
        request_id = next(iter(cluster.instances["decode-0"].sequences))
        assert request_id in await page.until("#moves", lambda text: "hand-off" in text)
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
        assert "first token" in await page.until("#detail-body", lambda text: text != "")
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
