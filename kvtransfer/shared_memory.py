"""Between CPU workers of one host: map the peer's pool and copy from it.

A pool is an anonymous memfd, reached through the peer's /proc entry. The peer is known by its
pid and start time and the pool by its device and inode, so neither a reused pid nor another
file under the same number is mistaken for it. The mapping outlives a dead peer, so reading is
always safe; a pidfd tells that the peer has died.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import BadMessage, PeerLost, TransportError, Unsupported
from engine.shared_file import shared_file
from kvtransfer.copier import Copier
from kvtransfer.copying import copy_routine
from kvtransfer.one_sided import OneSided
from kvtransfer.process_watch import ProcessWatch, host_identity, started_ticks
from kvtransfer.transport import (
    Pool,
    TransportLimits,
    decode_metadata,
    encode_metadata,
)

if TYPE_CHECKING:
    from kvtransfer.copier import SlicedPull
    from kvtransfer.plan import Copies


@dataclass(frozen=True, slots=True)
class SharedPool:
    """Where a pool is to be found on its host, and how to be sure that it is the one meant."""

    host: str
    pid: int
    started_ticks: int
    fd: int
    device: int
    inode: int
    nbytes: int


def shared_pool(nbytes: int) -> Pool:
    """Fresh zeroed memory that other processes of the host can map."""
    fd, memory = shared_file(nbytes)
    return Pool.of_array(np.frombuffer(memory, np.uint8), fd)


class PeerPool:
    """A peer's pool, mapped read-only, and a watch on the peer's life."""

    def __init__(self, found: SharedPool) -> None:
        if not (0 < found.pid < 1 << 31 and 0 <= found.fd < 1 << 31 and found.nbytes > 0):
            raise BadMessage(f"no such pool: {found}")
        self.nbytes = found.nbytes
        self.watch = ProcessWatch(found.pid, found.started_ticks)
        try:
            self._memory = _map(found)
        except BaseException:
            self.watch.close()
            raise
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self.address = self._bytes.ctypes.data

    def close(self) -> None:
        self.watch.close()
        del self._bytes
        self._memory.close()


def _map(found: SharedPool) -> mmap.mmap:
    try:
        fd = os.open(f"/proc/{found.pid}/fd/{found.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise PeerLost(f"process {found.pid} no longer holds its pool") from error
    except PermissionError as error:
        raise TransportError(f"process {found.pid} belongs to another user") from error
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino, status.st_size) != (
            found.device,
            found.inode,
            found.nbytes,
        ):
            raise PeerLost(f"descriptor {found.fd} of process {found.pid} is not the pool meant")
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return mmap.mmap(fd, found.nbytes, flags=flags, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


class _Peer:
    def __init__(self, name: str, found: SharedPool, pool: Pool, limits: TransportLimits) -> None:
        self._source = PeerPool(found)
        self.nbytes = self._source.nbytes
        self._pool = pool
        self._copy = copy_routine()
        self.copier = Copier(name, self._copy_slice, limits)

    def _copy_slice(self, part: Copies, pull: SlicedPull) -> None:  # noqa: ARG002  short anyway
        self._source.watch.check_alive()
        self._copy(self._pool.address, self._source.address, part)

    def disconnect(self) -> None:
        self.copier.stop()
        self._source.close()


class SharedMemoryTransport(OneSided[_Peer]):
    name = "shared_memory"

    def __init__(self, me: str, pool: Pool, limits: TransportLimits | None = None) -> None:
        if pool.fd is None:
            raise Unsupported(f"{me}: shared memory needs a pool on a memfd, not on {pool.device}")
        super().__init__(pool)
        self._fd = pool.fd
        self._limits = limits or TransportLimits()

    def metadata(self, peer: str) -> bytes:  # noqa: ARG002  the same for everyone
        status = os.fstat(self._fd)
        mine = SharedPool(
            host_identity(),
            os.getpid(),
            started_ticks(os.getpid()),
            self._fd,
            status.st_dev,
            status.st_ino,
            self._pool.nbytes,
        )
        return encode_metadata(self.name, mine)

    def connect(self, peer: str, metadata: bytes) -> None:
        found = decode_metadata(self.name, SharedPool, metadata)
        if found.host != host_identity():
            raise TransportError(f"{peer} runs on another host: {found.host}")
        self.disconnect(peer)
        self._peers[peer] = _Peer(peer, found, self._pool, self._limits)

    def close(self) -> None:
        for peer in sorted(self._peers):
            self.disconnect(peer)
