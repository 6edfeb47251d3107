"""NCCL between GPUs: a communicator for each pair and direction, owned by one thread.

Nothing is one-sided here, so the source serves what the target pulls, in the same order.
A dead peer, a late one or a cancelled pull ends its own communicator only; the pair exchanges
metadata again to go on. An aborted communicator writes nothing more, so an abort is a fence.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import PeerLost, TransportError, Unsupported
from kvtransfer.copier import Copier
from kvtransfer.transport import (
    TransportLimits,
    check_bounds,
    check_source_bounds,
    decode_metadata,
    encode_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.copier import SlicedPull
    from kvtransfer.plan import Copies
    from kvtransfer.transport import Pool, Pull

LOOK_S = 200e-6
"""Between looks at a slice under way and at the communicator's health."""
SOURCE_RANK, TARGET_RANK = 0, 1
UNIQUE_ID_BYTES = 128
UniqueId = tuple[int, ...]


class Communicator(Protocol):
    """Two ranks' communicator; used by one thread at a time."""

    def start(self, pieces: list[tuple[int, int]], *, sending: bool) -> Callable[[], bool]:
        """Moves (address, bytes) pieces as one group; the result tells when that is done."""
        ...

    def failure(self) -> str | None:
        """What went wrong behind our back."""
        ...

    def abort(self) -> None: ...


class NcclLibrary(Protocol):
    def unique_id(self) -> UniqueId: ...

    def join(self, unique_id: UniqueId, rank: int, device: str) -> Communicator:
        """Blocks until the other rank has joined."""
        ...


@dataclass(frozen=True, slots=True)
class NcclMetadata:
    nbytes: int
    slice_bytes: int
    """Both sides must cut alike, or their sends and receives do not match."""
    unique_id: UniqueId
    """Of the communicator in which the peer reads this rank."""


class _Lane:
    """One direction between two ranks: its communicator and the thread that owns it."""

    def __init__(
        self,
        name: str,
        join: Callable[[], Communicator],
        pool: Pool,
        limits: TransportLimits,
        *,
        sending: bool,
    ) -> None:
        self._name, self._join, self._sending = name, join, sending
        self._pool = pool
        self._limits = limits
        self._broken = threading.Event()
        self._communicator: Communicator | None = None
        self._copier = Copier(name, self._copy_slice, limits)

    def submit(self, copies: Copies) -> NcclPull:
        return NcclPull(self._copier.submit(copies), self._broken)

    def stop(self) -> None:
        self._broken.set()
        self._copier.stop()
        if self._communicator is not None:
            self._communicator.abort()

    def _copy_slice(self, part: Copies, pull: SlicedPull) -> None:  # noqa: ARG002  all alike
        if self._broken.is_set():
            raise self._broken_off()
        if self._communicator is None:
            self._communicator = self._meet()
        offsets = part.source_offsets if self._sending else part.target_offsets
        addresses = (offsets + self._pool.address).tolist()
        pieces = list(zip(addresses, part.nbytes.tolist(), strict=True))
        try:
            self._wait(self._communicator, self._start(self._communicator, pieces))
        except PeerLost:
            self._communicator.abort()
            raise

    def _meet(self) -> Communicator:
        """Joins, which blocks for as long as the peer does not, in a thread of its own. One that
        is not waited for any more has been asked for nothing and is aborted when it has joined."""
        joining: Future[Communicator] = Future()
        name = f"join {self._name}"
        threading.Thread(target=_fulfil, args=(joining, self._join), name=name, daemon=True).start()
        try:
            self._await_joined(joining)
        except PeerLost:
            joining.add_done_callback(_abort)
            raise
        return joining.result()

    def _await_joined(self, joining: Future[Communicator]) -> None:
        deadline = time.monotonic() + self._limits.join_timeout_s
        while not joining.done():
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"{self._name}: has not joined within {self._limits.join_timeout_s:g} s"
                )
            self._broken.wait(LOOK_S)
            if self._broken.is_set():
                break
        if self._broken.is_set():
            raise self._broken_off()

    def _start(
        self, communicator: Communicator, pieces: list[tuple[int, int]]
    ) -> Callable[[], bool]:
        """The first group connects to the peer and may block on it: a watchdog aborts it then."""
        watchdog = threading.Timer(self._limits.slice_timeout_s, communicator.abort)
        watchdog.start()
        try:
            return communicator.start(pieces, sending=self._sending)
        finally:
            watchdog.cancel()

    def _wait(self, communicator: Communicator, finished: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._limits.slice_timeout_s
        while not finished():
            failure = communicator.failure()
            if failure is not None:
                raise PeerLost(f"{self._name}: {failure}")
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"{self._name}: a slice took longer than {self._limits.slice_timeout_s:g} s"
                )
            if self._broken.wait(LOOK_S):
                raise self._broken_off()

    def _broken_off(self) -> PeerLost:
        return PeerLost(f"{self._name}: broken off; connect again")


def _fulfil(joining: Future[Communicator], join: Callable[[], Communicator]) -> None:
    try:
        joining.set_result(join())
    except PeerLost as lost:
        joining.set_exception(lost)


def _abort(joining: Future[Communicator]) -> None:
    if joining.exception() is None:
        joining.result().abort()


class NcclPull:
    """A pull or its serving half. What one side skips the other would wait for, so a cancel
    that comes before the end breaks the whole lane off."""

    def __init__(self, pull: SlicedPull, broken: threading.Event) -> None:
        self._pull, self._broken = pull, broken
        self.done, self.wait = pull.done, pull.wait
        self.add_done_callback = pull.add_done_callback

    def cancel(self, timeout_s: float | None = None) -> None:
        if not self._pull.fenced:
            self._broken.set()
        self._pull.cancel(timeout_s)


@dataclass(frozen=True, slots=True)
class _Source:
    """A peer that is read."""

    nbytes: int
    lane: _Lane


class NcclTransport:
    """Each direction is a lane of its own: `metadata` opens the one in which the peer reads this
    rank, `connect` the one in which this rank reads the peer. Either replaces its lane only."""

    name = "nccl"

    def __init__(
        self, me: str, pool: Pool, library: NcclLibrary, limits: TransportLimits | None = None
    ) -> None:
        if pool.device == "cpu":
            raise Unsupported(f"{me}: NCCL moves between GPUs, and this pool lies on the CPU")
        self._pool = pool
        self._library = library
        self._limits = limits or TransportLimits()
        self._sources: dict[str, _Source] = {}
        self._readers: dict[str, _Lane] = {}

    def metadata(self, peer: str) -> bytes:
        """Good for one connection."""
        unique_id = self._library.unique_id()
        self._drop_reader(peer)
        self._readers[peer] = self._lane(peer, unique_id, SOURCE_RANK)
        mine = NcclMetadata(self._pool.nbytes, self._limits.slice_bytes, unique_id)
        return encode_metadata(self.name, mine)

    def connect(self, peer: str, metadata: bytes) -> None:
        found = decode_metadata(self.name, NcclMetadata, metadata)
        if found.slice_bytes != self._limits.slice_bytes:
            raise TransportError(
                f"slice_bytes: {peer} has {found.slice_bytes}, this rank {self._limits.slice_bytes}"
            )
        self._drop_source(peer)
        lane = self._lane(peer, found.unique_id, TARGET_RANK)
        self._sources[peer] = _Source(found.nbytes, lane)

    def _lane(self, peer: str, unique_id: UniqueId, rank: int) -> _Lane:
        def join() -> Communicator:
            return self._library.join(unique_id, rank, self._pool.device)

        return _Lane(peer, join, self._pool, self._limits, sending=rank == SOURCE_RANK)

    def pull(self, peer: str, copies: Copies) -> Pull:
        if peer not in self._sources:
            raise TransportError(f"not connected to {peer!r}")
        source = self._sources[peer]
        check_bounds(copies, source.nbytes, self._pool.nbytes)
        return source.lane.submit(copies)

    def two_sided(self, peer: str) -> bool:  # noqa: ARG002  with any of them
        return True

    def serve(self, peer: str, copies: Copies) -> Pull:
        if peer not in self._readers:
            raise TransportError(f"{peer!r} has not been given this rank's metadata")
        check_source_bounds(copies, self._pool.nbytes)
        return self._readers[peer].submit(copies)

    def disconnect(self, peer: str) -> None:
        self._drop_source(peer)
        self._drop_reader(peer)

    def _drop_source(self, peer: str) -> None:
        if peer in self._sources:
            self._sources[peer].lane.stop()
            del self._sources[peer]

    def _drop_reader(self, peer: str) -> None:
        if peer in self._readers:
            self._readers[peer].stop()
            del self._readers[peer]

    def close(self) -> None:
        for peer in sorted({*self._sources, *self._readers}):
            self.disconnect(peer)


def cuda_library() -> CudaLibrary:
    """NCCL through CuPy; Unsupported where either is missing."""
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        raise Unsupported(f"nccl: {error}; install the `gpu` extra") from error
    if not getattr(nccl, "available", False):
        raise Unsupported("nccl: CuPy finds no NCCL library; install the `gpu` extra")
    return CudaLibrary(cupy, nccl)


class CudaLibrary:
    def __init__(self, cupy: Any, nccl: Any) -> None:
        self._cupy, self._nccl = cupy, nccl

    def unique_id(self) -> UniqueId:
        return tuple(int(byte) for byte in self._nccl.get_unique_id())

    def join(self, unique_id: UniqueId, rank: int, device: str) -> Communicator:
        if len(unique_id) != UNIQUE_ID_BYTES or not all(-128 <= byte < 128 for byte in unique_id):
            raise PeerLost(f"joining: not an NCCL id: {len(unique_id)} numbers")
        own = self._cupy.cuda.Device(int(device.partition(":")[2] or 0))
        own.use()
        try:
            joined = self._nccl.NcclCommunicator(2, unique_id, rank)
        except self._nccl.NcclError as error:
            raise PeerLost(f"joining: {error}") from error
        return CudaCommunicator(self._cupy, self._nccl, joined, device=own, peer=1 - rank)


class CudaCommunicator:
    def __init__(self, cupy: Any, nccl: Any, joined: Any, *, device: Any, peer: int) -> None:
        self._cupy, self._nccl, self._device = cupy, nccl, device
        self._joined: Any | None = joined
        self._peer = peer
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def start(self, pieces: list[tuple[int, int]], *, sending: bool) -> Callable[[], bool]:
        if self._joined is None:
            raise PeerLost("the communicator was aborted")
        self._device.use()  # it was joined in another thread
        move = self._joined.send if sending else self._joined.recv
        try:
            self._nccl.groupStart()
            for address, nbytes in pieces:
                move(address, nbytes, self._nccl.NCCL_UINT8, self._peer, self._stream.ptr)
            self._nccl.groupEnd()
        except self._nccl.NcclError as error:
            raise PeerLost(str(error)) from error
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return lambda: bool(event.done)

    def failure(self) -> str | None:
        if self._joined is None:
            return "the communicator was aborted"
        try:
            self._joined.check_async_error()
        except self._nccl.NcclError as error:
            return str(error)
        return None

    def abort(self) -> None:
        if self._joined is not None:
            self._joined.abort()
            self._joined = None
