"""NIXL with peers that are killed, stopped and restarted."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest

from engine.errors import PeerLost, TransportError
from kvtransfer.nixl import NixlTransport, bindings
from kvtransfer.shared_memory import shared_pool
from kvtransfer.transport import TransportLimits
from tests.kvtransfer.peers import TRANSPORTS, Peer, peer, pieces, reader

pytestmark = pytest.mark.skipif("nixl" not in TRANSPORTS, reason="nixl cannot be imported here")

NBYTES = 16 << 20
WHOLE = pieces((0, 0, NBYTES))
KILLS = 20
QUEUED = 800
"""So many that they cannot all be over before the kill, however late it comes."""
PATIENCE_S = 600.0
PATIENT = TransportLimits(
    slice_bytes=1 << 20, slice_timeout_s=PATIENCE_S, fence_timeout_s=PATIENCE_S
)
HASTY = TransportLimits(slice_bytes=1 << 20, slice_timeout_s=4.0, fence_timeout_s=0.2)


@pytest.fixture
def survivor(request):
    """It waits for its peers as long as the test says, patiently if that says nothing."""
    limits = getattr(request, "param", PATIENT)
    made = NixlTransport("target", shared_pool(NBYTES), limits)
    yield made
    made.close()


hasty = pytest.mark.parametrize("survivor", [HASTY], indirect=True, ids=["hasty"])


def assert_reads(survivor, name, source):
    survivor._pool.bytes()[:] = 0
    survivor.pull(name, WHOLE).wait(PATIENCE_S)
    assert np.array_equal(survivor._pool.bytes(), source.content)


def test_a_peer_killed_in_mid_copy_twenty_times_never_takes_the_survivor_down(survivor):
    with peer("nixl", name="living", nbytes=NBYTES, seed=2) as living, ExitStack() as dying:
        survivor.connect("living", living.metadata())
        for _ in range(KILLS):
            source = Peer("nixl", nbytes=NBYTES)
            dying.callback(source.close)
            survivor.connect("dying", source.metadata())
            pulls = [survivor.pull("dying", WHOLE) for _ in range(QUEUED)]
            pulls[0].wait(PATIENCE_S)
            source.kill()
            with pytest.raises(PeerLost):
                pulls[-1].wait(PATIENCE_S)
            for pull in pulls:
                pull.cancel(PATIENCE_S)
            assert_reads(survivor, "living", living)


@hasty
def test_a_peer_that_is_stopped_is_lost_in_bounded_time_and_fenced_once_it_goes_on(survivor):
    with (
        peer("nixl", nbytes=NBYTES) as stopped,
        peer("nixl", name="living", nbytes=NBYTES, seed=2) as living,
    ):
        survivor.connect("living", living.metadata())
        metadata = stopped.metadata()
        survivor.connect("stopped", metadata)
        stopped.stop()
        pulls = [survivor.pull("stopped", WHOLE) for _ in range(2)]
        for pull in pulls:
            with pytest.raises(PeerLost, match="longer than"):
                pull.wait(PATIENCE_S)
        with pytest.raises(PeerLost, match="longer than"):
            survivor.pull("stopped", WHOLE)
        pulls[1].cancel()
        with pytest.raises(TransportError, match="could not be fenced"):
            pulls[0].cancel()
        assert_reads(survivor, "living", living)
        ended = threading.Event()
        pulls[0].add_done_callback(ended.set)
        assert not ended.is_set()
        stopped.resume()
        assert ended.wait(PATIENCE_S)
        survivor.connect("stopped", metadata)
        assert_reads(survivor, "stopped", stopped)


@hasty
def test_closing_does_not_wait_for_a_stopped_peer(survivor):
    with peer("nixl", nbytes=NBYTES) as stopped:
        survivor.connect("stopped", stopped.metadata())
        stopped.stop()
        pull = survivor.pull("stopped", WHOLE)
        survivor.close()
        with pytest.raises(TransportError):
            pull.done()
        with pytest.raises(TransportError, match="is closed"):
            survivor.metadata("anyone")


def test_readers_killed_in_mid_copy_do_not_take_their_source_down(survivor):
    survivor._pool.bytes()[:] = 7
    for _ in range(3):
        with reader(survivor.metadata("reader"), NBYTES) as killed:
            killed.kill()
    with reader(survivor.metadata("reader"), NBYTES) as last:
        assert last.reads() == 7


class RefusingAgent:
    """An agent of NIXL that finds a way, but not to this memory."""

    def __init__(self, *_):
        self.createBackend = lambda *_: "UCX"

    def registerMem(self, *_):  # noqa: N802  as NIXL calls it
        raise bindings().nixlBackendError("NIXL_ERR_BACKEND")


def test_memory_that_nixl_does_not_register_is_an_error_of_the_transport(monkeypatch):
    monkeypatch.setattr(bindings(), "nixlAgent", RefusingAgent)
    with pytest.raises(TransportError, match="cannot register the pool: NIXL_ERR_BACKEND"):
        NixlTransport("target", shared_pool(4096))
