"""Where both sides must take part in a copy: the target asks, the source serves in that order.

A request names the connection it is made over and its number on it. Requests may overtake one
another on their way, so a source keeps those that come early until their turn.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

from engine.errors import TransferError, TransportError
from kvtransfer.plan import plan_rank

if TYPE_CHECKING:
    from cluster.instance.coded import Staged, StageRequest
    from cluster.instance.comparing import CompareRequest
    from engine.layout import KvLayout
    from kvtransfer.plan import Copies, RankPull
    from kvtransfer.transfer import PullOrder
    from kvtransfer.transport import Pull, Transport

EARLY_REQUESTS = 1024
"""Of one reader, kept until their turn."""


@dataclass(frozen=True, slots=True)
class ServeRequest:
    reader: str
    """The rank that pulls."""
    connection: bytes
    turn: int
    order: PullOrder
    layout: KvLayout
    """The reader's, of which it is `rank`."""
    rank: int


class Peers(Protocol):
    """Calls to the ranks of other instances; they raise TransferError where one is gone."""

    @property
    def me(self) -> str:
        """The name under which the others know this rank."""
        ...

    async def metadata(self, peer: str) -> bytes: ...

    async def serve(self, peer: str, request: ServeRequest) -> None: ...

    async def stage(self, peer: str, request: StageRequest) -> Staged: ...

    async def unstage(self, peer: str, ticket: int) -> None: ...

    async def checksum(self, peer: str, request: CompareRequest) -> int: ...


def order_parts(
    order: PullOrder, source: KvLayout, target: KvLayout, rank: int
) -> tuple[RankPull, ...]:
    """What a target's rank copies to carry the order out."""
    layers = range(order.first_layer, order.last_layer)
    return plan_rank(source, target, order.source_blocks, order.target_blocks, rank, layers=layers)


def taken_from(
    rank: int, layout: KvLayout, order: PullOrder, target: KvLayout, target_rank: int
) -> Copies:
    """The source's view of it: what a target's rank copies from this one."""
    for part in order_parts(order, layout, target, target_rank):
        if part.source_rank == rank:
            return part.copies
    raise TransportError(f"rank {target_rank} of the reader takes nothing from rank {rank}")


def connection_of(metadata: bytes) -> bytes:
    """A name for a connection that both of its ends know."""
    return blake2b(metadata, digest_size=16).digest()


@dataclass(slots=True)
class _Line:
    """One reader's requests over one connection."""

    connection: bytes
    next_turn: int = 0
    early: dict[int, Copies] = field(default_factory=dict)


class Serving:
    """The source's part."""

    def __init__(self, layout: KvLayout, rank: int, transport: Transport) -> None:
        self._layout, self._rank, self._transport = layout, rank, transport
        self._lines: dict[str, _Line] = {}

    def metadata(self, reader: str) -> bytes:
        """What the reader needs to connect; its requests over older connections are refused."""
        metadata = self._transport.metadata(reader)
        self._lines[reader] = _Line(connection_of(metadata))
        return metadata

    def forget(self, reader: str) -> None:
        self._lines.pop(reader, None)

    def serve(self, request: ServeRequest) -> None:
        line = self._lines.get(request.reader)
        if line is None or line.connection != request.connection:
            raise TransportError(f"{request.reader} asks over a connection that is no more")
        if len(line.early) >= EARLY_REQUESTS:
            raise TransportError(f"{request.reader}: {EARLY_REQUESTS} requests came too early")
        line.early[request.turn] = self._copies(request)
        while line.next_turn in line.early:
            self._transport.serve(request.reader, line.early.pop(line.next_turn))
            line.next_turn += 1

    def _copies(self, request: ServeRequest) -> Copies:
        return taken_from(self._rank, self._layout, request.order, request.layout, request.rank)


class Asking:
    """The target's part."""

    def __init__(
        self, layout: KvLayout, rank: int, transport: Transport, peers: Peers | None
    ) -> None:
        self._layout, self._rank = layout, rank
        self._transport, self._peers = transport, peers
        self._connections: dict[str, bytes] = {}
        self._turns: dict[str, int] = {}
        self._broken: set[str] = set()
        self._mending: dict[str, asyncio.Lock] = {}

    def connect(self, peer: str, metadata: bytes) -> None:
        self._transport.connect(peer, metadata)
        self._connections[peer] = connection_of(metadata)
        self._turns[peer] = 0
        self._broken.discard(peer)

    def disconnect(self, peer: str) -> None:
        self._transport.disconnect(peer)
        self._connections.pop(peer, None)
        self._turns.pop(peer, None)
        self._broken.discard(peer)

    def request(self, peer: str, order: PullOrder) -> ServeRequest:
        """What to ask the peer for, in the order in which its pulls were started."""
        turn = self._turns[peer]
        self._turns[peer] = turn + 1
        connection = self._connections[peer]
        return ServeRequest(self._calls.me, connection, turn, order, self._layout, self._rank)

    async def ask(self, peer: str, request: ServeRequest, pull: Pull) -> TransferError | None:
        """What the peer has against it, and then the pull is about to end: where a fence cannot be
        promised yet, whoever waits for the end waits for longer."""
        try:
            await self._calls.serve(peer, request)
        except TransferError as refusal:
            with suppress(TransportError):
                await asyncio.to_thread(pull.cancel)
            return refusal
        return None

    def broken(self, peer: str) -> None:
        """The connection is of no use: lost, or the sides may not agree whose turn it is."""
        self._broken.add(peer)

    async def mend(self, peer: str) -> None:
        """Connects anew where the connection is broken, unless others make them for this rank."""
        if self._peers is None:
            return
        async with self._mending.setdefault(peer, asyncio.Lock()):
            if peer in self._broken:
                metadata = await self._calls.metadata(peer)
                await asyncio.to_thread(self.connect, peer, metadata)

    @property
    def _calls(self) -> Peers:
        assert self._peers is not None, "a two-sided transport needs calls to other ranks"
        return self._peers
