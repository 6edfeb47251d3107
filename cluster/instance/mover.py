"""Carries out an instance's pulls over its ranks' transports, and reports when each has ended."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from engine.errors import TransferError, TransportError
from kvtransfer.plan import plan_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from engine.layout import KvLayout
    from kvtransfer.plan import RankPull
    from kvtransfer.transfer import PullCancel, PullOrder
    from kvtransfer.transport import Pull, Transport

    Finished = Callable[[PullOrder, TransferError | None], None]


def rank_name(instance: str, rank: int) -> str:
    """The name of one rank's pool, unique in the cluster."""
    return f"{instance}/{rank}"


GENTLE_BYTES = 4 << 20
"""What a pull that has time copies between two pauses."""


class RankMover:
    """One rank's part of its instance's pulls; those that are not urgent take `copy_share` of
    the time."""

    def __init__(
        self, layout: KvLayout, rank: int, transport: Transport, copy_share: float = 1.0
    ) -> None:
        self._layout, self._rank, self._transport = layout, rank, transport
        self._copy_share = copy_share
        self._under_way: dict[str, list[Pull]] = {}
        self._pausing: dict[str, list[asyncio.Event]] = {}

    async def pull(self, order: PullOrder) -> None:
        """Returns once all bytes are here; raises TransferError otherwise."""
        parts = plan_rank(
            order.layout,
            self._layout,
            order.source_blocks,
            order.target_blocks,
            self._rank,
            layers=range(order.first_layer, order.last_layer),
        )
        if order.urgent or self._copy_share >= 1.0:
            await self._pull(order, parts)
        else:
            await self._pull_gently(order, parts)

    async def cancel(self, transfer: str) -> None:
        """A fence may wait for a copy under way, so it does not run on the event loop."""
        for stopped in self._pausing.get(transfer, ()):
            stopped.set()
        for pull in list(self._under_way.get(transfer, ())):
            await asyncio.to_thread(pull.cancel)

    async def _pull(self, order: PullOrder, parts: Iterable[RankPull]) -> None:
        under_way = self._under_way.setdefault(order.transfer, [])
        started: list[Pull] = []
        try:
            for part in parts:
                peer = rank_name(order.source, part.source_rank)
                started.append(self._transport.pull(peer, part.copies))
                under_way.append(started[-1])
        finally:
            failures = [await _ending(pull) for pull in started]
            for pull in started:
                under_way.remove(pull)
            if not under_way:
                self._under_way.pop(order.transfer, None)
        for failure in failures:
            if failure is not None:
                raise failure

    async def _pull_gently(self, order: PullOrder, parts: Iterable[RankPull]) -> None:
        """Piece by piece, with a pause between two in proportion to what the first one took."""
        stopped = asyncio.Event()
        self._pausing.setdefault(order.transfer, []).append(stopped)
        loop, took_s = asyncio.get_running_loop(), 0.0
        try:
            for part in parts:
                for copies in part.copies.slices(GENTLE_BYTES):
                    await _pause(took_s * (1.0 / self._copy_share - 1.0), stopped)
                    began_s = loop.time()
                    await self._pull(order, [replace(part, copies=copies)])
                    took_s = loop.time() - began_s
        finally:
            self._pausing[order.transfer].remove(stopped)
            if not self._pausing[order.transfer]:
                del self._pausing[order.transfer]


async def _pause(seconds: float, stopped: asyncio.Event) -> None:
    if seconds > 0.0:
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), seconds)
    if stopped.is_set():
        raise TransportError("the pull was cancelled between two pieces")


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
