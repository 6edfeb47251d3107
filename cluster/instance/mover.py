"""Carries out an instance's pulls over its ranks' transports, and reports when each has ended."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from cluster.instance.serving import Asking, Serving, order_parts
from engine.errors import PeerLost, TransferError, TransportError
from kvtransfer.plan import plan_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cluster.instance.coded import CodedPiece, Coder, Staged, StageRequest
    from cluster.instance.comparing import CompareRequest, Comparing
    from cluster.instance.serving import Peers, ServeRequest
    from engine.layout import KvLayout
    from kvtransfer.plan import Copies, RankCells, RankPull
    from kvtransfer.transfer import PullCancel, PullOrder
    from kvtransfer.transport import Pull, Transport

    Finished = Callable[[PullOrder, TransferError | None], None]


def rank_name(instance: str, rank: int) -> str:
    """The name of one rank's pool, unique in the cluster."""
    return f"{instance}/{rank}"


GENTLE_BYTES = 4 << 20
"""What a pull that has time copies between two pauses."""


class Pace:
    """How fast one order is carried out: pauses in proportion to what each piece took."""

    def __init__(self, copy_share: float) -> None:
        self.copy_share = copy_share
        self._stopped = asyncio.Event()
        self._began_s: float | None = None

    def stop(self) -> None:
        self._stopped.set()

    async def next_piece(self) -> None:
        """Called before each piece; TransportError once stopped."""
        now_s = asyncio.get_running_loop().time
        if self._began_s is not None and self.copy_share < 1.0:
            took_s = now_s() - self._began_s
            with suppress(TimeoutError):
                pause_s = took_s * (1.0 / self.copy_share - 1.0)
                await asyncio.wait_for(self._stopped.wait(), pause_s)
        if self._stopped.is_set():
            raise TransportError("the pull was cancelled between two pieces")
        self._began_s = now_s()


class RankMover:
    """One rank's part of its instance's pulls, and of what other ranks pull from it with its help.

    Pulls that are not urgent take `copy_share` of the time.
    """

    def __init__(
        self,
        layout: KvLayout,
        rank: int,
        transport: Transport,
        copy_share: float = 1.0,
        *,
        peers: Peers | None = None,
        coder: Coder | None = None,
        comparing: Comparing | None = None,
    ) -> None:
        self._layout, self._rank, self._transport = layout, rank, transport
        self._copy_share = copy_share
        self._peers, self._coder, self._comparing = peers, coder, comparing
        self._serving = Serving(layout, rank, transport)
        self._asking = Asking(layout, rank, transport, peers)
        self._under_way: dict[str, list[Pull]] = {}
        self._paces: dict[str, list[Pace]] = {}

    # What other ranks ask.

    def metadata(self, peer: str) -> bytes:
        return self._serving.metadata(peer)

    def connect(self, peer: str, metadata: bytes) -> None:
        self._asking.connect(peer, metadata)

    async def meet(self, peers: Sequence[str]) -> None:
        """Connects to them; to one that does not answer now, before the next pull from it."""
        for peer in peers:
            self._asking.broken(peer)
        for peer in peers:
            await self._asking.mend(peer)

    def disconnect(self, peer: str) -> None:
        self._serving.forget(peer)
        self._asking.disconnect(peer)
        if self._coder is not None:
            self._coder.forget(peer.rpartition("/")[0])

    def serve(self, request: ServeRequest) -> None:
        self._serving.serve(request)

    async def stage(self, request: StageRequest) -> Staged:
        return await self._own_coder.stage(request)

    def unstage(self, ticket: int) -> None:
        self._own_coder.unstage(ticket)

    async def checksum(self, request: CompareRequest) -> int:
        return await self._own_comparing.checksum(request)

    @property
    def _own_comparing(self) -> Comparing:
        if self._comparing is None:
            raise TransportError("transfer.checksums is off here")
        return self._comparing

    @property
    def _own_coder(self) -> Coder:
        if self._coder is None:
            raise TransportError("transfer.compression is off here")
        return self._coder

    # What this rank pulls.

    async def pull(self, order: PullOrder) -> None:
        """Returns once all bytes are here, and are the right ones if the order is to compare them;
        raises TransferError otherwise."""
        if order.compare:
            with self._paced(order) as pace:
                await self._own_comparing.compare(order, pace.next_piece)
            return
        parts = order_parts(order, order.layout, self._layout, self._rank)
        if not parts:
            return
        two_sided = any(self._transport.two_sided(_peer(order, part)) for part in parts)
        nbytes = sum(part.copies.total_bytes for part in parts)
        with self._paced(order) as pace:
            for part in parts:
                await self._asking.mend(_peer(order, part))
            codec = self._codec(order, nbytes, two_sided=two_sided)
            if codec is not None:
                await self._pull_coded(order, codec, pace)
            elif two_sided or pace.copy_share >= 1.0:
                await self._pull_whole(order, parts)
            else:
                await self._pull_gently(order, parts, pace)

    async def cancel(self, transfer: str) -> None:
        """A fence may wait for a copy under way, so it does not run on the event loop."""
        for pace in self._paces.get(transfer, ()):
            pace.stop()
        for pull in list(self._under_way.get(transfer, ())):
            await asyncio.to_thread(pull.cancel)

    def _codec(self, order: PullOrder, nbytes: int, *, two_sided: bool) -> str | None:
        if self._coder is None:
            return None
        return self._coder.choose(order.source, nbytes, two_sided=two_sided)

    @contextmanager
    def _paced(self, order: PullOrder) -> Iterator[Pace]:
        pace = Pace(1.0 if order.urgent else self._copy_share)
        self._paces.setdefault(order.transfer, []).append(pace)
        try:
            yield pace
        finally:
            self._paces[order.transfer].remove(pace)
            if not self._paces[order.transfer]:
                del self._paces[order.transfer]

    async def _pull_whole(self, order: PullOrder, parts: Sequence[RankPull]) -> None:
        started: list[asyncio.Task[None]] = []
        try:
            started.extend(self._start(order, _peer(order, part), part.copies) for part in parts)
        finally:
            endings = await asyncio.gather(*started, return_exceptions=True)
        for failure in endings:
            if failure is not None:
                raise failure

    async def _pull_gently(self, order: PullOrder, parts: Sequence[RankPull], pace: Pace) -> None:
        for part in parts:
            for copies in part.copies.slices(GENTLE_BYTES):
                await pace.next_piece()
                await self._start(order, _peer(order, part), copies)

    async def _pull_coded(self, order: PullOrder, codec: str, pace: Pace) -> None:
        layers = range(order.first_layer, order.last_layer)
        parts = plan_cells(
            order.layout,
            self._layout,
            order.source_blocks,
            order.target_blocks,
            self._rank,
            layers=layers,
        )
        for part in parts:
            for piece in self._own_coder.pieces(part, order, codec):
                await pace.next_piece()
                await self._pull_piece(order, part, piece)

    async def _pull_piece(self, order: PullOrder, part: RankCells, piece: CodedPiece) -> None:
        """Asks for the piece, pulls it coded, makes sure that it was held, and decodes it."""
        assert self._peers is not None, "coded pulls need calls to other ranks"
        coder, peer = self._own_coder, rank_name(order.source, part.source_rank)
        slot = await coder.borrow()
        try:
            staged = await self._peers.stage(peer, piece.request)
            await self._start(order, peer, coder.copies(staged, slot))
            await self._peers.unstage(peer, staged.ticket)
            await asyncio.to_thread(coder.decode, part, piece, slot)
        finally:
            coder.give_back(slot)

    def _start(self, order: PullOrder, peer: str, copies: Copies) -> asyncio.Task[None]:
        """Starts a copy now; the task ends when nothing more is written."""
        pull = self._transport.pull(peer, copies)
        request = None
        if self._transport.two_sided(peer):
            request = self._asking.request(peer, order)
        self._under_way.setdefault(order.transfer, []).append(pull)
        return asyncio.create_task(self._finish(order, peer, pull, copies, request))

    async def _finish(
        self,
        order: PullOrder,
        peer: str,
        pull: Pull,
        copies: Copies,
        request: ServeRequest | None,
    ) -> None:
        began_s = asyncio.get_running_loop().time()
        refusal = None if request is None else await self._asking.ask(peer, request, pull)
        failure = await _ending(pull) or refusal
        self._under_way[order.transfer].remove(pull)
        if not self._under_way[order.transfer]:
            del self._under_way[order.transfer]
        if failure is not None:
            if request is not None or isinstance(failure, PeerLost):
                self._asking.broken(peer)
            raise refusal or failure
        if self._coder is not None:
            took_s = asyncio.get_running_loop().time() - began_s
            self._coder.measured(order.source, copies.total_bytes, took_s)


def _peer(order: PullOrder, part: RankPull) -> str:
    return rank_name(order.source, part.source_rank)


async def _ending(pull: Pull) -> TransferError | None:
    """Waits until nothing more is written, whatever became of the copy."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(ended.set)

    pull.add_done_callback(wake)
    await ended.wait()
    try:
        pull.done()
    except TransferError as error:
        return error
    return None


class Rank(Protocol):
    """A RankMover here, or one in another worker's process."""

    async def pull(self, order: PullOrder) -> None: ...

    async def cancel(self, transfer: str) -> None: ...


class InstanceMover:
    """A pull has ended when it has ended in every rank."""

    def __init__(self, ranks: Sequence[Rank], tasks: asyncio.TaskGroup) -> None:
        self._ranks, self._tasks = ranks, tasks

    def start(self, order: PullOrder, finished: Finished) -> None:
        self._tasks.create_task(self._pull(order, finished))

    def cancel(self, order: PullCancel) -> None:
        self._tasks.create_task(self._cancel(order.transfer))

    async def _pull(self, order: PullOrder, finished: Finished) -> None:
        results = await asyncio.gather(
            *(rank.pull(order) for rank in self._ranks), return_exceptions=True
        )
        finished(order, _first_failure(results))

    async def _cancel(self, transfer: str) -> None:
        """TransportError here means that a fence cannot be promised: the instance must go."""
        await asyncio.gather(*(rank.cancel(transfer) for rank in self._ranks))


def _first_failure(results: Sequence[BaseException | None]) -> TransferError | None:
    """Transfer errors are outcomes; anything else is a defect and goes up."""
    failure = None
    for result in results:
        if result is not None and not isinstance(result, TransferError):
            raise result
        failure = failure or result
    return failure
