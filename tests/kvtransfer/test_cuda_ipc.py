"""CUDA IPC's transport over a GPU that is this process's own memory; tests/gpu has a real one."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import BadMessage, PeerLost, TransportError, Unsupported
from kvtransfer.auto import open_transports
from kvtransfer.copying import copy_by_memmove
from kvtransfer.cuda_ipc import CudaIpcTransport, IpcPool
from kvtransfer.cuda_memory import HANDLE_BYTES
from kvtransfer.process_watch import started_ticks
from kvtransfer.transport import Pool, TransportLimits, decode_metadata, encode_metadata
from tests.kvtransfer.peers import pattern, pieces

NBYTES, BEFORE = 1 << 16, 512
WAIT_S = 600.0


class FakeGpu:
    """Memory that pools lie in, `BEFORE` bytes from its start; handles are its number."""

    identity = "cuda:fake"

    def __init__(self):
        self._memories = []
        self.opened = []
        self.fails = False

    def pool(self, seed):
        memory = np.concatenate((np.zeros(BEFORE, np.uint8), pattern(NBYTES, seed)))
        self._memories.append(memory)
        return Pool(memory.ctypes.data + BEFORE, NBYTES, memory, "cuda:0"), memory[BEFORE:]

    def export(self, address):
        numbers = [i for i, m in enumerate(self._memories) if self._holds(m, address)]
        (number,) = numbers
        return bytes([number]) * HANDLE_BYTES, address - self._memories[number].ctypes.data

    def open(self, handle):
        start = self._memories[handle[0]].ctypes.data
        self.opened.append(start)
        return start

    def close(self, start):
        self.opened.remove(start)

    def copy(self, target_address, source_address, copies):
        if self.fails:
            raise TransportError("the device is broken")
        copy_by_memmove(target_address, source_address, copies)

    @staticmethod
    def _holds(memory, address):
        return memory.ctypes.data <= address < memory.ctypes.data + memory.nbytes


@pytest.fixture
def gpu():
    made = FakeGpu()
    yield made
    assert made.opened == []


@pytest.fixture
def ends(gpu):
    """The source, the target and their bytes."""
    (here, source), (there, target) = gpu.pool(1), gpu.pool(2)
    opened = [CudaIpcTransport(n, p, gpu=gpu) for n, p in (("source", here), ("target", there))]
    yield *opened, source, target
    for end in opened:
        end.close()


COPIES = pieces((0, 4096, 1000), (30_000, 7, 5000), (NBYTES - 8, 0, 7))


def test_pieces_arrive_and_nothing_else_changes(ends):
    source_end, target_end, source, target = ends
    expected = target.copy()
    for start, to, count in ((0, 4096, 1000), (30_000, 7, 5000), (NBYTES - 8, 0, 7)):
        expected[to : to + count] = source[start : start + count]
    target_end.connect("source", source_end.metadata("target"))
    target_end.pull("source", COPIES).wait(WAIT_S)
    assert np.array_equal(target, expected)
    assert np.array_equal(source, pattern(NBYTES, 1))
    assert source_end.serve("target", COPIES).done()
    assert not target_end.two_sided("source")


def test_a_copy_outside_either_pool_is_refused(ends):
    source_end, target_end, _, target = ends
    target_end.connect("source", source_end.metadata("target"))
    for row in ((0, NBYTES - 3, 4), (NBYTES - 3, 0, 4)):
        with pytest.raises(TransportError, match="lies outside"):
            target_end.pull("source", pieces(row))
    assert np.array_equal(target, pattern(NBYTES, 2))


def test_a_peer_that_is_connected_again_is_mapped_once(ends, gpu):
    source_end, target_end, _, _ = ends
    for _ in range(3):
        target_end.connect("source", source_end.metadata("target"))
        assert len(gpu.opened) == 1
    target_end.disconnect("source")
    assert gpu.opened == []
    with pytest.raises(TransportError, match="not connected"):
        target_end.pull("source", COPIES)


def changed(end, **changes):
    found = decode_metadata("cuda_ipc", IpcPool, end.metadata("target"))
    return encode_metadata("cuda_ipc", replace(found, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"host": "elsewhere"}, TransportError, "another GPU"),
        ({"gpu": "cuda:other"}, TransportError, "another GPU"),
        ({"started_ticks": 1}, PeerLost, "another one than the peer"),
        ({"handle": b"short"}, BadMessage, "no such pool"),
        ({"offset": -1}, BadMessage, "no such pool"),
        ({"pid": 0}, BadMessage, "no such pool"),
    ],
)
def test_what_is_not_the_pool_meant_is_refused(ends, gpu, changes, error, why):
    source_end, target_end, _, _ = ends
    with pytest.raises(error, match=why):
        target_end.connect("source", changed(source_end, **changes))
    assert gpu.opened == []


def test_a_peer_that_has_ended_is_lost_before_its_memory_is_read(ends):
    source_end, target_end, _, target = ends
    with subprocess.Popen(["sleep", "600"]) as process:
        ticks = started_ticks(process.pid)
        metadata = changed(source_end, pid=process.pid, started_ticks=ticks)
        target_end.connect("source", metadata)
        process.kill()
        process.wait()
        with pytest.raises(PeerLost, match="has ended"):
            target_end.pull("source", COPIES).wait(WAIT_S)
    assert np.array_equal(target, pattern(NBYTES, 2))


def test_a_copy_that_the_device_refuses_fails_its_pull_alone(ends, gpu):
    source_end, target_end, source, target = ends
    target_end.connect("source", source_end.metadata("target"))
    gpu.fails = True
    with pytest.raises(TransportError, match="broken"):
        target_end.pull("source", COPIES).wait(WAIT_S)
    gpu.fails = False
    target_end.pull("source", pieces((0, 0, NBYTES))).wait(WAIT_S)
    assert np.array_equal(target, source)


def test_a_pool_that_cannot_be_exported_is_refused_when_it_is_opened(gpu, monkeypatch):
    def refuse(_address):
        raise TransportError("no handle for this memory")

    pool, _ = gpu.pool(1)
    monkeypatch.setattr(gpu, "export", refuse)
    with pytest.raises(TransportError, match="no handle"):
        CudaIpcTransport("me", pool, gpu=gpu)


def test_a_pool_on_a_cpu_is_unsupported():
    memory = pattern(64, 1)
    with pytest.raises(Unsupported, match="needs a pool on a GPU"):
        CudaIpcTransport("me", Pool.of_array(memory))
    with pytest.raises(Unsupported, match="needs a pool on a GPU"):
        open_transports("me", Pool.of_array(memory), TransportLimits(), ("cuda_ipc",))
