"""CUDA IPC between two processes that share a GPU."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from engine.errors import PeerLost
from kvtransfer.auto import AutoTransport
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.transport import Pool
from tests.kvtransfer.peers import pattern, pieces

NBYTES, BEFORE = 64 << 20, 3 << 20
WAIT_S = 60
COPIES = pieces((0, 4096, 1 << 20), (3 << 20, 2 << 20, 5 << 20), (11, 60 << 20, 7))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def pool_of(seed):
    """Not at the start of what the driver has given out."""
    memory = torch.zeros(BEFORE + NBYTES, dtype=torch.uint8, device="cuda:0")[BEFORE:]
    memory.copy_(torch.from_numpy(pattern(NBYTES, seed)))
    torch.cuda.synchronize()
    return Pool.of_tensor(memory)


def serve(pipe, kind):
    source = kind("source", pool_of(1))
    pipe.send(source.metadata("target"))
    pipe.recv()
    source.close()


@pytest.fixture(params=[CudaIpcTransport, AutoTransport], ids=["asked for", "auto"])
def joined(request):
    """The target's end, its pool, and the source's process and pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, request.param), daemon=True)
    process.start()
    pool = pool_of(2)
    target = request.param("target", pool)
    assert pipe.poll(WAIT_S)
    target.connect("source", pipe.recv())
    yield target, pool, process, pipe
    target.close()
    process.kill()
    process.join(WAIT_S)


def test_pieces_of_one_process_arrive_in_the_other(joined):
    target, pool, process, pipe = joined
    target.pull("source", COPIES).wait(WAIT_S)
    source, expected = pattern(NBYTES, 1), pattern(NBYTES, 2)
    rows = zip(COPIES.source_offsets, COPIES.target_offsets, COPIES.nbytes, strict=True)
    for start, to, count in rows:
        expected[to : to + count] = source[start : start + count]
    assert np.array_equal(pool.fetch(0, NBYTES), expected)
    if isinstance(target, AutoTransport):
        assert target.uses("source") == "cuda_ipc"
    target.disconnect("source")
    pipe.send("done")
    process.join(WAIT_S)
    assert process.exitcode == 0


def test_a_killed_source_is_lost(joined):
    target, _, process, _ = joined
    target.pull("source", COPIES).wait(WAIT_S)
    process.kill()
    process.join(WAIT_S)
    with pytest.raises(PeerLost):
        target.pull("source", COPIES).wait(WAIT_S)
