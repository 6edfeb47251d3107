"""Between workers that share a GPU: map the peer's pool and copy from it with one kernel.

The driver hands out a handle of the memory that a pool lies in, which another process maps. A
peer is known by its pid and start time, and looked for before each slice: what it mapped is gone
once it has ended.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from engine.errors import BadMessage, TransportError, Unsupported
from kvtransfer.copier import Copier
from kvtransfer.cuda_memory import HANDLE_BYTES, CudaMemory
from kvtransfer.one_sided import OneSided
from kvtransfer.process_watch import ProcessWatch, host_identity, started_ticks
from kvtransfer.transport import TransportLimits, decode_metadata, encode_metadata

if TYPE_CHECKING:
    from kvtransfer.copier import SlicedPull
    from kvtransfer.plan import Copies
    from kvtransfer.transport import Pool

SLICE_BYTES = 1 << 30
"""Copied within a millisecond, which is soon enough for a fence; smaller ones pay for launches."""


@dataclass(frozen=True, slots=True)
class IpcPool:
    """Where a pool is to be found on its host and GPU."""

    host: str
    pid: int
    started_ticks: int
    gpu: str
    handle: bytes
    offset: int
    """Of the pool in the memory that the handle stands for."""
    nbytes: int


class Gpu(Protocol):
    """The device that a pool lies on."""

    @property
    def identity(self) -> str:
        """The same in every process that sees this GPU, whatever number it has there."""
        ...

    def export(self, address: int) -> tuple[bytes, int]:
        """A handle of the memory that holds an address, and the address's place in it."""
        ...

    def open(self, handle: bytes) -> int:
        """Maps another process's memory; where it begins here."""
        ...

    def close(self, start: int) -> None: ...

    def copy(self, target_address: int, source_address: int, copies: Copies) -> None:
        """Returns when all is copied."""
        ...


class CudaGpu(CudaMemory):
    """A real one."""

    def __init__(self, device: str) -> None:
        import torch

        if find_spec("triton") is None:
            raise Unsupported("cuda_ipc: Triton is not installed")
        super().__init__(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def copy(self, target_address: int, source_address: int, copies: Copies) -> None:
        import torch

        from kvtransfer.triton_copy import copy_pieces

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            copy_pieces(target_address, source_address, copies, self._device)
            self._stream.synchronize()


class _Peer:
    def __init__(
        self, name: str, found: IpcPool, pool: Pool, gpu: Gpu, limits: TransportLimits
    ) -> None:
        self.nbytes = found.nbytes
        self._pool, self._gpu = pool, gpu
        self._watch = ProcessWatch(found.pid, found.started_ticks)
        try:
            self._start = gpu.open(found.handle)
        except BaseException:
            self._watch.close()
            raise
        self._address = self._start + found.offset
        self.copier = Copier(name, self._copy_slice, limits)

    def _copy_slice(self, part: Copies, pull: SlicedPull) -> None:  # noqa: ARG002  short anyway
        self._watch.check_alive()
        self._gpu.copy(self._pool.address, self._address, part)
        self._watch.check_alive()

    def disconnect(self) -> None:
        self.copier.stop()
        self._gpu.close(self._start)
        self._watch.close()


class CudaIpcTransport(OneSided[_Peer]):
    name = "cuda_ipc"

    def __init__(
        self, me: str, pool: Pool, limits: TransportLimits | None = None, gpu: Gpu | None = None
    ) -> None:
        if pool.device == "cpu":
            raise Unsupported(f"{me}: CUDA IPC needs a pool on a GPU")
        super().__init__(pool)
        self._gpu = gpu or CudaGpu(pool.device)
        self._handle, self._offset = self._gpu.export(pool.address)
        limits = limits or TransportLimits()
        self._limits = replace(limits, slice_bytes=max(limits.slice_bytes, SLICE_BYTES))

    def metadata(self, peer: str) -> bytes:  # noqa: ARG002  the same for everyone
        pid = os.getpid()
        mine = IpcPool(
            host_identity(),
            pid,
            started_ticks(pid),
            self._gpu.identity,
            self._handle,
            self._offset,
            self._pool.nbytes,
        )
        return encode_metadata(self.name, mine)

    def connect(self, peer: str, metadata: bytes) -> None:
        found = decode_metadata(self.name, IpcPool, metadata)
        if not (len(found.handle) == HANDLE_BYTES and found.pid > 0 <= found.offset):
            raise BadMessage(f"no such pool: {found}")
        if (found.host, found.gpu) != (host_identity(), self._gpu.identity):
            raise TransportError(f"{peer} runs on another GPU: {found.gpu} of {found.host}")
        self.disconnect(peer)
        self._peers[peer] = _Peer(peer, found, self._pool, self._gpu, self._limits)

    def close(self) -> None:
        for peer in sorted(self._peers):
            self.disconnect(peer)
