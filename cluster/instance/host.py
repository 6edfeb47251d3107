"""Drives a pure instance in real time: its messages, its batches, its copies and its clock.

The event loop owns the instance; batches run in a thread of their own, so that messages, leases
and heartbeats go on meanwhile. Where batches can be launched, the next one is, while one runs, if
the instance can tell it by then. Whatever fails here ends the host: an instance is never half
alive.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.instance.passes import Executed, Launched, Passes
from cluster.thread_names import LOOP, name_thread
from engine.errors import InstanceLost, TandemError
from engine.messages import Lost
from kvtransfer.transfer import PullCancel, PullOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cluster.instance.instance import Instance
    from cluster.links import Link
    from engine.batch import Executor
    from engine.clock import Clock
    from engine.errors import TransferError
    from engine.messages import Load

    Finished = Callable[[PullOrder, TransferError | None], None]

log = logging.getLogger(__name__)

FAILURES = (TandemError, RuntimeError, ValueError)
"""What a batch may fail with, InstanceLost apart."""


class Mover(Protocol):
    """Carries out an instance's copies: in this process, or in all of its ranks."""

    def start(self, order: PullOrder, finished: Finished) -> None:
        """`finished` is called once, on the event loop."""
        ...

    def cancel(self, order: PullCancel) -> None:
        """Fences the transfer's copies; each still reports its end."""
        ...


@dataclass(frozen=True, slots=True)
class HostSettings:
    tick_s: float = 0.1
    heartbeat_s: float = 0.25
    change_s: float = 0.02
    """A changed load is told this often at most."""
    pass_s: float = 300.0
    """A batch that runs for longer will never end: its device hangs."""


class Host:
    def __init__(
        self,
        instance: Instance,
        *,
        executor: Executor,
        link: Link,
        mover: Mover,
        clock: Clock,
        settings: HostSettings | None = None,
    ) -> None:
        self.instance = instance
        self._executor, self._link, self._mover, self._clock = executor, link, mover, clock
        self._settings = settings or HostSettings()
        self._listeners: tuple[str, ...] = ()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._told: tuple[object, ...] = ()

    async def run(self) -> None:
        """Until cancelled; raises what broke, and then the instance must be given up."""
        name_thread(LOOP)
        passes = Passes(self._executor, self._settings.pass_s)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive())
                tasks.create_task(self._step(passes))
                tasks.create_task(self._tick())
                tasks.create_task(self._tell_load())
        finally:
            passes.close()

    def tell(self, listeners: Iterable[str]) -> None:
        """Who hears the load from now on: the gateways and the controller."""
        self._listeners = tuple(listeners)
        self._told = ()
        self._changed.set()

    def lost(self, name: str) -> None:
        """The controller says that a peer is gone."""
        self.instance.receive("controller", Lost(name), self._clock.now())
        self.pump()

    def pump(self) -> None:
        """Carries out what the instance has decided, and wakes what may go on now."""
        for order in self.instance.take_pulls():
            if isinstance(order, PullCancel):
                self._mover.cancel(order)
            else:
                self._mover.start(order, self._pulled)
        while envelopes := self.instance.take_outbox():
            for envelope in envelopes:
                self._send(envelope.to, envelope.message)
        self._wake.set()
        self._changed.set()

    def _send(self, to: str, message: object) -> None:
        try:
            self._link.send(to, message)  # type: ignore[arg-type]
        except InstanceLost as lost:
            log.warning("peer lost peer=%s reason=%s", to, lost)
            self.instance.receive("controller", Lost(to), self._clock.now())

    async def _receive(self) -> None:
        while True:
            sender, message = await self._link.receive()
            self.instance.receive(sender, message, self._clock.now())
            self.pump()

    async def _step(self, passes: Passes) -> None:
        under_way: Executed | Launched | None = None
        while True:
            under_way = under_way or self._begin(passes)
            if under_way is None:
                self.pump()
                self._wake.clear()
                await self._wake.wait()
                continue
            behind = self._follow(passes, under_way)
            self.pump()  # the last batch's tokens leave while this one runs
            under_way = await self._finish(passes, under_way, behind)

    def _begin(self, passes: Passes) -> Executed | Launched | None:
        batch = self.instance.next_batch(self._clock.now())
        if batch is None:
            return None
        if passes.launches and self.instance.may_be_followed:
            return passes.launch(batch)
        loop = asyncio.get_running_loop()

        def group_done(group: int) -> None:
            loop.call_soon_threadsafe(self._group_done, group)

        return passes.execute(batch, group_done if self.instance.hands_layers_on else None)

    def _follow(self, passes: Passes, under_way: Executed | Launched) -> Launched | None:
        if isinstance(under_way, Executed):
            return None
        batch = self.instance.next_ahead(self._clock.now())
        return None if batch is None else passes.launch(batch, under_way)

    async def _finish(
        self, passes: Passes, under_way: Executed | Launched, behind: Launched | None
    ) -> Launched | None:
        """What runs on. A failed batch costs its requests a retry; only a lost rank, or a fault
        that follows no request, ends the instance."""
        try:
            result = await passes.result(under_way)
        except InstanceLost:
            raise
        except FAILURES as error:
            log.exception("batch failed requests=%d", len(under_way.batch.chunks))
            if behind is not None:
                await self._let_go(passes, behind)
            self.instance.fail_batch(under_way.batch, error, self._clock.now())
            return None
        self.instance.finish(under_way.batch, result, self._clock.now())
        if behind is not None and behind.was_declined:
            self.instance.discard(behind.batch)
            return None
        return behind

    async def _let_go(self, passes: Passes, behind: Launched) -> None:
        """What is behind a batch that failed is worth nothing, but it uses blocks until its end."""
        if not behind.was_declined:
            try:
                await passes.result(behind)
            except InstanceLost:
                raise
            except FAILURES as error:
                log.warning("batch failed behind another one reason=%s", error)
        self.instance.discard(behind.batch)

    def _group_done(self, group: int) -> None:
        self.instance.layer_group_done(group, self._clock.now())
        self.pump()

    def _pulled(self, order: PullOrder, error: TransferError | None) -> None:
        self.instance.pull_finished(order.transfer, order.number, error, self._clock.now())
        self.pump()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._settings.tick_s)
            self.instance.tick(self._clock.now())
            self.pump()

    async def _tell_load(self) -> None:
        """At every change of what policies look at, and as a heartbeat when nothing changes."""
        while True:
            load, self._told = self.instance.load(), self.instance.gist
            for listener in self._listeners:
                self._tell(listener, load)
            await asyncio.sleep(self._settings.change_s)
            try:
                async with asyncio.timeout(self._settings.heartbeat_s):
                    await self._until_changed()
            except TimeoutError:
                continue

    async def _until_changed(self) -> None:
        while self.instance.gist == self._told:
            self._changed.clear()
            await self._changed.wait()

    def _tell(self, listener: str, load: Load) -> None:
        try:
            self._link.send(listener, load)
        except InstanceLost as lost:
            log.warning("load not told listener=%s reason=%s", listener, lost)
