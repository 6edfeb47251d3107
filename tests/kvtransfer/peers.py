"""Source workers in processes of their own, to be read from, stopped and killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from engine.errors import Unsupported
from kvtransfer.nixl import NixlTransport, bindings
from kvtransfer.plan import Copies
from kvtransfer.shared_memory import SharedMemoryTransport, shared_pool

TRANSPORTS = {"shared_memory": SharedMemoryTransport, "nixl": NixlTransport}
ANSWER_S = 600

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


def _read(pipe, metadata, nbytes):
    pool = shared_pool(nbytes)
    transport = TRANSPORTS["nixl"]("reader", pool)
    transport.connect("source", metadata)
    whole = pieces((0, 0, nbytes))
    while True:
        transport.pull("source", whole).wait(ANSWER_S)
        pipe.send(int(pool.bytes().max()))


def is_stopped(thread):
    return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"


class Process:
    """A worker in another process and the pipe to it."""

    def __init__(self, work, *args):
        self.pipe, theirs = _processes.Pipe()
        self._process = _processes.Process(target=work, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self):
        return self._process.pid

    def receive(self):
        assert self.pipe.poll(ANSWER_S), "the process does not answer"
        return self.pipe.recv()

    def stop(self):
        """Returns once none of its threads runs: each may do so for a while after the signal."""
        os.kill(self.pid, signal.SIGSTOP)
        while not all(is_stopped(path) for path in Path(f"/proc/{self.pid}/task").iterdir()):
            os.sched_yield()

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def kill(self):
        self._process.kill()
        self._process.join(ANSWER_S)

    def close(self):
        self.pipe.close()
        with suppress(ProcessLookupError):  # it may end by itself, now that the pipe is closed
            self.resume()
        self._process.join(ANSWER_S)
        assert not self._process.is_alive()


class Peer(Process):
    """A source worker that stands by to be read."""

    def __init__(self, kind, *, name="source", nbytes=1 << 20, seed=1):
        self.content = pattern(nbytes, seed)
        super().__init__(_serve, kind, name, nbytes, seed)

    def metadata(self):
        return self.receive()


class Reader(Process):
    """A target worker that reads a NIXL source over and over, until it is killed."""

    def __init__(self, metadata, nbytes):
        super().__init__(_read, metadata, nbytes)
        self.receive()

    def reads(self):
        """The largest byte of one whole read."""
        return self.receive()


@contextmanager
def reader(metadata, nbytes):
    made = Reader(metadata, nbytes)
    try:
        yield made
    finally:
        made.kill()


@contextmanager
def peer(kind, **options):
    made = Peer(kind, **options)
    try:
        yield made
    finally:
        made.close()
