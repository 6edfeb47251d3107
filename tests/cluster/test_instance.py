"""An instance by itself: what it answers to messages that find things otherwise than expected."""

from dataclasses import replace

from cluster.instance.draining import Emptying, is_awaited
from cluster.instance.instance import Instance, InstanceSettings
from engine.blocks import BlockPool
from engine.layout import KvLayout
from engine.messages import (
    Abort,
    Cancelled,
    Claim,
    Dropped,
    Migrate,
    Migrated,
    Offer,
    Pulled,
    Reserved,
    Role,
    Start,
    TransferKind,
)
from engine.request import Request, Sampling
from tests.cluster.test_host import CountingExecutor

LAYOUT = KvLayout("m", 2, 1, 8, 4, "float32")
REQUEST = Request("r", (1, 2, 3, 4, 5), Sampling(max_tokens=6))


def instance(role: Role = Role.MIXED) -> Instance:
    name = f"{role.value}-0"
    settings = InstanceSettings()
    return Instance(name, role, BlockPool(32, 4), LAYOUT, settings=settings, eos=frozenset())


def said(one: Instance) -> list[tuple[str, object]]:
    return [(envelope.to, envelope.message) for envelope in one.take_outbox()]


def test_a_start_under_an_aborted_epoch_is_refused_aloud_and_a_later_one_is_taken():
    one = instance()
    one.receive("gateway-0", Abort("r", 2), 0.0)
    one.receive("gateway-1", Start(REQUEST, 2), 0.0)
    ((to, dropped),) = said(one)
    assert isinstance(dropped, Dropped)
    assert (to, dropped.epoch, dropped.error) == ("gateway-1", 2, "StaleEpoch")
    assert not one.load().sequences
    one.receive("gateway-1", Start(REQUEST, 3), 0.0)
    assert said(one) == []
    assert [running.epoch for running in one.load().sequences] == [3]


def step(one: Instance, duration_s: float = 0.01) -> None:
    batch = one.next_batch(0.0)
    one.finish(batch, replace(CountingExecutor().execute(batch), duration_s=duration_s), 0.0)


def offer_to(one: Instance) -> None:
    offered = Offer("t", TransferKind.HANDOFF, REQUEST, 2, "gateway-0", LAYOUT, 6)
    one.receive("prefill-0", offered, 0.0)


def test_an_instance_to_which_kv_is_on_its_way_is_not_empty():
    one, emptying = instance(Role.DECODE), Emptying(settle_s=1.0)
    one.drain()
    offer_to(one)
    assert said(one) == [("prefill-0", Reserved("t"))]
    load = one.load()
    assert (load.queue_requests, load.running_sequences, load.pinned_blocks) == (0, 0, 0)
    assert not emptying.is_over(load, 0.0)
    assert not emptying.is_over(load, 5.0)
    one.receive("prefill-0", Cancelled("t", "StaleEpoch", "the request was aborted"), 6.0)
    assert not emptying.is_over(one.load(), 6.0)
    assert emptying.is_over(one.load(), 7.0)
    assert one.pool.available == 32


def test_a_drained_instance_stays_a_while_for_what_was_sent_before_everyone_knew():
    one, emptying = instance(), Emptying(settle_s=1.0)
    one.drain()
    assert not emptying.is_over(one.load(), 0.0)
    one.receive("gateway-0", Start(REQUEST, 1), 0.5)
    assert not emptying.is_over(one.load(), 1.0)
    one.receive("gateway-0", Abort("r", 1), 1.5)
    assert not emptying.is_over(one.load(), 1.5)
    assert not emptying.is_over(one.load(), 2.4)
    assert emptying.is_over(one.load(), 2.5)


def test_an_instance_at_which_a_request_only_arrives_says_that_it_cannot_move_it():
    one = instance(Role.DECODE)
    offer_to(one)
    said(one)
    for name in ("r", "nobody"):
        one.receive("controller", Migrate(name, "decode-1", "operator"), 0.0)
        ((to, answer),) = said(one)
        assert (to, answer.request_id, answer.outcome) == ("controller", name, "NotFound")
    assert [running.state for running in one.load().sequences] == ["reserved"]


def test_a_request_that_is_dropped_says_whether_its_hand_off_had_begun():
    one = instance(Role.PREFILL)
    begun, waits = REQUEST, replace(REQUEST, id="waits")
    one.receive("gateway-0", Start(begun, 1, (), "decode-0", 2), 0.0)
    assert one.next_batch(0.0) is not None
    ((_, offer),) = said(one)
    one.receive("gateway-0", Start(waits, 1, (), "decode-0", 2), 0.0)
    one.receive("controller", Migrate("waits", "prefill-1", "room"), 0.0)
    one.receive("decode-0", Cancelled(offer.transfer, "OutOfBlocks", "full"), 0.0)
    dropped = [message for _, message in said(one) if isinstance(message, Dropped)]
    assert [(one.request_id, one.handoff) for one in dropped] == [("waits", False), ("r", True)]


def test_a_prompt_that_is_to_be_handed_off_names_its_target_from_the_start():
    one = instance(Role.PREFILL)
    one.receive("gateway-0", Start(REQUEST, 1, (), "decode-0", 2), 0.0)
    one.receive("gateway-0", Start(replace(REQUEST, id="stays"), 1), 0.0)
    load = one.load()
    assert [running.target for running in load.sequences] == ["decode-0", None]
    assert is_awaited("decode-0", [load])
    assert not is_awaited("decode-1", [load])


def test_who_waits_for_a_move_is_told_when_the_request_ends_before_the_gateway_has_decided():
    one = instance()
    one.receive("gateway-0", Start(REQUEST, 1), 0.0)
    for _ in range(2):
        step(one)
    one.receive("controller", Migrate("r", "decode-1", "operator"), 0.0)
    (offer,) = [message for to, message in said(one) if to == "decode-1"]
    one.receive("decode-1", Reserved(offer.transfer), 0.0)
    for checked in (False, True):
        one.receive("decode-1", Pulled(offer.transfer, 6, checked), 1.0)
    (claim,) = [message for _, message in said(one) if isinstance(message, Claim)]
    assert claim.target == "decode-1"
    one.receive("gateway-0", Abort("r", 1), 2.0)
    ((to, moved),) = [(to, one) for to, one in said(one) if isinstance(one, Migrated)]
    assert (to, moved.target, moved.outcome) == ("gateway-0", "decode-1", "StaleEpoch")


def test_the_pace_that_routers_see_is_that_of_decodes_and_none_of_an_instance_that_idles():
    one = instance()
    assert one.load().step_s == 0.0
    one.receive("gateway-0", Start(REQUEST, 1), 0.0)
    paces = []
    while one.load().sequences:
        step(one, 0.01 if paces else 0.5)
        paces.append(one.load().step_s)
    of_the_prompt, *of_decodes, at_the_end = paces
    assert (of_the_prompt, at_the_end) == (0.0, 0.0)
    assert set(of_decodes) == {0.01}


def test_a_load_is_worth_telling_when_requests_come_get_on_or_go_and_not_at_every_token():
    one, gists = instance(), []
    one.receive("gateway-0", Start(REQUEST, 1), 0.0)
    while one.load().sequences:
        gists.append(one.gist)
        step(one)
    waiting, prefilled, *running = gists
    assert len({waiting, prefilled, *running}) == 3
    assert len(running) == REQUEST.sampling.max_tokens - 2
    assert one.gist not in gists
