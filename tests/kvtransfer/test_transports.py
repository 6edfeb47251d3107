"""The contract of all transports, run over each one that this machine offers."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import BadMessage, ChecksumMismatch, PeerLost, TransportError
from kvtransfer.memory import MemoryNetwork, MemoryTransport
from kvtransfer.nccl import NcclTransport
from kvtransfer.shared_memory import shared_pool
from kvtransfer.transport import TransportLimits, checksum, compare_checksums
from tests.kvtransfer.peers import TRANSPORTS, Peer, pattern, pieces
from tests.kvtransfer.two_sided import FakeNccl, ServedTarget

POOL_BYTES = 1 << 20
WAIT_S = 600
LIMITS = TransportLimits(
    slice_bytes=1 << 16, slice_timeout_s=WAIT_S, fence_timeout_s=WAIT_S, queued_pulls=64
)


class MemoryPeer:
    """The in-memory stand-in for a process."""

    def __init__(self, network, seed):
        self.content = pattern(POOL_BYTES, seed)
        pool = shared_pool(POOL_BYTES)
        pool.bytes()[:] = self.content
        self._transport = MemoryTransport("source", pool, network)

    def metadata(self):
        return self._transport.metadata("target")

    def kill(self):
        self._transport.close()

    close = kill


class NcclPeer:
    """A source that must serve what is pulled from it."""

    def __init__(self, library, seed):
        self.content = pattern(POOL_BYTES, seed)
        pool = shared_pool(POOL_BYTES)
        pool.bytes()[:] = self.content
        self.transport = NcclTransport("source", replace(pool, device="cuda:1"), library, LIMITS)

    def metadata(self):
        return self.transport.metadata("target")

    def kill(self):
        self.transport.close()

    close = kill


class Bench:
    """A target, and sources made on demand."""

    def __init__(self, kind):
        self.pool = shared_pool(POOL_BYTES)
        self._kind = kind
        self._network, self._nccl = MemoryNetwork(), FakeNccl()
        self._sources = []
        if kind == "memory":
            self.target = MemoryTransport("target", self.pool, self._network, LIMITS)
        elif kind == "nccl":
            on_gpu = replace(self.pool, device="cuda:0")
            self.target = ServedTarget(NcclTransport("target", on_gpu, self._nccl, LIMITS))
        else:
            self.target = TRANSPORTS[kind]("target", self.pool, LIMITS)

    def source(self, seed=1):
        if self._kind == "memory":
            made = MemoryPeer(self._network, seed)
        elif self._kind == "nccl":
            made = NcclPeer(self._nccl, seed)
        else:
            made = Peer(self._kind, nbytes=POOL_BYTES, seed=seed)
        self._sources.append(made)
        return made

    def connected(self, name="source", seed=1):
        made = self.source(seed)
        self.meet(name, made)
        return made

    def meet(self, name, source):
        self.target.connect(name, source.metadata())
        if self._kind == "nccl":
            self.target.sources[name] = source.transport

    def mend(self, name, source):
        """Where both sides take part, a pull that was cancelled has cost the connection."""
        if self.target.two_sided(name):
            self.meet(name, source)

    def close(self):
        self.target.close()
        for source in self._sources:
            source.close()


@pytest.fixture(params=["memory", "nccl", *TRANSPORTS])
def bench(request):
    made = Bench(request.param)
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pull ")]


def test_a_pull_brings_its_pieces_and_touches_nothing_else(bench):
    source = bench.connected()
    copies = pieces((0, 4096, 100), (70000, 10, 1), (500000, 300000, 200000))
    bench.target.pull("source", copies).wait(WAIT_S)
    expected = np.zeros(POOL_BYTES, np.uint8)
    for start, to, count in ((0, 4096, 100), (70000, 10, 1), (500000, 300000, 200000)):
        expected[to : to + count] = source.content[start : start + count]
    assert np.array_equal(bench.pool.bytes(), expected)


def test_many_pulls_end_in_the_order_they_were_asked(bench):
    bench.connected()
    ended = queue.SimpleQueue()
    for number in range(16):
        pull = bench.target.pull("source", pieces((0, number * 65536, 65536)))
        pull.add_done_callback(lambda number=number: ended.put(number))
    assert [ended.get(timeout=WAIT_S) for _ in range(16)] == list(range(16))
    assert pull.done()


def test_a_pull_of_nothing_is_done(bench):
    bench.connected()
    bench.target.pull("source", pieces()).wait(WAIT_S)
    assert not bench.pool.bytes().any()


def test_serving_asks_nothing_of_a_source_that_is_read_one_sidedly(bench):
    bench.connected()
    if bench.target.two_sided("source"):
        pytest.skip("both sides take part")
    assert bench.target.serve("source", pieces((0, 0, 1))).done()


def test_a_done_callback_comes_even_if_the_pull_has_ended(bench):
    bench.connected()
    pull = bench.target.pull("source", pieces((0, 0, 8)))
    pull.wait(WAIT_S)
    pull.cancel()
    called = threading.Event()
    pull.add_done_callback(called.set)
    assert called.is_set()


def test_checksums_agree_on_both_sides_and_tell_an_altered_byte(bench):
    source = bench.connected()
    copies = pieces((100, 900000, 5000), (7, 0, 11))
    bench.target.pull("source", copies).wait(WAIT_S)
    sent = shared_pool(POOL_BYTES)
    sent.bytes()[:] = source.content
    theirs = checksum(sent, copies.source_offsets, copies.nbytes)
    compare_checksums("block 3", theirs, checksum(bench.pool, copies.target_offsets, copies.nbytes))
    bench.pool.bytes()[900001] ^= 1
    with pytest.raises(ChecksumMismatch, match="block 3: source sent 0x"):
        compare_checksums(
            "block 3", theirs, checksum(bench.pool, copies.target_offsets, copies.nbytes)
        )


def test_after_cancel_no_byte_is_written(bench):
    source = bench.connected()
    pulls = [bench.target.pull("source", pieces((0, 0, POOL_BYTES))) for _ in range(8)]
    for pull in reversed(pulls):
        pull.cancel()
    bench.pool.bytes()[:] = 0
    bench.mend("source", source)
    bench.target.pull("source", pieces((0, 0, 1))).wait(WAIT_S)
    assert not bench.pool.bytes()[1:].any()


def test_a_cancelled_pull_says_so_unless_it_was_done(bench):
    bench.connected()
    pull = bench.target.pull("source", pieces((0, 0, 8)))
    pull.wait(WAIT_S)
    pull.cancel()
    assert pull.done()


def test_a_dead_peer_is_lost_and_the_others_are_not(bench):
    dying, living = bench.connected("dying", 1), bench.connected("living", 2)
    bench.target.pull("dying", pieces((0, 0, 64))).wait(WAIT_S)
    dying.kill()
    with pytest.raises(PeerLost):
        bench.target.pull("dying", pieces((0, 0, 64))).wait(WAIT_S)
    bench.target.pull("living", pieces((0, 0, POOL_BYTES))).wait(WAIT_S)
    assert np.array_equal(bench.pool.bytes(), living.content)


def test_a_restarted_peer_of_the_same_name_is_read_anew(bench):
    bench.connected("source", 1).kill()
    restarted = bench.connected("source", 2)
    bench.target.pull("source", pieces((0, 0, POOL_BYTES))).wait(WAIT_S)
    assert np.array_equal(bench.pool.bytes(), restarted.content)


def test_a_copy_outside_either_pool_is_refused_by_name(bench):
    bench.connected()
    for row, side in (
        ((POOL_BYTES - 1, 0, 2), "source"),
        ((0, POOL_BYTES, 1), "target"),
        ((-1, 0, 1), "source"),
        ((0, 0, -1), "source"),
    ):
        with pytest.raises(TransportError, match=rf"outside the {side}'s pool of {POOL_BYTES}"):
            bench.target.pull("source", pieces(row))
    assert not bench.pool.bytes().any()


def test_an_unknown_peer_is_an_error(bench):
    with pytest.raises(TransportError, match="not connected to 'nobody'"):
        bench.target.pull("nobody", pieces((0, 0, 1)))


def test_no_more_pulls_wait_than_the_limit_allows(bench):
    if isinstance(bench.target, MemoryTransport):
        pytest.skip("in memory nothing waits")
    bench.connected()
    whole = pieces(*[(0, 0, POOL_BYTES)] * 64)
    accepted = []

    def fill() -> None:
        while len(accepted) < 1000 * LIMITS.queued_pulls:  # some may end meanwhile
            accepted.append(bench.target.pull("source", whole))

    with pytest.raises(TransportError, match="queued_pulls: 64"):
        fill()
    assert len(accepted) >= LIMITS.queued_pulls
    bench.target.disconnect("source")


def test_truncated_or_foreign_metadata_is_refused(bench):
    metadata = bench.target.metadata("source")
    for end in range(len(metadata)):
        with pytest.raises(BadMessage):
            bench.target.connect("source", metadata[:end])
    for kind in ("memory", "nccl", *TRANSPORTS):
        other = Bench(kind)
        if other.target.name != bench.target.name:
            with pytest.raises(BadMessage, match=f"of transport '{kind}'"):
                bench.target.connect("source", other.target.metadata("target"))
        other.close()


def test_disconnecting_and_closing_twice_is_once(bench):
    bench.connected()
    bench.target.disconnect("source")
    bench.target.disconnect("source")
    with pytest.raises(TransportError, match="not connected"):
        bench.target.pull("source", pieces((0, 0, 1)))
    bench.target.close()
    bench.target.close()
