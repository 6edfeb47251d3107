"""The transport of tests and simulations: pools of one process, moved when told to."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import DeadlineExceeded, PeerLost, TransportError
from kvtransfer.transport import (
    Ending,
    PullState,
    Served,
    TransportLimits,
    check_bounds,
    decode_metadata,
    encode_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtransfer.plan import Copies
    from kvtransfer.transport import Pool


@dataclass(frozen=True, slots=True)
class MemoryMetadata:
    address: str
    nbytes: int


class MemoryNetwork:
    """All pools of the process. With `automatic`, a pull is done before it returns."""

    def __init__(self, *, automatic: bool = True) -> None:
        self._automatic = automatic
        self._pools: dict[str, Pool] = {}
        self._started = 0
        self._active: deque[MemoryPull] = deque()

    def join(self, name: str, pool: Pool) -> str:
        """An address that no other pool ever had, even under the same name."""
        self._started += 1
        address = f"{name}#{self._started}"
        self._pools[address] = pool
        return address

    def leave(self, address: str) -> None:
        self._pools.pop(address, None)

    def pool_at(self, address: str) -> Pool:
        if address not in self._pools:
            raise PeerLost(f"{address} is gone")
        return self._pools[address]

    def start(self, pull: MemoryPull) -> None:
        self._active.append(pull)
        while self._automatic and self.step():
            pass

    def step(self) -> bool:
        """Moves one slice of the oldest pull; False when there is nothing to move."""
        while self._active and self._active[0].fenced:
            self._active.popleft()
        if not self._active:
            return False
        self._active[0].step()
        return True


class MemoryPull(PullState):
    def __init__(
        self, network: MemoryNetwork, address: str, target: Pool, slices: Iterator[Copies]
    ) -> None:
        super().__init__()
        self._network = network
        self._address = address
        self._target = target
        self._slices = slices

    def step(self) -> None:
        part = next(self._slices, None)
        if part is None:
            self.end(Ending.DONE)
            return
        try:
            source = self._network.pool_at(self._address).bytes()
        except PeerLost as lost:
            self.end(Ending.FAILED, lost)
            return
        target = self._target.bytes()
        for start, to, count in zip(
            part.source_offsets, part.target_offsets, part.nbytes, strict=True
        ):
            target[to : to + count] = source[start : start + count]

    def wait(self, timeout_s: float) -> None:
        """No time passes here: what has not arrived will not arrive by waiting."""
        if not self.done():
            raise DeadlineExceeded(f"the pull has not ended after {timeout_s:g} s")

    def cancel(self, timeout_s: float | None = None) -> None:  # noqa: ARG002  never waits
        self.end(Ending.CANCELLED)


class MemoryTransport:
    name = "memory"

    def __init__(
        self, me: str, pool: Pool, network: MemoryNetwork, limits: TransportLimits | None = None
    ) -> None:
        self._pool = pool
        self._network = network
        self._limits = limits or TransportLimits()
        self._address = network.join(me, pool)
        self._peers: dict[str, MemoryMetadata] = {}
        self._pulls: dict[str, list[MemoryPull]] = {}

    def metadata(self, peer: str) -> bytes:  # noqa: ARG002  the same for everyone
        return encode_metadata(self.name, MemoryMetadata(self._address, self._pool.nbytes))

    def connect(self, peer: str, metadata: bytes) -> None:
        found = decode_metadata(self.name, MemoryMetadata, metadata)
        self._network.pool_at(found.address)
        self.disconnect(peer)
        self._peers[peer] = found

    def pull(self, peer: str, copies: Copies) -> MemoryPull:
        if peer not in self._peers:
            raise TransportError(f"not connected to {peer!r}")
        source = self._peers[peer]
        check_bounds(copies, source.nbytes, self._pool.nbytes)
        slices = copies.slices(self._limits.slice_bytes)
        pull = MemoryPull(self._network, source.address, self._pool, slices)
        active = [old for old in self._pulls.get(peer, []) if not old.fenced]
        self._pulls[peer] = [*active, pull]
        self._network.start(pull)
        return pull

    def two_sided(self, peer: str) -> bool:  # noqa: ARG002  with any of them
        return False

    def serve(self, peer: str, copies: Copies) -> Served:  # noqa: ARG002  the peer reads alone
        return Served()

    def disconnect(self, peer: str) -> None:
        for pull in self._pulls.pop(peer, []):
            pull.cancel()
        self._peers.pop(peer, None)

    def close(self) -> None:
        for peer in sorted(self._peers):
            self.disconnect(peer)
        self._network.leave(self._address)
