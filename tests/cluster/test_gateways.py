"""Two gateways over the same instances: each owns its requests, and either may be asked."""

import asyncio

import pytest

from cluster.config import GatewayConfig, load_config
from cluster.gateway.call import Call
from cluster.gateway.settings import GatewaySettings
from cluster.watching.metrics import Metrics
from cluster.watching.slo_window import SloWindow
from engine.errors import BadConfig, BadRequest, DeadlineExceeded, NotFound
from engine.messages import Query
from engine.request import FinishReason
from tests.cluster.serving import ask, read, running, settle, until
from tests.cluster.test_metrics import samples
from tests.cluster.watching import ended


def call(prompt="hello", **options) -> Call:
    return Call(prompts=(prompt,), **{"max_tokens": 8, "seed": 7, **options})


async def test_each_gateway_streams_its_own_clients_requests():
    async with running("prefill-0", "decode-0", gateways=2) as cluster:
        first, second = cluster.gateways.values()
        one, two = await asyncio.gather(ask(first, call()), ask(second, call()))
        assert [d.token for d in one] == [d.token for d in two]
        assert len(one) == 8
        await until(lambda: not cluster.instances["prefill-0"].sequences)
        cluster.assert_empty()


async def test_either_gateway_lists_and_aborts_the_others_requests():
    async with running("mixed-0", gateways=2) as cluster:
        first, second = cluster.gateways.values()
        answer = await first.open(call(max_tokens=1000, request_id="far", tenant="a"))
        await until(lambda: answer.output_tokens > 3)
        assert [one["id"] for one in await second.everywhere.requests()] == ["far"]
        assert second.requests() == []
        with pytest.raises(NotFound):
            await second.everywhere.abort("far", tenant="b")
        await second.everywhere.abort("far", tenant="a")
        assert (await read(answer))[-1].finish is FinishReason.ABORT
        first.close(answer)
        with pytest.raises(NotFound):
            await second.everywhere.abort("far")
        await settle()
        cluster.assert_empty()


async def test_a_gateway_that_is_gone_is_left_out_of_the_answers():
    async with running("mixed-0", gateways=2) as cluster:
        first, _ = cluster.gateways.values()
        cluster.network.kill("gateway-1")
        answer = await first.open(call(max_tokens=1000))
        assert [one["id"] for one in await first.everywhere.requests()] == [answer.id]
        first.close(answer)


async def test_an_abort_does_not_say_not_found_while_a_gateway_has_not_answered(monkeypatch):
    monkeypatch.setattr("cluster.gateway.peers.ANSWER_S", 0.0)
    async with running("mixed-0", gateways=2) as cluster:
        cluster.network.join("gateway-9")
        cluster.gateway.peers.follow(("gateway-0", "gateway-1", "gateway-9"))
        with pytest.raises(DeadlineExceeded, match="gateway-9 did not say"):
            await cluster.gateway.everywhere.abort("somewhere")


async def test_a_gateway_that_asks_and_dies_does_not_take_the_one_it_asked_with_it():
    async with running("mixed-0", gateways=2) as cluster:
        cluster.network.kill("gateway-1")
        cluster.gateway.receive("gateway-1", Query(1, "requests", b"null"))
        assert len(await ask(cluster.gateway, call())) == 8


async def test_only_gateways_are_answered_and_only_what_they_may_ask():
    async with running("mixed-0", gateways=2) as cluster:
        first = cluster.gateway
        first.peers.asked("mixed-0", Query(1, "requests", b"null"))
        first.peers.asked("gateway-1", Query(2, "secrets", b"null"))
        assert await cluster.gateways["gateway-1"].peers.ask("requests") == {"gateway-0": []}


async def test_what_one_gateway_sends_somewhere_the_other_counts_once_the_instance_tells():
    async with running("mixed-0", "mixed-1", gateways=2) as cluster:
        first, second = cluster.gateways.values()
        cluster.paused |= {"mixed-0", "mixed-1"}
        held = [await first.open(call(f"{n}" * 400, max_tokens=900)) for n in range(1)]
        taken = held[0].choices[0].prefill
        await until(lambda: cluster.instances[taken].sequences)
        cluster.tell_loads()
        await settle()
        other = await second.open(call("b" * 400, max_tokens=900))
        assert other.choices[0].prefill != taken
        second.close(other)
        first.close(held[0])
        for name in ("mixed-0", "mixed-1"):
            cluster.resume(name)
        await until(lambda: not any(one.sequences for one in cluster.instances.values()))
        cluster.assert_empty()


async def test_a_callers_request_id_is_refused_while_the_other_gateway_uses_it():
    async with running("mixed-0", gateways=2) as cluster:
        first, second = cluster.gateways.values()
        answer = await first.open(call(max_tokens=2000, request_id="same"))
        await until(lambda: cluster.instances["mixed-0"].sequences)
        cluster.tell_loads()
        await settle()
        with pytest.raises(BadRequest, match="at another gateway"):
            await second.open(call(request_id="same"))
        first.close(answer)


@pytest.mark.parametrize(("again", "replays"), [("gateway-0", 0), ("gateway-1", 1)])
async def test_an_aborted_requests_id_can_be_used_again_at_once(again, replays):
    """Another gateway does not know the epochs of its former life, and is told."""
    async with running("mixed-0", gateways=2) as cluster:
        answer = await cluster.gateway.open(call(max_tokens=2000, request_id="same"))
        await until(lambda: answer.output_tokens > 3)
        cluster.gateway.close(answer)
        await until(lambda: not cluster.instances["mixed-0"].sequences)
        answer = await cluster.gateways[again].open(call(request_id="same"))
        assert len(await read(answer)) == 8
        assert answer.choices[0].entry.replays_total == replays
        cluster.gateways[again].close(answer)
        cluster.assert_empty()


async def test_nothing_is_asked_of_anybody_where_there_is_one_gateway():
    async with running("mixed-0", settings=GatewaySettings(sweep_s=0.01)) as cluster:
        assert await cluster.gateway.peers.ask("requests") == {}


def metrics_of(*events) -> Metrics:
    slo = SloWindow()
    metrics = Metrics(slo, lambda: 102.0)
    for event in events:
        metrics.ended(event)
        slo.ended(event)
        metrics.streamed([0.01, 0.02])
    return metrics


def test_every_gateway_shows_the_metrics_of_all():
    mine, other = metrics_of(ended()), metrics_of(ended("s"), ended("t", "error"))
    mine.others.heard([other.document(())])
    alone, both = samples(metrics_of(ended(), ended("s"), ended("t", "error"))), samples(mine)
    assert both == alone
    assert both["tandem_requests_total", "error"] == 1
    assert both["tandem_inter_token_latency_seconds_count",] == 6


def test_counters_do_not_fall_when_a_gateway_dies_or_starts_again():
    mine, other = metrics_of(ended()), metrics_of(ended("s"))
    mine.others.heard([other.document(())])
    mine.others.heard([])
    total = ("tandem_requests_total", "length")
    assert samples(mine)[total] == 2
    mine.others.heard([metrics_of(ended("t"), ended("u")).document(())])
    assert samples(mine)[total] == 4
    mine.others.heard([other.document(())])
    assert samples(mine)[total] == 4, "one that was only out of reach is not counted twice"


def test_a_gateway_that_begins_again_learns_what_was_counted_before_it():
    kept, lost = metrics_of(ended()), metrics_of(ended("s"))
    kept.others.heard([lost.document(kept.known_lives())])
    again = metrics_of(ended("t"))
    again.others.heard([kept.document(again.known_lives())])
    assert samples(again)["tandem_requests_total", "length"] == 3
    again.others.heard([kept.document(again.known_lives())])
    assert samples(again)["tandem_requests_total", "length"] == 3
    assert again.document(kept.known_lives())["remembered"] == {}, "only what is news"
    kept.others.heard([again.document(kept.known_lives())])
    assert samples(kept) == samples(again)


def test_each_gateway_has_ports_of_its_own():
    gateway = GatewayConfig(instances=3, http_port=8000, grpc_port=0)
    doors = [gateway.numbered(n) for n in range(3)]
    assert [(one.http_port, one.grpc_port) for one in doors] == [(8000, 0), (8001, 0), (8002, 0)]
    with pytest.raises(BadConfig, match="too close"):
        load_config(None, **{"gateway.instances": 3, "gateway.grpc_port": 8002})
    with pytest.raises(BadConfig, match="65537"):
        load_config(None, **{"gateway.instances": 3, "gateway.http_port": 65535})
