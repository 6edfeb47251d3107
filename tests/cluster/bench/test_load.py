"""Loads against a server whose latencies are known."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cluster.bench.arrange import Arrangement, Synthetic, Talk, draw
from cluster.bench.goodput import Search, find_goodput
from cluster.bench.http import parse_target
from cluster.bench.run import Bench, Measured, Plan, whole_document
from cluster.bench.server import Settings, connect
from engine.errors import BadInput, TransportError
from engine.slo import Slo
from tests.cluster.bench.simulated import Behaviour, Latency, SimulatedServer

if TYPE_CHECKING:
    from placement.workload import Workload

QUICK = Latency(ttft_median_s=0.02, ttft_sigma=0.3, gap_s=(0.001, 0.002))
MET = Slo(ttft_s=600.0, tpot_s=600.0)
"""On the slowest machine."""


def few(requests: int = 20, **changes: object) -> Workload:
    recipe = {"requests": requests, "rate_rps": 200.0, "prompt_tokens": 32, "output_tokens": 5}
    return draw(Synthetic(**{**recipe, **changes}))  # type: ignore[arg-type]


async def measure(plan: Plan, *behaviours: Behaviour) -> tuple[list[Measured], SimulatedServer]:
    servers = [SimulatedServer(one) for one in behaviours]
    targets = [parse_target(await one.start()) for one in servers]
    measured = await Bench(plan).run(targets)
    for server in servers:
        server.close()
    return measured, servers[0]


async def test_every_request_is_sent_as_planned_and_counted() -> None:
    plan = Plan(Arrangement(few(), MET), warm_up=0)
    (found,), server = await measure(plan, Behaviour(QUICK, parts=True))
    figures = found.document()
    assert (figures["requests"], figures["finished"], figures["failed"]) == (20, 20, 0)
    assert figures["attainment"] == 1.0
    assert figures["ttft_parts_s"]["prefill"] == pytest.approx(0.05)
    assert figures["ttft_parts_s"]["transfer"] is None
    assert {len(body["prompt"]) for body in server.bodies} == {32}
    assert all(body["ignore_eos"] and body["min_tokens"] == 5 for body in server.bodies)
    assert len({tuple(body["prompt"][:3]) for body in server.bodies}) == 20
    assert json.loads(json.dumps(whole_document([figures]), allow_nan=False))["notes"] == [
        "prompt seed 0"
    ]


async def test_a_stall_shows_in_every_request_that_was_due_during_it() -> None:
    stalling = Latency(0.001, 0.0, (0.0, 0.0), stall_at=10, stall_s=0.3)
    plan = Plan(Arrangement(few(40), Slo(ttft_s=0.1)), warm_up=0)
    (found,), _ = await measure(plan, Behaviour(stalling))
    due_s = [one.due_s for one in found.samples]
    late = sum(due_s[10] - 0.001 <= due <= due_s[10] + 0.2 for due in due_s)
    assert sum(one.ttft_s is not None and one.ttft_s > 0.1 for one in found.samples) >= late - 2
    assert found.document()["attainment"] < 1


async def test_failures_count_against_attainment() -> None:
    plan = Plan(Arrangement(few(), MET), warm_up=0)
    (found,), _ = await measure(plan, Behaviour(QUICK, fails_every=4))
    figures = found.document()
    assert (figures["failed"], figures["attainment"]) == (5, 0.75)
    assert figures["errors"] == {"HTTP 503: on purpose": 5}


async def test_a_server_that_closes_after_each_answer_is_measured_all_the_same() -> None:
    plan = Plan(Arrangement(few()), warm_up=2)
    (found,), _ = await measure(plan, Behaviour(QUICK, closes_after_each=True))
    assert all(one.finished and len(one.token_s) == 5 for one in found.samples)


async def test_a_server_that_never_ends_is_given_up_on() -> None:
    slow = Behaviour(Latency(ttft_median_s=6000.0))
    plan = Plan(Arrangement(few(2)), warm_up=0, settings=Settings(timeout_s=3.0))
    (found,), _ = await measure(plan, slow)
    assert {one.error for one in found.samples} == {"no answer within 3 s"}


async def test_closed_loop_keeps_its_users_and_no_more() -> None:
    plan = Plan(Arrangement(few()), concurrency=3, warm_up=0)
    (found,), server = await measure(plan, Behaviour(QUICK))
    assert all(one.finished for one in found.samples)
    assert server.connections <= 4


async def test_servers_take_turns_over_the_same_requests() -> None:
    plan = Plan(Arrangement(few()), rounds=2, warm_up=0)
    slower = Latency(ttft_median_s=1.0, ttft_sigma=0.0, gap_s=(0.001, 0.002))
    measured, _ = await measure(plan, Behaviour(QUICK), Behaviour(slower))
    first, second = (one.document() for one in measured)
    assert [one.index for one in measured[0].samples] == [one.index for one in measured[1].samples]
    assert {one.round for one in measured[0].samples} == {0, 1}
    assert first["ttft_s"]["p50"] < second["ttft_s"]["p50"]
    assert whole_document([first, second])["vs"] == [second]


async def test_turns_carry_what_was_said_before() -> None:
    talk = Talk(turns=2, think_s=0.01)
    (found,), server = await measure(Plan(Arrangement(few(2), talk=talk), warm_up=0), Behaviour())
    assert sorted(one.index for one in found.samples) == [0, 1, 2, 3]
    opening = server.bodies[0]["prompt"]
    later = [body["prompt"] for body in server.bodies if body["prompt"] != opening]
    assert any(prompt.startswith(f"{opening}  t0 t1 t2 t3 t4") for prompt in later)


async def test_chat_turns_are_messages() -> None:
    plan = Plan(Arrangement(few(1), talk=Talk(2, 0.0)), warm_up=0, settings=Settings(chat=True))
    (found,), server = await measure(plan, Behaviour(QUICK))
    assert found.samples[1].finished
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


async def test_shared_prefixes_are_shared_token_for_token() -> None:
    load = few(12, prefixes=2, prefix_tokens=16)
    _, server = await measure(Plan(Arrangement(load), warm_up=0), Behaviour(QUICK))
    assert len({tuple(body["prompt"][:16]) for body in server.bodies}) == 2
    assert len({tuple(body["prompt"][16:]) for body in server.bodies}) == 12
    assert {len(body["prompt"]) for body in server.bodies} == {48}


async def test_the_dialect_falls_back_to_what_the_server_takes() -> None:
    behaviour = Behaviour(tokens_accepted=False, ignore_eos_accepted=False, usage=False)
    server = SimulatedServer(behaviour)
    found = await connect(parse_target(await server.start()), Settings())
    assert len(found.dialect.notes) == 3
    found.close()
    server.close()


async def test_text_prompts_are_fitted_to_the_servers_tokenizer() -> None:
    plan = Plan(Arrangement(few(1, prompt_tokens=50)), warm_up=0)
    (found,), _ = await measure(plan, Behaviour(QUICK, tokens_accepted=False))
    assert found.samples[0].prompt_tokens == 50


async def test_goodput_is_bracketed_and_bisected() -> None:
    asked: list[float] = []

    async def attainment_at(rate_rps: float) -> float:
        asked.append(rate_rps)
        return 1.0 if rate_rps <= 7.3 else 0.0

    found = await find_goodput(Search(start_rps=1.0, tolerance=0.05), attainment_at)
    assert found == pytest.approx(7.3, rel=0.05)
    assert asked[:4] == [1.0, 2.0, 4.0, 8.0]


async def test_goodput_of_a_server_that_never_holds_is_none() -> None:
    async def never(_: float) -> float:
        return 0.0

    assert await find_goodput(Search(start_rps=0.04, lowest_rps=0.01), never) is None


async def test_goodput_search_reports_the_rate_that_held() -> None:
    search = Search(start_rps=100.0, attainment=0.9, probe_s=0.3, highest_rps=200.0)
    plan = Plan(Arrangement(few(), MET), search=search, warm_up=0)
    (found,), _ = await measure(plan, Behaviour(QUICK))
    document = found.document()
    assert document["goodput_rps"] == 200.0
    assert [probe["rate_rps"] for probe in document["probes"]] == [100.0, 200.0]
    assert document["requests"] == 60, "0.3 s at 200/s"
    assert document["rate_rps"] == pytest.approx(200.0, rel=0.02)


async def test_a_run_begins_when_all_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimulatedServer(Behaviour(QUICK))
    target = parse_target(await server.start())
    monkeypatch.setattr("cluster.bench.run.time.time", lambda: float(len(server.bodies)))
    (found,) = await Bench(Plan(Arrangement(few(10)), warm_up=3)).run([target])
    server.close()
    assert len(found.samples) == 10
    assert len(server.bodies) - found.began_s == 10


async def test_a_server_that_fails_its_warm_up_is_not_measured() -> None:
    with pytest.raises(TransportError, match="warm-up"):
        await measure(Plan(Arrangement(few(2)), warm_up=2), Behaviour(QUICK, fails_every=1))


def test_a_ramp_gets_denser_as_evenly_as_its_rate_rises() -> None:
    times = draw(Synthetic(requests=400, rate_rps=1.0, ramp_to_rps=9.0, burstiness=0)).arrival_s
    assert len(times) == 400
    assert times[-1] == pytest.approx(400 / 5.0, rel=0.01)
    assert (times < 40.0).sum() == pytest.approx(40 * (1 + 5) / 2, abs=2)
    gaps = times[1:] - times[:-1]
    assert (gaps[0], gaps[-1]) == pytest.approx((1.0, 1 / 9), rel=0.1)
    falling = draw(Synthetic(requests=400, rate_rps=9.0, ramp_to_rps=1.0)).arrival_s
    assert (falling < 40.0).sum() > 0.6 * len(falling)


@pytest.mark.parametrize("burstiness", [0.0, 1.0, 4.0])
def test_what_is_drawn_has_the_rate_that_was_asked_for(burstiness: float) -> None:
    times = draw(Synthetic(requests=20, rate_rps=8.0, burstiness=burstiness)).arrival_s
    assert (len(times), times[0]) == (20, 0.0)
    assert 19 / times[-1] == pytest.approx(8.0)
    assert len(draw(Synthetic(requests=1))) == 1


def test_the_same_recipe_draws_the_same_requests() -> None:
    recipe = Synthetic(requests=50, burstiness=2.0, spread=0.7, prefixes=3, prefix_tokens=8)
    one, two = draw(recipe), draw(recipe)
    assert one.arrival_s.tolist() == two.arrival_s.tolist()
    assert one.prompt_tokens.tolist() == two.prompt_tokens.tolist()


def test_a_negative_ramp_is_named() -> None:
    with pytest.raises(BadInput, match="ramp-to"):
        draw(Synthetic(ramp_to_rps=-1.0))
