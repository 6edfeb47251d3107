import asyncio
from dataclasses import replace

import numpy as np
import pytest

from cluster.instance.mover import InstanceMover, RankMover, rank_name
from engine.errors import InstanceLost, PeerLost, TransportError
from engine.layout import KvLayout
from kvtransfer.memory import MemoryNetwork, MemoryTransport
from kvtransfer.transfer import PullCancel, PullOrder
from kvtransfer.transport import Pool
from tests.cluster.movers import DirectPeers

LAYOUT = KvLayout("m", 2, 1, 8, 4, "float32")
PREFILL = rank_name("prefill-0", 0)
ORDER = PullOrder("t1", 1, "prefill-0", LAYOUT, (0, 2), (3, 1), 0, 2, 16)


def pool_of(value):
    return Pool.of_array(np.full(LAYOUT.block_bytes(0) * 4, value, np.uint8))


@pytest.fixture
def ranks():
    """A source whose bytes are 7 and a target whose bytes are 0, copying when told to."""
    network = MemoryNetwork(automatic=False)
    source_pool, target_pool = pool_of(7), pool_of(0)
    source = MemoryTransport(rank_name("prefill-0", 0), source_pool, network)
    target = MemoryTransport(rank_name("decode-0", 0), target_pool, network)
    target.connect(rank_name("prefill-0", 0), source.metadata(rank_name("decode-0", 0)))
    return network, RankMover(LAYOUT, 0, target), target_pool


async def test_a_pull_ends_when_its_bytes_are_there(ranks):
    network, mover, pool = ranks
    pulling = asyncio.ensure_future(mover.pull(ORDER))
    await asyncio.sleep(0)
    assert not pulling.done()
    while network.step():
        pass
    await pulling
    blocks = pool.bytes().reshape(4, -1)
    assert [bool((block == 7).all()) for block in blocks] == [False, True, False, True]


async def test_a_cancelled_pull_is_fenced_and_reports_its_end(ranks):
    network, mover, pool = ranks
    pulling = asyncio.ensure_future(mover.pull(ORDER))
    await asyncio.sleep(0)
    await mover.cancel("t1")
    with pytest.raises(TransportError, match="cancelled"):
        await pulling
    assert not network.step()
    assert not pool.bytes().any()


class Meeting:
    """A target, and a source that is there from `appear` on."""

    def __init__(self):
        self.network, self._movers, self.pool = MemoryNetwork(), {}, pool_of(0)
        self._at = ""
        peers = DirectPeers(rank_name("decode-0", 0), self._movers)
        transport = MemoryTransport(peers.me, self.pool, self.network)
        self.target = RankMover(LAYOUT, 0, transport, peers=peers)

    def appear(self):
        transport = MemoryTransport(PREFILL, pool_of(7), self.network)
        self._at = transport._address
        self._movers[PREFILL] = RankMover(LAYOUT, 0, transport)

    def lose_connection(self):
        self.network.leave(self._at)

    def has_arrived(self):
        blocks = self.pool.bytes().reshape(4, -1)
        return [bool((block == 7).all()) for block in blocks] == [False, True, False, True]


async def test_a_living_peer_whose_connection_was_lost_is_connected_anew_by_the_next_pull():
    meeting = Meeting()
    meeting.appear()
    await meeting.target.meet([PREFILL])
    meeting.lose_connection()
    with pytest.raises(PeerLost):
        await meeting.target.pull(ORDER)
    meeting.appear()
    await meeting.target.pull(ORDER)
    assert meeting.has_arrived()


async def test_a_peer_that_did_not_answer_is_met_by_the_next_pull():
    meeting = Meeting()
    with pytest.raises(PeerLost):
        await meeting.target.meet([PREFILL])
    meeting.appear()
    await meeting.target.pull(ORDER)
    assert meeting.has_arrived()


async def test_a_pull_that_has_time_goes_piece_by_piece_and_arrives_whole(ranks, monkeypatch):
    monkeypatch.setattr("cluster.instance.mover.GENTLE_BYTES", LAYOUT.block_bytes(0))
    network, mover, pool = ranks
    mover._copy_share = 0.5
    pulling = asyncio.ensure_future(mover.pull(replace(ORDER, urgent=False)))
    while not pulling.done():
        network.step()
        await asyncio.sleep(0)
    await pulling
    blocks = pool.bytes().reshape(4, -1)
    assert [bool((block == 7).all()) for block in blocks] == [False, True, False, True]
    assert not mover._paces


async def test_a_pull_that_pauses_can_be_cancelled(ranks, monkeypatch):
    monkeypatch.setattr("cluster.instance.mover.GENTLE_BYTES", LAYOUT.block_bytes(0))
    network, mover, pool = ranks
    mover._copy_share = 1e-12
    pulling = asyncio.ensure_future(mover.pull(replace(ORDER, urgent=False)))
    while mover._under_way or not pool.bytes().any():
        network.step()
        await asyncio.sleep(0)
    await mover.cancel("t1")
    with pytest.raises(TransportError, match="cancelled"):
        await pulling
    assert not mover._paces


async def test_an_unknown_source_is_a_transfer_error(ranks):
    _, mover, _ = ranks
    with pytest.raises(TransportError, match="not connected"):
        await mover.pull(PullOrder("t1", 1, "decode-9", LAYOUT, (0,), (0,), 0, 2, 8))


class Scripted:
    """A rank whose pulls end as told."""

    def __init__(self, ending=None):
        self.ending, self.cancelled = ending, []

    async def pull(self, order):
        if self.ending is not None:
            raise self.ending

    async def cancel(self, transfer):
        self.cancelled.append(transfer)


async def run_order(*ranks):
    ended = []
    async with asyncio.TaskGroup() as tasks:
        InstanceMover(ranks, tasks).start(ORDER, lambda order, error: ended.append((order, error)))
    return ended


async def test_an_instances_pull_has_ended_when_every_rank_is_done():
    assert await run_order(Scripted(), Scripted()) == [(ORDER, None)]


async def test_one_ranks_failure_fails_the_pull():
    failure = TransportError("lost")
    assert await run_order(Scripted(), Scripted(failure)) == [(ORDER, failure)]


async def test_a_dead_rank_is_not_a_failed_pull_but_the_end_of_the_instance():
    with pytest.raises(ExceptionGroup) as caught:
        await run_order(Scripted(), Scripted(InstanceLost("rank 1")))
    assert caught.group_contains(InstanceLost)


async def test_a_cancel_reaches_every_rank():
    ranks = [Scripted(), Scripted()]
    async with asyncio.TaskGroup() as tasks:
        InstanceMover(ranks, tasks).cancel(PullCancel("t1"))
    assert [rank.cancelled for rank in ranks] == [["t1"], ["t1"]]
