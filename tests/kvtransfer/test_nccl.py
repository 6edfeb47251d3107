"""NCCL's ordering and failure logic over a fake library; the real one needs two GPUs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engine.errors import BadMessage, PeerLost, TransportError, Unsupported
from kvtransfer.nccl import NcclMetadata, NcclTransport
from kvtransfer.shared_memory import shared_pool
from kvtransfer.transport import Pool, TransportLimits, decode_metadata
from tests.kvtransfer.peers import pattern, pieces
from tests.kvtransfer.two_sided import FakeNccl

NBYTES = 1 << 16
WAIT_S = 600
PATIENT = TransportLimits(slice_bytes=1 << 12, slice_timeout_s=WAIT_S, fence_timeout_s=WAIT_S)
HASTY = TransportLimits(slice_bytes=1 << 12, slice_timeout_s=0.3)


@pytest.fixture
def pair(request):
    """Two ranks that can read each other, and their pools."""
    limits = getattr(request, "param", PATIENT)
    library = FakeNccl()
    pools = [shared_pool(NBYTES) for _ in range(2)]
    for seed, pool in enumerate(pools):
        pool.bytes()[:] = pattern(NBYTES, seed)
    a, b = (
        NcclTransport(name, Pool(pool.address, NBYTES, pool, f"cuda:{number}"), library, limits)
        for number, (name, pool) in enumerate(zip("ab", pools, strict=True))
    )
    meet(a, b)
    yield a, b, pools
    a.close()
    b.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pull ")]


def meet(a, b):
    to_b, to_a = a.metadata("b"), b.metadata("a")
    a.connect("b", to_a)
    b.connect("a", to_b)


def test_served_copies_arrive_where_the_target_pulls_them(pair):
    a, b, pools = pair
    copies = pieces((0, 30000, 20000), (60000, 5, 7))
    serving, pull = a.serve("b", copies), b.pull("a", copies)
    pull.wait(WAIT_S)
    serving.wait(WAIT_S)
    expected = pattern(NBYTES, 1)
    expected[30000:50000] = pools[0].bytes()[:20000]
    expected[5:12] = pools[0].bytes()[60000:60007]
    assert np.array_equal(pools[1].bytes(), expected)


def test_two_ranks_may_read_each_other_at_once(pair):
    a, b, pools = pair
    low, high = pieces((0, 0, 30000)), pieces((30000, 30000, 30000))
    pulls = [a.pull("b", low), b.pull("a", high)]
    serves = [b.serve("a", low), a.serve("b", high)]
    for pull in pulls + serves:
        pull.wait(WAIT_S)
    assert np.array_equal(pools[0].bytes()[:60000], pools[1].bytes()[:60000])


@pytest.mark.parametrize("pair", [HASTY], indirect=True, ids=["hasty"])
def test_a_source_that_does_not_serve_is_lost_in_bounded_time(pair):
    _, b, pools = pair
    pull = b.pull("a", pieces((0, 0, 8)))
    with pytest.raises(PeerLost, match="longer than"):
        pull.wait(WAIT_S)
    assert np.array_equal(pools[1].bytes(), pattern(NBYTES, 1))


def let_join(library):
    """The rank that was kept joining; returns once it has."""
    library.may_join.set()
    assert library.joined.acquire(timeout=WAIT_S)
    for thread in threading.enumerate():
        if thread.name.startswith("join "):
            thread.join(WAIT_S)


def test_a_pull_that_is_cancelled_while_the_ranks_join_ends_at_once_and_never_writes(pair):
    _, b, pools = pair
    library = b._library
    library.may_join.clear()
    pull = b.pull("a", pieces((0, 0, NBYTES)))
    assert library.joining.acquire(timeout=WAIT_S)
    pull.cancel(WAIT_S)
    with pytest.raises(TransportError):
        pull.done()
    let_join(library)
    assert (len(library.aborted), library.started) == (1, 0)
    assert np.array_equal(pools[1].bytes(), pattern(NBYTES, 1))


UNMET = TransportLimits(slice_bytes=1 << 12, join_timeout_s=0.01)


@pytest.mark.parametrize("pair", [UNMET], indirect=True, ids=["unmet"])
def test_a_peer_that_never_joins_is_lost_in_bounded_time(pair):
    _, b, _ = pair
    b._library.may_join.clear()
    ended = threading.Event()
    pull = b.pull("a", pieces((0, 0, 8)))
    pull.add_done_callback(ended.set)
    with pytest.raises(PeerLost, match=r"has not joined within 0\.01 s"):
        pull.wait(WAIT_S)
    assert ended.wait(WAIT_S)
    let_join(b._library)
    assert (len(b._library.aborted), b._library.started) == (1, 0)


def test_an_abort_on_one_side_ends_the_other_and_a_new_meeting_mends_it(pair):
    a, b, pools = pair
    whole = pieces((0, 0, NBYTES))
    pull = b.pull("a", whole)
    assert b._library.joined.acquire(timeout=WAIT_S)
    pull.cancel(WAIT_S)
    with pytest.raises(PeerLost):
        a.serve("b", whole).wait(WAIT_S)
    with pytest.raises(TransportError):
        b.pull("a", whole).wait(WAIT_S)
    meet(a, b)
    serving, pull = a.serve("b", whole), b.pull("a", whole)
    pull.wait(WAIT_S)
    serving.wait(WAIT_S)
    assert np.array_equal(pools[0].bytes(), pools[1].bytes())


def test_each_meeting_has_a_communicator_of_its_own(pair):
    a, _, _ = pair
    ids = [decode_metadata("nccl", NcclMetadata, a.metadata("b")).unique_id for _ in range(2)]
    assert ids[0] != ids[1]


def test_a_peer_that_cuts_slices_otherwise_is_refused(pair):
    a, _, pools = pair
    pool = Pool(pools[1].address, NBYTES, pools[1], "cuda:2")
    other = NcclTransport("c", pool, FakeNccl(), TransportLimits(slice_bytes=77))
    with pytest.raises(TransportError, match="slice_bytes: c has 77, this rank 4096"):
        a.connect("c", other.metadata("a"))
    other.close()


def test_a_reader_that_was_given_no_metadata_is_not_served(pair):
    a, _, _ = pair
    with pytest.raises(TransportError, match="has not been given"):
        a.serve("stranger", pieces((0, 0, 1)))


def test_one_direction_is_met_anew_without_the_other(pair):
    a, b, pools = pair
    cut_off = b.pull("a", pieces((0, 0, 8)))
    cut_off.cancel()
    b.connect("a", a.metadata("b"))
    copies = pieces((5, 50, 500))
    a.serve("b", copies)
    b.pull("a", copies).wait(WAIT_S)
    b.serve("a", copies)
    a.pull("b", copies).wait(WAIT_S)
    assert np.array_equal(pools[1].bytes()[50:550], pattern(NBYTES, 0)[5:505])


def test_copies_outside_the_pools_and_foreign_metadata_are_refused(pair):
    a, b, _ = pair
    with pytest.raises(TransportError, match="outside the source's pool"):
        b.pull("a", pieces((NBYTES, 0, 1)))
    with pytest.raises(TransportError, match="outside the source's pool"):
        a.serve("b", pieces((NBYTES - 1, 0, 2)))
    with pytest.raises(TransportError, match="not connected"):
        a.pull("nobody", pieces((0, 0, 1)))
    with pytest.raises(BadMessage):
        a.connect("b", b"\x93\xa4nccl")


def test_a_pool_on_the_cpu_is_unsupported():
    with pytest.raises(Unsupported, match="between GPUs"):
        NcclTransport("a", shared_pool(8), FakeNccl())
