"""What transports share whose peers are read without their help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from engine.errors import TransportError
from kvtransfer.transport import Served, check_bounds

if TYPE_CHECKING:
    from kvtransfer.copier import Copier, SlicedPull
    from kvtransfer.plan import Copies
    from kvtransfer.transport import Pool


class Source(Protocol):
    """A connected peer."""

    @property
    def nbytes(self) -> int:
        """Of its pool."""
        ...

    @property
    def copier(self) -> Copier: ...

    def disconnect(self) -> None: ...


Peer = TypeVar("Peer", bound=Source)


class OneSided(Generic[Peer]):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._peers: dict[str, Peer] = {}

    def pull(self, peer: str, copies: Copies) -> SlicedPull:
        if peer not in self._peers:
            raise TransportError(f"not connected to {peer!r}")
        source = self._peers[peer]
        check_bounds(copies, source.nbytes, self._pool.nbytes)
        return source.copier.submit(copies)

    def two_sided(self, peer: str) -> bool:  # noqa: ARG002  with none of them
        return False

    def serve(self, peer: str, copies: Copies) -> Served:  # noqa: ARG002  the peer reads alone
        return Served()

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            self._peers[peer].disconnect()
            del self._peers[peer]
