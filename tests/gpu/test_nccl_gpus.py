"""NCCL between two processes with a GPU each."""

from __future__ import annotations

import multiprocessing

import pytest

from engine.errors import PeerLost, Unsupported
from kvtransfer.nccl import NcclTransport, cuda_library
from kvtransfer.transport import Pool, TransportLimits
from tests.kvtransfer.peers import pattern, pieces

NBYTES = 8 << 20
LIMITS = TransportLimits(slice_bytes=1 << 20, slice_timeout_s=20)
WAIT_S = 60
COPIES = pieces((0, 4096, 1 << 20), (3 << 20, 2 << 20, 5 << 20))


def gpus():
    try:
        cuda_library()
    except Unsupported as why:
        return 0, str(why)
    import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount(), "fewer than two GPUs"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return 0, str(error)


COUNT, WHY_NOT = gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(COUNT < 2, reason=f"NCCL: {WHY_NOT}")]


def open_rank(name, device, content):
    import cupy

    cupy.cuda.Device(device).use()
    memory = cupy.asarray(content)
    pool = Pool(memory.data.ptr, NBYTES, memory, f"cuda:{device}")
    return NcclTransport(name, pool, cuda_library(), LIMITS), memory


def serve(pipe, times):
    source, memory = open_rank("source", 0, pattern(NBYTES, 1))
    pipe.send(source.metadata("target"))
    source.connect("target", pipe.recv())
    for _ in range(times):
        source.serve("target", COPIES).wait(WAIT_S)
    pipe.recv()
    source.close()
    assert memory.nbytes == NBYTES


@pytest.fixture
def target():
    made, memory = open_rank("target", 1, pattern(NBYTES, 2))
    yield made, memory
    made.close()


def source_process(target, times):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, times), daemon=True)
    process.start()
    assert pipe.poll(WAIT_S)
    mine = target.metadata("source")
    target.connect("source", pipe.recv())
    pipe.send(mine)
    return process, pipe


def test_pieces_of_one_gpu_arrive_on_another(target):
    transport, memory = target
    process, pipe = source_process(transport, times=2)
    for _ in range(2):
        transport.pull("source", COPIES).wait(WAIT_S)
    source, result = pattern(NBYTES, 1), memory.get()
    assert (result[4096 : 4096 + (1 << 20)] == source[: 1 << 20]).all()
    assert (result[2 << 20 : 7 << 20] == source[3 << 20 :]).all()
    pipe.send("done")
    process.join(WAIT_S)
    assert process.exitcode == 0


def test_a_killed_source_is_lost_in_bounded_time(target):
    transport, _ = target
    process, _ = source_process(transport, times=1)
    transport.pull("source", COPIES).wait(WAIT_S)
    process.kill()
    process.join(WAIT_S)
    with pytest.raises(PeerLost):
        transport.pull("source", COPIES).wait(WAIT_S)
