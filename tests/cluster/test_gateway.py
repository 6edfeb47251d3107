import asyncio
import threading

import pytest

from cluster.gateway.call import Call, Targets
from cluster.gateway.entry import JournalSettings
from cluster.gateway.settings import GatewaySettings
from engine.errors import (
    BadRequest,
    DeadlineExceeded,
    InstanceLost,
    NotFound,
    OutOfBlocks,
    Overloaded,
    PromptTooLong,
)
from engine.messages import Claim, Dropped, Migrate, Tokens
from engine.request import FinishReason, Grammar, Request, Sampling
from placement.routing.admission import AdmissionSettings
from tests.cluster.fakes import hash_tokens
from tests.cluster.serving import PATIENCE_S, ask, read, running, says, settle, tokens_of, until


def call(prompt="hello", **options) -> Call:
    options.setdefault("max_tokens", 8)
    options.setdefault("seed", 7)
    return Call(prompts=(prompt,), **options)


def expected(count: int, prompt: str = "hello", seed: int = 7) -> list[int]:
    sampling = Sampling(max_tokens=count, seed=seed, ignore_eos=True)
    return hash_tokens(Request("x", tuple(tokens_of(prompt)), sampling))


def text(deltas, choice=0) -> str:
    return "".join(delta.text for delta in deltas if delta.choice == choice)


async def test_a_split_request_streams_one_delta_a_token_from_both_instances():
    async with running("prefill-0", "decode-0") as cluster:
        deltas = await ask(cluster.gateway, call())
        assert [delta.token for delta in deltas] == expected(8)
        assert deltas[-1].finish is FinishReason.LENGTH
        await until(lambda: not cluster.instances["prefill-0"].sequences)
        cluster.assert_empty()


async def test_a_stop_string_over_token_borders_ends_the_answer_and_the_owner():
    async with running("mixed-0", draw=says("one two three four")) as cluster:
        deltas = await ask(cluster.gateway, call(stop=("o th",), max_tokens=100))
        assert text(deltas) == "one tw"
        assert deltas[-1].finish is FinishReason.STOP
        await until(lambda: not cluster.instances["mixed-0"].sequences)
        cluster.assert_empty()


async def test_tokens_after_a_stop_string_in_the_same_message_are_dropped():
    async with running("mixed-0", draw=says("abcdef")) as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call(stop=("bc",), max_tokens=100))
        await until(lambda: cluster.instances["mixed-0"].sequences)
        tokens = [cluster.instances["mixed-0"].step()[0] for _ in range(6)]
        cluster.gateway.receive("mixed-0", Tokens((*tokens[1:], tokens[0])))
        assert text(await read(answer)) == "a"
        cluster.gateway.close(answer)
        assert cluster.gateway.requests() == []


async def test_the_end_token_is_counted_but_not_shown():
    async with running("mixed-0", draw=says("bye")) as cluster:
        deltas = await ask(cluster.gateway, call(max_tokens=100))
        assert text(deltas) == "bye"
        assert len(deltas) == 4
        assert deltas[-1].finish is FinishReason.STOP


async def test_characters_of_several_tokens_come_whole():
    async with running("mixed-0", draw=says("é🦊")) as cluster:
        deltas = await ask(cluster.gateway, call(max_tokens=100))
        assert [delta.text for delta in deltas] == ["", "é", "", "", "", "🦊", ""]


async def test_n_answers_differ_and_the_first_is_that_of_n_1():
    async with running("prefill-0", "decode-0", "decode-1") as cluster:
        deltas = await ask(cluster.gateway, call(n=3))
        answers = [[d.token for d in deltas if d.choice == k] for k in range(3)]
        assert answers[0] == expected(8)
        assert len({tuple(answer) for answer in answers}) == 3


async def test_echo_repeats_the_prompt_first():
    async with running("mixed-0", draw=says("you")) as cluster:
        assert text(await ask(cluster.gateway, call(echo=True, max_tokens=9))) == "helloyou"


async def test_a_lost_decode_instance_costs_no_token():
    async with running("prefill-0", "decode-0", "decode-1") as cluster:
        answer = await cluster.gateway.open(call(max_tokens=200))
        await until(lambda: answer.output_tokens > 5)
        cluster.kill(answer.choices[0].decode)
        deltas = await read(answer)
        assert [delta.token for delta in deltas] == expected(200)
        cluster.gateway.close(answer)
        await settle()
        cluster.assert_empty()


async def test_a_lost_prefill_instance_costs_no_token():
    async with running("prefill-0", "prefill-1", "decode-0") as cluster:
        cluster.paused |= {"prefill-0", "prefill-1"}
        answer = await cluster.gateway.open(call())
        victim = answer.choices[0].prefill
        cluster.kill(victim)
        for name in set(cluster.links) - {"decode-0"}:
            cluster.resume(name)
        assert [delta.token for delta in await read(answer)] == expected(8)
        cluster.gateway.close(answer)


async def test_a_migration_costs_no_token_and_is_counted():
    async with running("mixed-0", "mixed-1") as cluster:
        answer = await cluster.gateway.open(call(max_tokens=400))
        await until(lambda: answer.output_tokens > 5)
        source = answer.choices[0].decode
        target = "mixed-1" if source == "mixed-0" else "mixed-0"
        cluster.tell(source, Migrate(answer.id, target, "test"))
        assert [delta.token for delta in await read(answer)] == expected(400)
        assert answer.choices[0].decode == target
        assert answer.choices[0].entry.migrations == 1
        cluster.gateway.close(answer)
        await settle()
        cluster.assert_empty()


async def test_a_stop_string_is_found_although_each_of_its_letters_comes_from_another_owner():
    async with running("mixed-0", "mixed-1", draw=says("one two three")) as cluster:
        cluster.paused |= {"mixed-0", "mixed-1"}
        answer = await cluster.gateway.open(call(stop=("o th",), max_tokens=100))
        owner = answer.choices[0].prefill
        for count in range(1, len("one two th") + 1):
            await until(owns(cluster, owner))
            cluster.instances[owner].step()
            cluster.flush(owner)
            await until(lambda count=count: answer.output_tokens == count)
            if 5 <= count < 10:
                other = "mixed-1" if owner == "mixed-0" else "mixed-0"
                cluster.tell(owner, Migrate(answer.id, other, "test"))
                owner = other
        deltas = await read(answer)
        assert (text(deltas), deltas[-1].finish) == ("one tw", FinishReason.STOP)
        assert answer.choices[0].entry.migrations == 5
        cluster.gateway.close(answer)
        await settle()
        cluster.assert_empty()


def owns(cluster, name):
    """Whether something may take its next token there."""
    sequences = cluster.instances[name].sequences
    return lambda: any(one.decodes for one in sequences.values())


async def test_a_conversations_next_turn_goes_where_its_beginning_is_cached():
    async with running("mixed-0", "mixed-1") as cluster:
        said = "x" * 100
        first = await cluster.gateway.open(call(said, max_tokens=100))
        deltas = await read(first)
        cluster.gateway.close(first)
        turn = (*tokens_of(said), *(delta.token for delta in deltas))
        for _ in range(3):
            second = await cluster.gateway.open(call(turn))
            await read(second)
            cluster.gateway.close(second)
            assert second.choices[0].prefill == first.choices[0].prefill


async def test_a_client_that_leaves_frees_every_holder():
    async with running("prefill-0", "decode-0") as cluster:
        cluster.paused.add("decode-0")
        answer = await cluster.gateway.open(call(max_tokens=1000))
        await until(lambda: cluster.instances["decode-0"].sequences)
        cluster.gateway.close(answer)
        await until(lambda: not cluster.instances["prefill-0"].sequences)
        await until(lambda: not cluster.instances["decode-0"].sequences)
        cluster.assert_empty()


async def test_abort_ends_the_stream_of_its_own_tenant_only():
    async with running("mixed-0") as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call(request_id="mine", tenant="alice"))
        with pytest.raises(NotFound):
            cluster.gateway.abort("mine", tenant="bob")
        cluster.gateway.abort("mine", tenant="alice")
        assert [delta.finish for delta in await read(answer)] == [FinishReason.ABORT]
        cluster.gateway.close(answer)
        with pytest.raises(NotFound):
            cluster.gateway.abort("mine")


async def test_without_any_instance_left_the_call_fails_with_a_typed_error():
    settings = GatewaySettings(sweep_s=0.001, journal=JournalSettings(crashes=10))
    async with running("mixed-0", settings=settings) as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call(max_tokens=1000))
        for _ in range(6):
            cluster.gateway.joined("mixed-0")
            cluster.gateway.receive("mixed-0", cluster.instances["mixed-0"].load())
            cluster.kill("mixed-0") if "mixed-0" in cluster.links else cluster.gateway._lost(
                "mixed-0", cluster.gateway.clock.now()
            )
        with pytest.raises(InstanceLost):
            await read(answer)
        cluster.gateway.close(answer)
        assert cluster.gateway.requests() == []


class Failures:
    """What a gateway tells of moves that came to nothing."""

    def __init__(self) -> None:
        self.handoffs, self.reroutes = list[str](), list[str]()

    def handoff_failed(self, request_id, reason, at_s) -> None:
        self.handoffs.append(reason)

    def rerouted(self, event) -> None:
        self.reroutes.append(event.outcome)

    def __getattr__(self, _):
        return lambda *_: None


async def test_only_a_hand_off_that_had_begun_counts_as_one_that_failed():
    failures = Failures()
    async with running("prefill-0", "decode-0", observers=[failures]) as cluster:
        cluster.paused |= {"prefill-0", "decode-0"}
        answer = await cluster.gateway.open(call())
        for error, handoff in (("BatchFailed", False), ("Overloaded", False), ("PeerLost", True)):
            epoch = answer.choices[0].entry.epoch
            dropped = Dropped(answer.id, epoch, error, "no", handoff=handoff)
            cluster.gateway.receive("prefill-0", dropped)
        assert failures.handoffs == ["PeerLost"]
        assert failures.reroutes == ["replayed"] * 3
        cluster.gateway.close(answer)
        await until(lambda: not cluster.instances["prefill-0"].sequences)
        cluster.assert_empty()


async def test_a_migration_that_was_taken_back_counts_once_however_often_its_source_is_told():
    failures = Failures()
    async with running("mixed-0", "mixed-1", observers=[failures]) as cluster:
        cluster.paused |= {"mixed-0", "mixed-1"}
        answer = await cluster.gateway.open(call())
        source = answer.choices[0].prefill
        await until(lambda: cluster.instances[source].sequences)
        before = cluster.instances[source].load()
        target = "mixed-1" if source == "mixed-0" else "mixed-0"
        cluster.gateway.receive(source, Claim(answer.id, 1, 2, target))
        cluster.kill(target)
        for _ in range(3):
            cluster.gateway.receive(source, before)
        assert failures.reroutes == ["resumed"]
        cluster.resume(source)
        assert [delta.token for delta in await read(answer)] == expected(8)
        cluster.gateway.close(answer)
        cluster.assert_empty()


@pytest.mark.parametrize("replays", [0, 5])
async def test_an_answer_that_fails_takes_its_siblings_with_it(replays):
    settings = GatewaySettings(journal=JournalSettings(replays=replays))
    async with running("mixed-0", settings=settings) as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call(n=3))
        cluster.kill("mixed-0")
        if replays:
            cluster.gateway.receive("x", Dropped(f"{answer.id}#1", 2, "BadRequest", "no"))
        with pytest.raises((InstanceLost, BadRequest)):
            await read(answer)
        cluster.gateway.close(answer)
        assert cluster.gateway.requests() == []


async def test_a_call_past_its_time_ends_with_all_its_answers():
    async with running("mixed-0", settings=GatewaySettings(request_s=0.0)) as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call(n=3))
        cluster.gateway.sweep()
        with pytest.raises(DeadlineExceeded):
            await read(answer)
        cluster.gateway.close(answer)
        await until(lambda: not cluster.instances["mixed-0"].sequences)
        cluster.assert_empty()


async def test_requests_wait_in_fair_order_until_instances_have_room():
    admission = AdmissionSettings(ahead_requests=1, ahead_tokens=0)
    settings = GatewaySettings(sweep_s=0.01, admission=admission)
    async with running("mixed-0", settings=settings) as cluster:
        cluster.paused.add("mixed-0")
        asks = [("alice", 0), ("alice", 0), ("bob", 0), ("bob", 5)]
        answers = [
            await cluster.gateway.open(
                call(f"prompt {n}", tenant=tenant, priority=priority, request_id=f"r{n}")
            )
            for n, (tenant, priority) in enumerate(asks)
        ]
        cluster.resume("mixed-0")
        for answer in answers:
            await read(answer)
            cluster.gateway.close(answer)
        order = [start.request.id for start in cluster.instances["mixed-0"].starts]
        assert order == ["r0", "r3", "r1", "r2"]
        cluster.assert_empty()


async def test_a_full_queue_refuses_with_a_time_to_come_back():
    settings = GatewaySettings(
        admission=AdmissionSettings(ahead_requests=1, ahead_tokens=0, queue_requests=1)
    )
    async with running("mixed-0", settings=settings) as cluster:
        cluster.paused.add("mixed-0")
        first = await cluster.gateway.open(call())
        second = await cluster.gateway.open(call())
        with pytest.raises(Overloaded, match="retry after"):
            await cluster.gateway.open(call())
        for answer in (first, second):
            cluster.gateway.close(answer)
        assert cluster.gateway.requests() == []


async def test_a_request_that_finds_no_room_in_time_is_refused():
    settings = GatewaySettings(queue_s=0.0)
    async with running("mixed-0", settings=settings) as cluster:
        cluster.kill("mixed-0")
        answer = await cluster.gateway.open(call())
        cluster.gateway.sweep()
        with pytest.raises(Overloaded):
            await answer.next()
        cluster.gateway.close(answer)


async def test_draining_refuses_new_requests_and_waits_for_the_old():
    async with running("mixed-0") as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call())
        drained = asyncio.create_task(cluster.gateway.drain(PATIENCE_S))
        await settle()
        with pytest.raises(Overloaded, match="shutting down"):
            await cluster.gateway.open(call())
        assert not drained.done()
        cluster.resume("mixed-0")
        await read(answer)
        cluster.gateway.close(answer)
        await drained


async def test_what_a_drain_has_no_time_for_fails_and_is_freed():
    admission = AdmissionSettings(ahead_requests=1, ahead_tokens=0)
    async with running("mixed-0", settings=GatewaySettings(admission=admission)) as cluster:
        cluster.paused.add("mixed-0")
        sent, queued = await cluster.gateway.open(call(n=1)), await cluster.gateway.open(call(n=2))
        await until(lambda: cluster.instances["mixed-0"].sequences)
        await cluster.gateway.drain(0.0)
        for answer in (sent, queued):
            with pytest.raises(DeadlineExceeded, match="a shutdown began"):
                await read(answer)
            cluster.gateway.close(answer)
        await until(lambda: not cluster.instances["mixed-0"].sequences)
        cluster.assert_empty()


class SlowCheck:
    """Compiles for as long as the test wants."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def check(self, _: Grammar) -> None:
        self.done.wait()


async def test_a_call_whose_grammar_was_compiled_while_the_drain_ended_is_refused():
    slow = SlowCheck()
    sampling = Sampling(grammar=Grammar("regex", "a*"))
    async with running("mixed-0", grammars=slow) as cluster:
        opening = asyncio.create_task(cluster.gateway.open(call(sampling=sampling)))
        await settle()
        await cluster.gateway.drain(PATIENCE_S)
        slow.done.set()
        with pytest.raises(Overloaded, match="shutting down"):
            await opening
        cluster.assert_empty()


class RefusesEverything:
    def check(self, grammar: Grammar) -> None:
        raise BadRequest("response_format", grammar.kind, "no")


async def test_a_grammar_is_checked_at_the_edge():
    sampling = Sampling(grammar=Grammar("regex", "["))
    async with running("mixed-0", grammars=RefusesEverything()) as cluster:
        with pytest.raises(BadRequest, match="response_format"):
            await cluster.gateway.open(call(sampling=sampling))
        cluster.assert_empty()


BAD = [
    (call(temperature := ""), "prompt"),
    (call((1, 999)), "prompt"),
    (call(max_tokens=0), "max_tokens"),
    (call(max_tokens=5000), "max_tokens"),
    (call("x" * 3000), "prompt"),
    (call(n=0), "n"),
    (call(n=1000), "n"),
    (call(stop=("",)), "stop"),
    (call(seed=2**63), "seed"),
    (call(request_id="a b"), "request_id"),
    (call(request_id="a#1"), "request_id"),
    (call(priority=10**6), "priority"),
    (call(targets=Targets(ttft_s=-1.0)), "slo_ttft_s"),
    (call(targets=Targets(tpot_s=float("nan"))), "slo_tpot_s"),
    (call(echo=True, sampling=Sampling(logprobs=1)), "logprobs"),
    (call(sampling=Sampling(temperature=float("nan"))), "temperature"),
    (call(sampling=Sampling(top_p=0.0)), "top_p"),
    (call(sampling=Sampling(top_k=0)), "top_k"),
    (call(sampling=Sampling(logit_bias=((999, 1.0),))), "logit_bias"),
    (call(sampling=Sampling(logit_bias=((1, 101.0),))), "logit_bias"),
    (call(sampling=Sampling(min_tokens=9)), "min_tokens"),
    (call(sampling=Sampling(stop_token_ids=(-1,))), "stop_token_ids"),
    (Call(chat=()), "messages"),
]


@pytest.mark.parametrize(("bad", "field"), BAD)
async def test_a_broken_rule_names_its_field(bad, field):
    async with running("mixed-0") as cluster:
        with pytest.raises(BadRequest) as caught:
            await cluster.gateway.open(bad)
        assert caught.value.field == field
        cluster.assert_empty()


async def test_an_id_under_way_cannot_be_taken_twice():
    async with running("mixed-0") as cluster:
        cluster.paused.add("mixed-0")
        answer = await cluster.gateway.open(call(request_id="r"))
        with pytest.raises(BadRequest, match="under way"):
            await cluster.gateway.open(call(request_id="r"))
        cluster.gateway.close(answer)


async def test_status_names_where_a_request_is():
    async with running("prefill-0", "decode-0") as cluster:
        cluster.paused.add("prefill-0")
        answer = await cluster.gateway.open(call(request_id="r"))
        (status,) = cluster.gateway.requests()
        assert (status.state, status.prefill, status.decode) == (
            "prefilling", "prefill-0", "decode-0",
        )  # fmt: skip
        cluster.gateway.close(answer)


async def test_a_prompt_that_no_pool_can_hold_is_refused_with_the_sizes():
    async with running("prefill-0", "decode-0") as cluster:
        for instance in cluster.instances.values():
            instance.total_blocks = 4
            cluster.gateway.receive(instance.name, instance.load())
        with pytest.raises(PromptTooLong, match="needs 7 KV blocks; the largest pool here has 4"):
            await cluster.gateway.open(call("x" * 100))
        assert len(await ask(cluster.gateway, call("x" * 40))) == 8
        cluster.assert_empty()


async def test_a_long_prompt_goes_where_the_pool_is_large_enough():
    async with running("mixed-0", "mixed-1") as cluster:
        cluster.instances["mixed-0"].total_blocks = 4
        cluster.gateway.receive("mixed-0", cluster.instances["mixed-0"].load())
        for _ in range(4):
            answer = await cluster.gateway.open(call("x" * 100))
            assert answer.choices[0].prefill == "mixed-1"
            await read(answer)
            cluster.gateway.close(answer)


async def test_an_answer_that_outgrows_every_pool_ends_with_the_sizes():
    async with running("mixed-0") as cluster:
        answer = await cluster.gateway.open(call("x" * 60, max_tokens=100))
        await until(lambda: answer.output_tokens > 10)
        cluster.paused.add("mixed-0")
        cluster.instances["mixed-0"].total_blocks = 4
        cluster.gateway.receive("mixed-0", cluster.instances["mixed-0"].load())
        epoch = answer.choices[0].entry.epoch
        grown = Dropped(answer.id, epoch, "OutOfBlocks", "70 tokens do not fit 4 blocks")
        cluster.gateway.receive("mixed-0", grown)
        with pytest.raises(OutOfBlocks, match="blocks wanted, 4 can be given"):
            await read(answer)
        cluster.gateway.close(answer)
        cluster.resume("mixed-0")
        await until(lambda: not cluster.instances["mixed-0"].sequences)
        cluster.assert_empty()


async def test_a_load_read_after_its_instance_is_gone_does_not_bring_it_back():
    async with running("mixed-0") as cluster:
        gateway = cluster.gateway
        last = gateway.loads()[0]
        cluster.kill("mixed-0")
        gateway.receive("mixed-0", last)
        assert gateway.loads() == []
        assert not gateway.ready
        gateway.joined("mixed-0")
        gateway.receive("mixed-0", last)
        assert gateway.loads() == [last], "another one has come under its name"
