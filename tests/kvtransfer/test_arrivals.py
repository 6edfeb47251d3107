"""What a target refuses, by name, and that a refusal leaves nothing behind on either side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.blocks import BlockPool
from engine.errors import ChecksumMismatch
from engine.layout import KvLayout
from engine.messages import (
    Cancelled,
    Confirmed,
    Fenced,
    Offer,
    Pulled,
    Ready,
    Renew,
    Reserved,
    Sealed,
    TransferKind,
)
from engine.request import Request
from kvtransfer.arrivals import Arrivals
from kvtransfer.transfer import TransferSettings

LAYOUT = KvLayout("m", 4, 2, 8, 4, "float32")
BLOCKS = 8


class Target:
    """Arrivals over a pool of their own, and what they have sent."""

    def __init__(self, **settings):
        self.pool = BlockPool(BLOCKS, LAYOUT.block_tokens)
        self.sent = []
        self.arrivals = Arrivals(
            self.pool,
            LAYOUT,
            TransferSettings(**settings),
            lambda to, message: self.sent.append((to, message)),
            lambda blocks: self.pool.available >= blocks,
        )

    def offered(self, **change):
        """What is sent in answer to an ordinary offer with something changed."""
        self.arrivals.offer("prefill-0", replace(offer(), **change), 0.0)
        self.arrivals.admit(0.0)
        sent, self.sent = self.sent, []
        return [message for _, message in sent]

    def check_empty(self):
        assert not len(self.arrivals)
        assert self.pool.counts().available == BLOCKS
        self.pool.check()


def offer(transfer="t", tokens=14):
    request = Request("r", tuple(range(1, 14)))
    return Offer(transfer, TransferKind.HANDOFF, request, 2, "gateway-0", LAYOUT, tokens)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"tokens": 33}, "OutOfBlocks", "9 blocks wanted of 8"),
        ({"layout": replace(LAYOUT, model="n")}, "LayoutMismatch", "model: source 'n', target 'm'"),
        ({"layout": replace(LAYOUT, layers=5)}, "LayoutMismatch", "layers: source 5, target 4"),
        ({"layout": replace(LAYOUT, kv_heads=4)}, "LayoutMismatch", "kv_heads: source 4, target 2"),
        (
            {"layout": replace(LAYOUT, dtype="bfloat16")},
            "LayoutMismatch",
            "dtype: source 'bfloat16', target 'float32'",
        ),
        (
            {"layout": replace(LAYOUT, block_tokens=8)},
            "LayoutMismatch",
            "block_tokens: 8 at the source, 4 here",
        ),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_with_what_disagrees(change, error, reason):
    target = Target()
    assert target.offered(**change) == [Cancelled("t", error, reason), Fenced("t")]
    target.check_empty()


def test_more_offers_than_may_wait_are_refused():
    target = Target(max_offers=1)
    others = target.pool.allocate(BLOCKS)
    assert target.offered() == []
    refused = target.offered(transfer="u")
    assert refused == [Cancelled("u", "Overloaded", "1 offers are waiting already"), Fenced("u")]
    target.arrivals.lost("prefill-0")
    target.pool.release(others)
    target.check_empty()


def test_an_offer_that_comes_again_after_its_end_starts_nothing():
    target = Target()
    target.offered(tokens=33)
    assert target.offered() == []
    target.check_empty()


def test_only_the_source_is_heard():
    target = Target()
    assert target.offered() == [Reserved("t")]
    sealed = Sealed("t", (5,), 13, (0, 1, 2, 3))
    target.arrivals.sealed("stranger", sealed, 0.0)
    assert target.arrivals.take_pulls() == []
    assert target.arrivals.confirmed("stranger", Confirmed("t", (5,), 13), 0.0) is None
    target.arrivals.cancelled("prefill-0", Cancelled("t", "StaleEpoch", "the request has ended"))
    target.check_empty()


def test_kv_that_has_not_come_in_full_is_never_used():
    target = Target()
    target.offered()
    target.arrivals.sealed("prefill-0", Sealed("t", (5,), 13, (0, 1, 2, 3)), 0.0)
    (order,) = target.arrivals.take_pulls()
    assert target.arrivals.confirmed("prefill-0", Confirmed("t", (5,), 13), 0.0) is None
    target.arrivals.pull_finished("t", order.number, None, 0.0)
    assert target.arrivals.confirmed("prefill-0", Confirmed("t", (5,), 14), 0.0) is None
    arrived = target.arrivals.confirmed("prefill-0", Confirmed("t", (5,), 13), 0.0)
    assert arrived is not None
    assert arrived.sequence.output == [5]
    target.pool.release(arrived.sequence.blocks)
    target.check_empty()


GROWN = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "said", [Ready("t", 17, 0, 4, GROWN), Sealed("t", (5, 6, 7, 8), 16, GROWN)]
)
def test_what_outgrew_its_reservation_takes_blocks_only_when_some_are_given_out(said):
    target = Target()
    target.offered()
    grows = target.arrivals.ready if isinstance(said, Ready) else target.arrivals.sealed
    grows("prefill-0", said, 0.0)
    assert target.arrivals.take_pulls() == []
    assert target.pool.counts().reserved == 4
    target.arrivals.admit(0.0)
    (order,) = target.arrivals.take_pulls()
    assert target.pool.counts().reserved == 5
    target.arrivals.lost("prefill-0")
    target.arrivals.pull_finished("t", order.number, None, 0.0)
    target.check_empty()


def test_what_outgrew_its_reservation_is_refused_where_there_are_no_more_blocks():
    target = Target()
    target.offered()
    others = target.pool.allocate(BLOCKS - 4)
    target.arrivals.ready("prefill-0", Ready("t", 17, 0, 4, GROWN), 0.0)
    target.arrivals.admit(0.0)
    assert [message for _, message in target.sent] == [
        Cancelled("t", "OutOfBlocks", "1 more blocks wanted while copying"),
        Fenced("t"),
    ]
    target.arrivals.admit(0.0)
    target.pool.release(others)
    target.check_empty()


def test_what_is_cancelled_before_it_could_grow_takes_no_blocks():
    target = Target()
    target.offered()
    target.arrivals.ready("prefill-0", Ready("t", 17, 0, 4, GROWN), 0.0)
    target.arrivals.cancelled("prefill-0", Cancelled("t", "StaleEpoch", "the request has ended"))
    target.arrivals.admit(0.0)
    target.check_empty()


BLOCK_TABLE = (0, 1, 2, 3)
CONFIRMED = Confirmed("t", (5,), 13)


def copied(target):
    """A target that compares has copied all of a sealed transfer: the order to compare it."""
    target.offered()
    target.arrivals.ready("prefill-0", Ready("t", 13, 0, 4, BLOCK_TABLE), 0.0)
    (copy,) = target.arrivals.take_pulls()
    target.arrivals.pull_finished("t", copy.number, None, 0.0)
    assert target.sent.pop() == ("prefill-0", Pulled("t", 13, checked=False))
    assert target.arrivals.take_pulls() == []
    target.arrivals.sealed("prefill-0", Sealed("t", (5,), 13, BLOCK_TABLE), 0.0)
    (order,) = target.arrivals.take_pulls()
    assert order.compare
    assert (order.source_blocks, order.tokens) == (BLOCK_TABLE, 13)
    assert (order.first_layer, order.last_layer) == (0, 4)
    return order


def test_kv_is_used_only_after_it_was_compared():
    target = Target(checksums=True)
    order = copied(target)
    assert target.arrivals.confirmed("prefill-0", CONFIRMED, 0.0) is None
    target.arrivals.tick(TransferSettings().heartbeat_s)
    assert target.sent.pop() == ("prefill-0", Renew("t"))
    target.arrivals.pull_finished("t", order.number, None, 1.0)
    assert target.sent.pop() == ("prefill-0", Pulled("t", 13, checked=True))
    target.arrivals.tick(2.0)
    assert target.sent.pop() == ("prefill-0", Pulled("t", 13, checked=True))
    arrived = target.arrivals.confirmed("prefill-0", CONFIRMED, 2.0)
    assert arrived is not None
    target.pool.release(arrived.sequence.blocks)
    target.check_empty()


def test_a_checksum_mismatch_ends_the_transfer_with_what_disagreed():
    target = Target(checksums=True)
    order = copied(target)
    differs = ChecksumMismatch("blocks 2, 3 of prefill-0/0")
    target.arrivals.pull_finished("t", order.number, differs, 0.0)
    assert [message for _, message in target.sent] == [
        Cancelled("t", "ChecksumMismatch", "blocks 2, 3 of prefill-0/0"),
        Fenced("t"),
    ]
    target.check_empty()


def test_a_transfer_that_is_cancelled_while_it_is_compared_keeps_its_blocks_until_that_is_over():
    target = Target(checksums=True)
    order = copied(target)
    target.arrivals.cancelled("prefill-0", Cancelled("t", "StaleEpoch", "the request has ended"))
    assert target.pool.counts().reserved == 4
    target.arrivals.pull_finished("t", order.number, None, 0.0)
    target.check_empty()


def test_a_prefix_that_was_here_before_is_not_compared():
    target = Target(checksums=True)
    known = target.pool.allocate(3)
    target.pool.remember(known, target.pool.hashes(offer().request.prompt, ""))
    target.pool.release(known)
    target.offered()
    target.arrivals.sealed("prefill-0", Sealed("t", (5,), 13, BLOCK_TABLE), 0.0)
    (copy,) = target.arrivals.take_pulls()
    target.arrivals.pull_finished("t", copy.number, None, 0.0)
    (order,) = target.arrivals.take_pulls()
    assert (order.compare, order.source_blocks, order.tokens) == (True, (3,), 1)
    target.arrivals.lost("prefill-0")
    target.arrivals.pull_finished("t", order.number, None, 0.0)
    target.check_empty()
