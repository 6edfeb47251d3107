"""Source workers in processes of their own, to be read from, stopped and killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import contextmanager

import numpy as np

from engine.errors import Unsupported
from kvtransfer.nixl import NixlTransport, bindings
from kvtransfer.plan import Copies
from kvtransfer.shared_memory import SharedMemoryTransport, shared_pool

TRANSPORTS = {"shared_memory": SharedMemoryTransport, "nixl": NixlTransport}
ANSWER_S = 30

try:
    bindings()
except Unsupported:
    del TRANSPORTS["nixl"]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def pattern(nbytes, seed):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def pieces(*rows):
    """Copies from (source offset, target offset, bytes) rows."""
    table = np.array(rows, np.int64).reshape(-1, 3)
    return Copies(*(np.ascontiguousarray(column) for column in table.T))


def _serve(pipe, kind, name, nbytes, seed):
    pool = shared_pool(nbytes)
    pool.bytes()[:] = pattern(nbytes, seed)
    transport = TRANSPORTS[kind](name, pool)
    pipe.send(transport.metadata("target"))
    while pipe.poll(None):
        try:
            pipe.recv()
        except EOFError:
            break
    transport.close()


class Peer:
    """A source worker in another process."""

    def __init__(self, kind, *, name="source", nbytes=1 << 20, seed=1):
        self.content = pattern(nbytes, seed)
        self._pipe, theirs = _processes.Pipe()
        self._process = _processes.Process(
            target=_serve, args=(theirs, kind, name, nbytes, seed), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self):
        return self._process.pid

    def metadata(self):
        assert self._pipe.poll(ANSWER_S), "the peer did not start"
        return self._pipe.recv()

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self._process.join(ANSWER_S)

    def close(self):
        self._pipe.close()
        if self._process.is_alive():
            self.resume()
            self._process.join(ANSWER_S)
        assert not self._process.is_alive()


@contextmanager
def peer(kind, **options):
    made = Peer(kind, **options)
    try:
        yield made
    finally:
        made.close()
