"""What the shared-memory transport alone promises."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtransfer
from engine.errors import BadMessage, PeerLost, TransportError, Unsupported
from kvtransfer.copying import copy_by_memmove, native_copy
from kvtransfer.shared_memory import SharedMemoryTransport, SharedPool, shared_pool
from kvtransfer.transport import Pool, decode_metadata, encode_metadata
from tests.kvtransfer.peers import peer, pieces

NBYTES = 1 << 16


@pytest.fixture
def target():
    made = SharedMemoryTransport("target", shared_pool(NBYTES))
    yield made
    made.close()


def altered(metadata, **changes):
    found = decode_metadata("shared_memory", SharedPool, metadata)
    return encode_metadata("shared_memory", replace(found, **changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"started_ticks": 1}, "another one than the peer"),
        ({"inode": 1}, "is not the pool meant"),
        ({"nbytes": 2 * NBYTES}, "is not the pool meant"),
        ({"fd": 0}, "is not the pool meant"),
        ({"fd": 10_000}, "no longer holds its pool"),
    ],
)
def test_a_reused_pid_or_descriptor_is_not_mistaken_for_the_peer(target, changes, why):
    metadata = altered(target.metadata("target"), **changes)
    with pytest.raises(PeerLost, match=why):
        target.connect("source", metadata)


def test_a_peer_that_has_ended_is_lost(target):
    with peer("shared_memory", nbytes=NBYTES) as source:
        metadata = source.metadata()
    with pytest.raises(PeerLost, match="is gone"):
        target.connect("source", metadata)


def test_a_peer_of_another_host_is_refused(target):
    with pytest.raises(TransportError, match="another host: elsewhere"):
        target.connect("source", altered(target.metadata("target"), host="elsewhere"))


@pytest.mark.parametrize("changes", [{"pid": -1}, {"pid": 1 << 40}, {"fd": -1}, {"nbytes": 0}])
def test_impossible_numbers_are_no_metadata(target, changes):
    with pytest.raises(BadMessage, match="no such pool"):
        target.connect("source", altered(target.metadata("target"), **changes))


def test_a_pool_that_cannot_be_mapped_is_unsupported():
    private = Pool.of_array(np.zeros(8, np.uint8))
    with pytest.raises(Unsupported, match="needs a pool on a memfd"):
        SharedMemoryTransport("target", private)


def test_a_stopped_peer_can_still_be_read(target):
    with peer("shared_memory", nbytes=NBYTES) as source:
        target.connect("source", source.metadata())
        source.stop()
        target.pull("source", pieces((0, 0, NBYTES))).wait(30)
    assert (target._pool.bytes() == source.content).all()


def open_descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left_open(target):
    with peer("shared_memory", nbytes=NBYTES) as source:
        metadata = source.metadata()
        before = open_descriptors()
        for _ in range(3):
            target.connect("source", metadata)
        with pytest.raises(PeerLost):
            target.connect("other", altered(metadata, inode=1))
        target.disconnect("source")
        assert open_descriptors() == before


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("native") / "copy.so"
    source = Path(kvtransfer.__path__[0]) / "native" / "copy.cpp"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return native_copy(str(library))


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(0, 40000)), max_size=4
    )
)
def test_the_native_routine_and_memmove_copy_alike(native, rows):
    source = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8)
    copies = pieces(*[(s + 40300 * i, t + 40300 * i, n) for i, (s, t, n) in enumerate(rows)])
    results = []
    for routine in (native, copy_by_memmove):
        result = np.zeros(200_000, np.uint8)
        routine(result.ctypes.data, source.ctypes.data, copies)
        results.append(result)
    assert np.array_equal(*results)
