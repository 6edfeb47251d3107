"""NCCL in one process: what a transport that needs both sides is tested over."""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
from contextlib import suppress

from engine.errors import TransportError


class FakeNccl:
    """Two-rank communicators within one process: a queue of groups for each."""

    def __init__(self):
        self._numbers = itertools.count()
        self._queues = {}
        self._lock = threading.Lock()
        self.aborted, self.started = [], 0
        self.joined = threading.Semaphore(0)
        """Released by every rank that joins: from then on it can tell the other of its end."""
        self.joining = threading.Semaphore(0)
        """Released by every rank that begins to."""
        self.may_join = threading.Event()
        """Cleared, ranks are kept joining."""
        self.may_join.set()

    def unique_id(self):
        return (next(self._numbers),)

    def join(self, unique_id, rank, device):
        with self._lock:
            groups = self._queues.setdefault(unique_id, queue.SimpleQueue())
        self.joining.release()
        assert self.may_join.wait(600)
        self.joined.release()
        return FakeCommunicator(self, unique_id, groups)


class FakeCommunicator:
    def __init__(self, library, unique_id, groups):
        self._library, self._id, self._groups = library, unique_id, groups
        self._sent = None

    def start(self, pieces, *, sending):
        self._library.started += 1
        if sending:
            taken = threading.Event()
            self._groups.put(
                ([ctypes.string_at(address, nbytes) for address, nbytes in pieces], taken)
            )
            return taken.is_set
        return lambda: self._receive(pieces)

    def _receive(self, pieces):
        try:
            sent, taken = self._groups.get_nowait()
        except queue.Empty:
            return False
        assert [len(piece) for piece in sent] == [nbytes for _, nbytes in pieces]
        for (address, nbytes), piece in zip(pieces, sent, strict=True):
            ctypes.memmove(address, piece, nbytes)
        taken.set()
        return True

    def failure(self):
        return "the other rank aborted" if self._id in self._library.aborted else None

    def abort(self):
        self._library.aborted.append(self._id)


class ServedTarget:
    """A target whose sources serve what it pulls, as long as they live."""

    def __init__(self, target):
        self._target = target
        self.sources = {}

    def pull(self, peer, copies):
        pull = self._target.pull(peer, copies)
        with suppress(TransportError):
            self.sources[peer].serve("target", copies)
        return pull

    def __getattr__(self, name):
        return getattr(self._target, name)
