"""NIXL over UCX: RDMA, CUDA IPC, shared memory or TCP, whatever joins the two pools.

UCX picks the lanes itself; `UCX_TLS` and `UCX_NET_DEVICES` narrow its choice, as anywhere.
The agent is made through NIXL's bindings because its Python wrapper lets the progress thread
spin on a core. Each agent has a name of its own, so a restarted peer is a new one.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import PeerLost, TransportError, Unsupported
from kvtransfer.copier import Copier
from kvtransfer.one_sided import OneSided
from kvtransfer.transport import (
    TransportLimits,
    decode_metadata,
    encode_metadata,
)

if TYPE_CHECKING:
    from kvtransfer.copier import SlicedPull
    from kvtransfer.plan import Copies, Offsets
    from kvtransfer.transport import Pool

PROGRESS_INTERVAL_US = 10_000
"""Between looks of the progress thread at idle: 0.5% of a core."""
FIRST_LOOK_S, LAST_LOOK_S = 50e-6, 1e-3
"""Between looks at a transfer under way, doubling."""


@dataclass(frozen=True, slots=True)
class NixlMetadata:
    address: int
    nbytes: int
    device: str
    agent: bytes
    """NIXL's own description of the agent and its registered memory."""


def bindings() -> Any:
    try:
        import nixl._bindings as found
    except ImportError as error:
        raise Unsupported(f"nixl: {error}") from error
    return found


class NixlAgent:
    """What is used of NIXL, in the errors and units of this package."""

    def __init__(self, me: str, pool: Pool) -> None:
        self._nixl = bindings()
        self.errors = tuple(
            getattr(self._nixl, name) for name in dir(self._nixl) if name.endswith("Error")
        )
        self.pool = pool
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_INTERVAL_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        name = f"{me}-{os.getpid()}-{secrets.token_hex(4)}"
        self._agent = self._nixl.nixlAgent(name, config)
        try:
            self._backend = self._agent.createBackend("UCX", {})
        except self.errors as error:
            raise TransportError(f"nixl finds no way through UCX: {error}") from error
        self._registered = self._nixl.nixlRegDList(
            self._segment(pool.device), [(pool.address, pool.nbytes, _ordinal(pool.device), "")]
        )
        try:
            self._agent.registerMem(self._registered, [self._backend])
        except self.errors as error:
            raise TransportError(f"nixl cannot register the pool: {error}") from error

    def metadata(self) -> bytes:
        local: bytes = self._agent.getLocalMD()
        return local

    def add(self, metadata: bytes) -> str:
        try:
            name: bytes = self._agent.loadRemoteMD(metadata)
        except self.errors as error:
            raise TransportError(f"nixl refuses the peer's metadata: {error}") from error
        return name.decode()

    def remove(self, agent: str) -> None:
        """Closes the connection, which also ends what was in flight on it."""
        try:
            self._agent.invalidateRemoteMD(agent)
        except self._nixl.nixlNotFoundError:
            return

    def post(self, agent: str, found: NixlMetadata, part: Copies) -> tuple[int, bool]:
        """Starts a read; its handle, and whether it is done already."""
        handle: int = self._agent.createXferReq(
            self._nixl.NIXL_READ,
            self._pieces(self.pool.device, self.pool.address, part.target_offsets, part.nbytes),
            self._pieces(found.device, found.address, part.source_offsets, part.nbytes),
            agent,
            "",
            [self._backend],
        )
        try:
            return handle, self._agent.postXferReq(handle, "") == self._nixl.NIXL_SUCCESS
        except self.errors:
            self.release(handle)
            raise

    def finished(self, handle: int) -> bool:
        return bool(self._agent.getXferStatus(handle) == self._nixl.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Also gives a read up that is under way."""
        self._agent.releaseXferReq(handle)

    def close(self) -> None:
        self._agent.deregisterMem(self._registered, [self._backend])
        del self._agent

    def _pieces(self, device: str, address: int, offsets: Offsets, nbytes: Offsets) -> Any:
        rows = np.empty((len(nbytes), 3), np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = offsets + address, nbytes, _ordinal(device)
        return self._nixl.nixlXferDList(self._segment(device), rows)

    def _segment(self, device: str) -> Any:
        return self._nixl.DRAM_SEG if device == "cpu" else self._nixl.VRAM_SEG


def _ordinal(device: str) -> int:
    return int(device.partition(":")[2] or 0)


class _Peer:
    def __init__(
        self, name: str, found: NixlMetadata, agent: NixlAgent, limits: TransportLimits
    ) -> None:
        self.nbytes = found.nbytes
        self._found = found
        self._name = name
        self._agent = agent
        self._remote = agent.add(found.agent)
        self._limits = limits
        self._abandoned = threading.Event()
        self.copier = Copier(name, self._copy_slice, limits)

    def _copy_slice(self, part: Copies, pull: SlicedPull) -> None:
        nixl = self._agent
        try:
            handle, finished = nixl.post(self._remote, self._found, part)
            try:
                if not finished:
                    self._wait(handle, pull)
            finally:
                nixl.release(handle)
        except nixl.errors as error:
            raise PeerLost(f"{self._name}: {type(error).__name__}: {error}") from error

    def _wait(self, handle: int, pull: SlicedPull) -> None:
        """Until the read has ended: giving it up would not keep late bytes out of the pool."""
        deadline = time.monotonic() + self._limits.slice_timeout_s
        late = PeerLost(
            f"{self._name}: a slice took longer than {self._limits.slice_timeout_s:g} s"
        )
        look_s = FIRST_LOOK_S
        while not self._agent.finished(handle):
            if time.monotonic() > deadline:
                self.copier.lose(pull, late)
            if self._abandoned.wait(look_s):
                raise late
            look_s = min(2 * look_s, LAST_LOOK_S)
        if time.monotonic() > deadline:
            raise late

    def disconnect(self) -> None:
        self.copier.stop()
        self._agent.remove(self._remote)

    def abandon(self) -> None:
        """Stops looking at reads under way: only the end of the agent fences them."""
        self._abandoned.set()
        self.copier.stop()


class NixlTransport(OneSided[_Peer]):
    name = "nixl"

    def __init__(self, me: str, pool: Pool, limits: TransportLimits | None = None) -> None:
        super().__init__(pool)
        self._agent: NixlAgent | None = NixlAgent(me, pool)
        self._limits = limits or TransportLimits()

    def metadata(self, peer: str) -> bytes:  # noqa: ARG002  the same for everyone
        pool = self._pool
        local = self._open_agent().metadata()
        return encode_metadata(
            self.name, NixlMetadata(pool.address, pool.nbytes, pool.device, local)
        )

    def connect(self, peer: str, metadata: bytes) -> None:
        found = decode_metadata(self.name, NixlMetadata, metadata)
        self.disconnect(peer)
        self._peers[peer] = _Peer(peer, found, self._open_agent(), self._limits)

    def close(self) -> None:
        for peer in sorted(self._peers):
            self._peers.pop(peer).abandon()
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _open_agent(self) -> NixlAgent:
        if self._agent is None:
            raise TransportError("the transport is closed")
        return self._agent
