"""Blocks that a swap is still reading are given to nobody before its batch is over."""

from __future__ import annotations

from cluster.instance.instance import Instance, InstanceSettings
from decode.scheduler import DecodeSettings
from engine.blocks import BlockPool
from engine.messages import Cancelled, Offer, Ready, Role, TransferKind
from engine.request import Request
from placement.role import RoleSettings
from tests.cluster.test_failed_batches import LAYOUT, run, start

BLOCKS = 12
MOVING = Request("moving", tuple(range(20, 35)))


def swapping_instance() -> Instance:
    """An instance that has begun to take a sequence over; the next batch swaps another one out."""
    settings = DecodeSettings(host_slots=64, swap_block_s=0.0, watermark=0.0)
    instance = Instance(
        "decode-0",
        Role.DECODE,
        BlockPool(BLOCKS, 4),
        LAYOUT,
        settings=InstanceSettings(role=RoleSettings(decode=settings)),
        eos=frozenset(),
    )
    start(instance, "old", "new", prompt=14, tokens=20)
    run(instance, instance.next_batch(0.0))
    offer = Offer("t", TransferKind.MIGRATION, MOVING, 2, "gateway-0", LAYOUT, 16)
    instance.receive("decode-1", offer, 0.0)
    assert instance.pool.counts().reserved == 4
    return instance


def test_a_sequence_that_grew_on_its_way_takes_no_block_that_a_swap_is_reading():
    instance = swapping_instance()
    batch = instance.next_batch(0.0)
    while not batch.swaps:
        run(instance, batch)
        batch = instance.next_batch(0.0)
    instance.receive("decode-1", Ready("t", 17, 0, 2, (0, 1, 2, 3, 4)), 0.0)
    assert instance.take_pulls() == []
    run(instance, batch)
    (order,) = instance.take_pulls()
    assert len(order.target_blocks) == 5
    instance.receive("decode-1", Cancelled("t", "StaleEpoch", "the request has ended"), 0.0)
    instance.pull_finished("t", order.number, None, 0.0)
    while instance.load().sequences:
        run(instance, instance.next_batch(0.0))
    assert instance.pool.available == BLOCKS
    instance.pool.check()
