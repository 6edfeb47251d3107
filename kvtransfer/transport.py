"""One protocol for every way of moving KV bytes between two ranks.

The target pulls: `Transport.pull` reads pieces of a peer's pool into one's own. Where nothing
is one-sided the source posts the same copies with `serve`; elsewhere `serve` has nothing to do.
A pull that has been cancelled is fenced: no byte is written once `cancel` has returned.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from engine.errors import (
    BadMessage,
    ChecksumMismatch,
    DeadlineExceeded,
    TransferError,
    TransportError,
)
from engine.wire import decode_record, encode_record

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from kvtransfer.plan import Copies, Offsets

METADATA_VERSION = 1
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """What bounds every wait and every queue of a transport."""

    slice_bytes: int = 16 << 20
    """A pull can be fenced between two slices."""
    slice_timeout_s: float = 5.0
    """A peer that takes longer over one slice is lost."""
    join_timeout_s: float = 30.0
    """Where both sides must join first: one that comes later is lost."""
    fence_timeout_s: float = 2.0
    """How long `cancel` waits for the slice under way."""
    queued_pulls: int = 1024
    """Of one peer."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A rank's KV memory as transports see it."""

    address: int
    nbytes: int
    owner: object
    """Keeps the memory alive."""
    device: str = "cpu"
    fd: int | None = None
    """The memfd behind it, if other processes may map it."""

    @classmethod
    def of_tensor(cls, memory: torch.Tensor, fd: int | None = None) -> Pool:
        assert memory.is_contiguous()
        nbytes = memory.numel() * memory.element_size()
        return cls(memory.data_ptr(), nbytes, memory, str(memory.device), fd)

    @classmethod
    def of_array(cls, memory: NDArray[np.uint8], fd: int | None = None) -> Pool:
        assert memory.flags.c_contiguous
        return cls(memory.ctypes.data, memory.nbytes, memory, "cpu", fd)

    def bytes(self) -> NDArray[np.uint8]:
        assert self.device == "cpu", f"the host cannot address {self.device}"
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        return np.ctypeslib.as_array(memory)

    def fetch(self, start: int, count: int) -> NDArray[np.uint8]:
        """Some of its bytes where the host can read them: in place, or a copy from a GPU."""
        if self.device == "cpu":
            return self.bytes()[start : start + count]
        memory: torch.Tensor = self.owner  # type: ignore[assignment]
        found: NDArray[np.uint8] = memory[start : start + count].cpu().numpy()
        return found


class Pull(Protocol):
    """Copies under way."""

    def done(self) -> bool:
        """Whether all bytes have arrived; raises what ended the pull otherwise.

        A pull whose peer is lost fails at once, yet may still be written to if the peer only
        stalled: its blocks are free once it has ended, see `add_done_callback`.
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Returns once done; DeadlineExceeded leaves the pull running."""
        ...

    def cancel(self, timeout_s: float | None = None) -> None:
        """A fence: after it, nothing is written. TransportError if that cannot be promised yet:
        the blocks stay in quarantine and one asks again, until the peer goes on or dies."""
        ...

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Called once, from any thread, when nothing is written any more, whatever the outcome.

        It must be short and leave the transport alone.
        """
        ...


class Transport(Protocol):
    """One rank's way to the pools of its peers."""

    @property
    def name(self) -> str: ...

    def metadata(self, peer: str) -> bytes:
        """What `peer` needs to reach this rank's pool."""
        ...

    def connect(self, peer: str, metadata: bytes) -> None:
        """Replaces what was known of a peer of this name, which may have been restarted."""
        ...

    def pull(self, peer: str, copies: Copies) -> Pull: ...

    def two_sided(self, peer: str) -> bool:
        """Whether this peer must `serve` what is pulled from it."""
        ...

    def serve(self, peer: str, copies: Copies) -> Pull:
        """The source's half of `pull`, in the same order as the peer's pulls."""
        ...

    def disconnect(self, peer: str) -> None:
        """Fences and forgets; an unknown peer is forgotten already."""
        ...

    def close(self) -> None:
        """Ends everything, at the price of every connection where nothing less is a fence."""
        ...


class Ending(Enum):
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PullState:
    """How a pull ends: an outcome, once, and then the fence. Transports share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._fenced = threading.Event()
        self._ending: Ending | None = None
        self._error: TransferError | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def fenced(self) -> bool:
        return self._fenced.is_set()

    def done(self) -> bool:
        if not self._settled.is_set():
            return False
        if self._ending is Ending.CANCELLED:
            raise TransportError("the pull was cancelled")
        if self._error is not None:
            raise self._error
        return True

    def wait(self, timeout_s: float) -> None:
        if not self._settled.wait(timeout_s):
            raise DeadlineExceeded(f"the pull has not ended after {timeout_s:g} s")
        self.done()

    def wait_fenced(self, timeout_s: float) -> bool:
        return self._fenced.wait(timeout_s)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._fenced.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def settle(self, ending: Ending, error: TransferError | None = None) -> None:
        """Fixes the outcome, unless it is fixed already."""
        with self._lock:
            if self._ending is None:
                self._ending, self._error = ending, error
        self._settled.set()

    def end(self, ending: Ending, error: TransferError | None = None) -> None:
        """Settles, and promises that nothing is written any more."""
        self.settle(ending, error)
        with self._lock:
            self._fenced.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Served(PullState):
    """What `serve` gives where the peer reads without help: done from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.end(Ending.DONE)

    def cancel(self, timeout_s: float | None = None) -> None:
        """Nothing of ours is under way."""


@dataclass(frozen=True, slots=True)
class _Envelope:
    transport: str
    version: int
    record: bytes


def encode_metadata(transport: str, record: object) -> bytes:
    return encode_record(_Envelope(transport, METADATA_VERSION, encode_record(record)))


def decode_metadata(transport: str, kind: type[Record], metadata: bytes) -> Record:
    envelope = decode_record(_Envelope, metadata)
    if envelope.transport != transport:
        raise BadMessage(f"metadata of transport {envelope.transport!r}, not {transport!r}")
    if envelope.version != METADATA_VERSION:
        raise BadMessage(f"metadata version {envelope.version}, not {METADATA_VERSION}")
    return decode_record(kind, envelope.record)


def check_bounds(copies: Copies, source_bytes: int, target_bytes: int) -> None:
    """A copy that leaves either pool is refused before anything moves."""
    check_source_bounds(copies, source_bytes)
    _check_side("target", copies.target_offsets, copies.nbytes, target_bytes)


def check_source_bounds(copies: Copies, source_bytes: int) -> None:
    """What a source can check of the copies that it serves."""
    _check_side("source", copies.source_offsets, copies.nbytes, source_bytes)


def _check_side(side: str, offsets: Offsets, nbytes: Offsets, limit: int) -> None:
    outside = (offsets < 0) | (nbytes < 0) | (offsets + nbytes > limit)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise TransportError(
            f"copy of {nbytes[at]} bytes at offset {offsets[at]} "
            f"lies outside the {side}'s pool of {limit} bytes"
        )


def checksum(pool: Pool, offsets: Offsets, nbytes: Offsets) -> int:
    """CRC-32 over pieces of a pool, in order: equal on both sides of a faithful pull."""
    crc = 0
    for start, count in zip(offsets.tolist(), nbytes.tolist(), strict=True):
        crc = zlib.crc32(pool.fetch(start, count).data, crc)
    return crc


def compare_checksums(what: str, source: int, target: int) -> None:
    if source != target:
        raise ChecksumMismatch(f"{what}: source sent {source:#010x}, target holds {target:#010x}")
