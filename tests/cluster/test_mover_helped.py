"""Pulls for which the source must do something: send its half, or code what is pulled."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cluster.instance import coded
from cluster.instance.mover import RankMover
from engine.errors import LeaseExpired, TransportError
from kvtransfer.nccl import NcclPull, NcclTransport
from kvtransfer.plan import plan_cells
from kvtransfer.shared_memory import SharedMemoryTransport, shared_pool
from kvtransfer.transfer import PullOrder
from kvtransfer.transport import TransportLimits
from tests.cluster.movers import (
    BLOCKS,
    SHAPE,
    DirectPeers,
    PipePeers,
    blocks_of,
    coding_mover,
    coding_pool,
    fill,
    source_process,
)
from tests.kvtransfer.peers import TRANSPORTS, pattern
from tests.kvtransfer.two_sided import FakeNccl

SOURCE, TARGET = "source/0", "target/0"
TOKENS = 5 * SHAPE.block_tokens - 3
ORDER = PullOrder("t", 1, "source", SHAPE, (7, 0, 2, 9, 4), (1, 3, 0, 5, 8), 1, 3, TOKENS)
INT8_BOUND = 0.006
"""Of a cell's largest value: what docs/compression.md promises."""


def order(number, source_block, target_block, transfer="t"):
    tokens = SHAPE.block_tokens
    return PullOrder(
        transfer, number, "source", SHAPE, (source_block,), (target_block,), 0, 4, tokens
    )


class Scrambled(DirectPeers):
    """Delivers requests in the wrong order, so many at a time."""

    def __init__(self, me, movers, at_a_time):
        super().__init__(me, movers)
        self._at_a_time, self._waiting = at_a_time, []

    async def serve(self, peer, request):
        self._waiting.append((peer, request))
        if len(self._waiting) == self._at_a_time:
            waiting, self._waiting = self._waiting, []
            for to, one in reversed(waiting):
                self._movers[to].serve(one)

    def lose(self):
        """Those that wait never arrive, and later ones come as they are sent."""
        self._at_a_time, self._waiting = 1, []


class Pair:
    """A source and a target rank over a transport that needs both."""

    def __init__(self, at_a_time=1):
        library, limits = FakeNccl(), TransportLimits(slice_bytes=1 << 10, slice_timeout_s=60.0)
        self.pools = [shared_pool(BLOCKS * SHAPE.block_bytes(0)) for _ in range(2)]
        for seed, pool in enumerate(self.pools):
            pool.bytes()[:] = pattern(pool.nbytes, seed)
        self.transports = [
            NcclTransport(name, replace(pool, device=f"cuda:{number}"), library, limits)
            for number, (name, pool) in enumerate(zip((SOURCE, TARGET), self.pools, strict=True))
        ]
        movers = {SOURCE: RankMover(SHAPE, 0, self.transports[0])}
        peers = self.requests = Scrambled(TARGET, movers, at_a_time)
        self.source = movers[SOURCE]
        self.target = RankMover(SHAPE, 0, self.transports[1], peers=peers)
        self.target.connect(SOURCE, self.source.metadata(TARGET))

    def blocks(self, side):
        return self.pools[side].bytes().reshape(BLOCKS, -1)

    def close(self):
        for transport in self.transports:
            transport.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


async def test_requests_that_overtake_one_another_are_served_in_the_order_of_the_pulls():
    pair = Pair(at_a_time=6)
    orders = [order(number, number, BLOCKS - 1 - number) for number in range(6)]
    async with asyncio.TaskGroup() as tasks:
        for one in orders:
            tasks.create_task(pair.target.pull(one))
    for number in range(6):
        assert (pair.blocks(1)[BLOCKS - 1 - number] == pair.blocks(0)[number]).all()
    pair.close()


async def test_after_a_cancelled_pull_the_next_one_connects_anew():
    pair = Pair(at_a_time=2)
    pulling = asyncio.ensure_future(pair.target.pull(order(1, 0, 1)))
    await asyncio.sleep(0)
    await pair.target.cancel("t")
    with pytest.raises(TransportError):
        await pulling
    pair.requests.lose()
    await pair.target.pull(order(2, 3, 4))
    assert (pair.blocks(1)[4] == pair.blocks(0)[3]).all()
    pair.close()


async def test_a_request_over_a_connection_that_is_no_more_is_refused(pair):
    pair.source.metadata(TARGET)
    with pytest.raises(TransportError, match="a connection that is no more"):
        await pair.target.pull(order(1, 0, 1))
    await pair.target.pull(order(2, 0, 1))
    assert (pair.blocks(1)[1] == pair.blocks(0)[0]).all()


async def test_an_order_whose_pull_cannot_be_fenced_yet_is_not_over(pair, monkeypatch):
    """Its blocks would be given to others while it may still write."""
    held = []

    def cannot_fence(pull, timeout_s=None):
        held.append(pull)
        refused.set()
        raise TransportError("a copy could not be fenced")

    refused = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(refused, "set", partial(loop.call_soon_threadsafe, refused.set))
    cancel = NcclPull.cancel
    monkeypatch.setattr(NcclPull, "cancel", cannot_fence)
    pair.source.metadata(TARGET)
    pulling = asyncio.ensure_future(pair.target.pull(order(1, 0, 1)))
    await refused.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not pulling.done()
    cancel(held[0])
    with pytest.raises(TransportError, match="a connection that is no more"):
        await pulling


async def test_a_source_without_slots_says_so():
    source = RankMover(SHAPE, 0, SharedMemoryTransport(SOURCE, shared_pool(8)))
    with pytest.raises(TransportError, match="compression is off here"):
        source.unstage(0)


class CodedPair:
    """Two ranks of this process that code what they move."""

    def __init__(self, **options):
        self.pools, self.memories = zip(*(coding_pool() for _ in range(2)), strict=True)
        fill(self.memories[0], seed=1)
        self.transports = [
            SharedMemoryTransport(name, pool)
            for name, pool in zip((SOURCE, TARGET), self.pools, strict=True)
        ]
        self.source = coding_mover(self.transports[0], self.memories[0], **options)
        peers = DirectPeers(TARGET, {SOURCE: self.source})
        self.target = coding_mover(self.transports[1], self.memories[1], peers=peers, **options)
        self.target.connect(SOURCE, self.source.metadata(TARGET))

    def close(self):
        for transport in self.transports:
            transport.close()


def check_arrived(source, target, bound):
    """The order's blocks are there, no further from the source than the bound, and no others."""
    sent = blocks_of(source)[list(ORDER.source_blocks), 1:3].clone()
    sent[-1, ..., -3:, :] = 0
    got = blocks_of(target)[list(ORDER.target_blocks), 1:3]
    peak = sent.abs().amax((-1, -2), keepdim=True)
    assert ((sent - got).abs() / peak).max() <= bound
    others = blocks_of(target).clone()
    others[list(ORDER.target_blocks), 1:3] = 0
    assert not others.any()


async def test_a_coded_pull_brings_kv_within_the_documented_error():
    pair = CodedPair()
    await pair.target.pull(ORDER)
    check_arrived(*pair.memories, INT8_BOUND)
    pair.close()


async def test_kv_is_sent_as_it_is_where_coding_does_not_pay(caplog):
    caplog.set_level("INFO")
    pair = CodedPair(link_bytes_per_s=1e12)
    await pair.target.pull(ORDER)
    sent = blocks_of(pair.memories[0])[list(ORDER.source_blocks), 1:3]
    assert torch.equal(sent, blocks_of(pair.memories[1])[list(ORDER.target_blocks), 1:3])
    assert "compression declined source=source codec=None why=" in caplog.text
    pair.close()


async def test_a_piece_whose_slot_was_taken_back_is_not_used():
    pair = CodedPair(lease_s=0.0)
    with pytest.raises(LeaseExpired, match="waited longer than 0 s"):
        await pair.target.pull(ORDER)
    assert not blocks_of(pair.memories[1]).any()
    pair.close()


async def test_slots_are_free_again_after_many_pulls_and_after_failures():
    pair = CodedPair()
    for _ in range(20):
        await pair.target.pull(ORDER)
    pair.target.disconnect(SOURCE)
    with pytest.raises(TransportError, match="not connected"):
        await pair.target.pull(ORDER)
    coders = (pair.source._coder, pair.target._coder)
    assert [coder._incoming.qsize() for coder in coders] == [4, 4]
    assert coders[0]._outgoing.qsize() + len(coders[0]._lent) == 4
    pair.close()


class OwnStream:
    """What a thread asked a GPU for, and whether it has waited for that."""

    def __init__(self):
        self.done = []

    def record_event(self):
        self.done.append("recorded")
        return self

    def synchronize(self):
        self.done.append("awaited")


def test_coding_on_a_gpu_waits_for_its_own_work_only(monkeypatch):
    """Another thread may be recording a graph, during which the device cannot be waited for."""
    stream, memory = OwnStream(), SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    coded._settle(memory)
    assert stream.done == ["recorded", "awaited"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"blocks": (BLOCKS,)}, "the pool has 12"),
        ({"blocks": ()}, "the pool has 12"),
        ({"last_layer": 9}, "layers"),
        ({"first_head": 2}, "heads"),
        ({"tokens": 9}, "not what 1 blocks hold"),
        ({"codec": "int3"}, "unknown here"),
    ],
)
async def test_a_request_for_what_is_not_there_is_refused_by_name(change, rule):
    pair = CodedPair()
    (part,) = pair.target._own_coder.pieces(part_of_one_block(), order(1, 0, 0), "int8")
    with pytest.raises(TransportError, match=rule):
        await pair.source.stage(replace(part.request, **change))
    pair.close()


def part_of_one_block():
    (part,) = plan_cells(SHAPE, SHAPE, (0,), (0,), 0, layers=range(4))
    return part


@pytest.mark.parametrize("kind", sorted(TRANSPORTS))
async def test_a_coded_hand_off_between_two_processes_is_within_the_documented_error(kind, caplog):
    caplog.set_level("INFO")
    process = source_process(kind, seed=5)
    pool, memory = coding_pool()
    transport = TRANSPORTS[kind](TARGET, pool)
    mover = coding_mover(transport, memory, peers=PipePeers(TARGET, process))
    mover.connect(SOURCE, process.receive())
    await mover.pull(ORDER)
    _, theirs = coding_pool()
    fill(theirs, seed=5)
    check_arrived(theirs, memory, INT8_BOUND)
    assert "compression chosen source=source codec=int8 why=" in caplog.text
    transport.close()
    process.close()


@pytest.mark.parametrize("kind", sorted(TRANSPORTS))
async def test_without_compression_a_hand_off_between_two_processes_is_bit_equal(kind):
    process = source_process(kind, seed=5)
    pool, memory = coding_pool()
    transport = TRANSPORTS[kind](TARGET, pool)
    mover = RankMover(SHAPE, 0, transport)
    mover.connect(SOURCE, process.receive())
    await mover.pull(ORDER)
    _, theirs = coding_pool()
    fill(theirs, seed=5)
    sent = blocks_of(theirs)[list(ORDER.source_blocks), 1:3]
    assert torch.equal(sent, blocks_of(memory)[list(ORDER.target_blocks), 1:3])
    transport.close()
    process.close()
