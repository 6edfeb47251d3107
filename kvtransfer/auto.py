"""Opens what a rank's machine offers and picks a transport for each peer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import TransportError, Unsupported
from kvtransfer.choose import FASTEST_FIRST, Offered, choose
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.cuda_memory import gpu_identity
from kvtransfer.process_watch import host_identity
from kvtransfer.shared_memory import SharedMemoryTransport
from kvtransfer.transport import TransportLimits, decode_metadata, encode_metadata

if TYPE_CHECKING:
    from kvtransfer.plan import Copies
    from kvtransfer.transport import Pool, Pull, Transport

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    transport: str
    metadata: bytes


@dataclass(frozen=True, slots=True)
class AutoMetadata:
    offered: Offered
    parts: tuple[Part, ...]


EVERYWHERE = FASTEST_FIRST
"""What `auto` opens: NCCL is used only when asked for."""


class AutoTransport:
    """Every transport of `among` that can be opened here; `preference` narrows them to one."""

    name = "auto"

    def __init__(
        self,
        me: str,
        pool: Pool,
        limits: TransportLimits | None = None,
        *,
        preference: str = "auto",
        among: tuple[str, ...] = EVERYWHERE,
    ) -> None:
        self._me = me
        self._preference = preference
        names = among if preference == "auto" else (preference,)
        self._open = open_transports(me, pool, limits or TransportLimits(), names)
        device = pool.device if pool.device == "cpu" else gpu_identity(pool.device)
        self._offered = Offered(host_identity(), device, tuple(sorted(self._open)))
        self._used: dict[str, Transport] = {}

    def metadata(self, peer: str) -> bytes:
        parts = tuple(
            Part(name, transport.metadata(peer)) for name, transport in sorted(self._open.items())
        )
        return encode_metadata(self.name, AutoMetadata(self._offered, parts))

    def connect(self, peer: str, metadata: bytes) -> None:
        found = decode_metadata(self.name, AutoMetadata, metadata)
        choice = choose(self._offered, found.offered, self._preference)
        log.info(
            "transport chosen rank=%s peer=%s transport=%s why=%s",
            self._me,
            peer,
            choice.name,
            choice.why,
        )
        parts = {part.transport: part.metadata for part in found.parts}
        if choice.name not in parts:
            raise TransportError(f"{peer} offers {choice.name} but sent no metadata for it")
        self.disconnect(peer)
        self._open[choice.name].connect(peer, parts[choice.name])
        self._used[peer] = self._open[choice.name]

    def pull(self, peer: str, copies: Copies) -> Pull:
        return self._way_to(peer).pull(peer, copies)

    def serve(self, peer: str, copies: Copies) -> Pull:
        return self._way_to(peer).serve(peer, copies)

    def two_sided(self, peer: str) -> bool:
        return self._way_to(peer).two_sided(peer)

    def uses(self, peer: str) -> str:
        """The name of the transport that joins this rank to a peer."""
        return self._way_to(peer).name

    def disconnect(self, peer: str) -> None:
        if peer in self._used:
            self._used[peer].disconnect(peer)
            del self._used[peer]

    def close(self) -> None:
        self._used.clear()
        for _, transport in sorted(self._open.items()):
            transport.close()

    def _way_to(self, peer: str) -> Transport:
        if peer not in self._used:
            raise TransportError(f"not connected to {peer!r}")
        return self._used[peer]


def open_transports(
    me: str, pool: Pool, limits: TransportLimits, names: tuple[str, ...]
) -> dict[str, Transport]:
    """Those of several that work here: the log says what keeps the others. An only one must."""
    if len(names) == 1:
        return {names[0]: _open(names[0], me, pool, limits)}
    opened: dict[str, Transport] = {}
    for name in names:
        try:
            opened[name] = _open(name, me, pool, limits)
        except Unsupported as why:
            log.info("transport not open rank=%s transport=%s why=%s", me, name, why)
        except TransportError as why:
            log.warning("transport failed to open rank=%s transport=%s why=%s", me, name, why)
    return opened


def _open(name: str, me: str, pool: Pool, limits: TransportLimits) -> Transport:
    if name == "shared_memory":
        return SharedMemoryTransport(me, pool, limits)
    if name == "cuda_ipc":
        return CudaIpcTransport(me, pool, limits)
    if name == "nixl":
        from kvtransfer.nixl import NixlTransport

        return NixlTransport(me, pool, limits)
    from kvtransfer.nccl import NcclTransport, cuda_library

    return NcclTransport(me, pool, cuda_library(), limits)
