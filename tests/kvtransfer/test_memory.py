"""The in-memory transport under a network that moves only when told to."""

from __future__ import annotations

import pytest

from engine.errors import DeadlineExceeded, PeerLost, TransportError
from kvtransfer.memory import MemoryNetwork, MemoryTransport
from kvtransfer.shared_memory import shared_pool
from kvtransfer.transport import TransportLimits
from tests.kvtransfer.peers import pattern, pieces

NBYTES = 1000


@pytest.fixture
def world():
    network = MemoryNetwork(automatic=False)
    pools = [shared_pool(NBYTES) for _ in range(2)]
    pools[0].bytes()[:] = pattern(NBYTES, 3)
    source, target = (
        MemoryTransport(name, pool, network, TransportLimits(slice_bytes=100))
        for name, pool in zip(("source", "target"), pools, strict=True)
    )
    target.connect("source", source.metadata("target"))
    yield network, source, target, pools
    target.close()
    source.close()
    assert not network.step()


def test_nothing_moves_before_the_network_steps(world):
    network, _, target, pools = world
    pull = target.pull("source", pieces((0, 0, NBYTES)))
    assert not pull.done()
    with pytest.raises(DeadlineExceeded):
        pull.wait(1.0)
    while network.step():
        pass
    assert pull.done()
    assert (pools[0].bytes() == pools[1].bytes()).all()


def test_a_source_that_dies_between_slices_loses_the_pull(world):
    network, source, target, pools = world
    pull = target.pull("source", pieces((0, 0, NBYTES)))
    assert network.step()
    source.close()
    assert network.step()
    with pytest.raises(PeerLost, match="source#1 is gone"):
        pull.done()
    assert not pools[1].bytes()[100:].any()


def test_cancel_between_slices_leaves_the_rest_unwritten(world):
    network, _, target, pools = world
    pull = target.pull("source", pieces((0, 0, NBYTES)))
    assert network.step()
    pull.cancel()
    assert not network.step()
    with pytest.raises(TransportError, match="cancelled"):
        pull.done()
    assert not pools[1].bytes()[100:].any()
