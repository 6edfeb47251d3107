"""Keeps the instances that are wanted: starts what is missing, notices what is lost."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from cluster.actors import answer
from cluster.control.launch import Launched, Launcher
from cluster.control.liveness import Heartbeats, RestartBudget
from cluster.control.placing import Groups, largest_first
from cluster.roster import Kind, Roster, RosterBook
from engine.errors import BadInput, NotFound, TandemError
from placement.view import InstanceView, View

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable
    from typing import Protocol

    from cluster.config import Config
    from cluster.control.balancing import Note
    from cluster.control.recovery import Recovered
    from cluster.instance.leading import Network
    from cluster.roster import InstanceSpec, Member
    from cluster.zmq_link import ZmqLink
    from engine.clock import Clock
    from engine.messages import Load

    class Starts(Protocol):
        """Who is told how starts went."""

        def up(self, name: str) -> None: ...

        def failed(self, name: str) -> bool:
            """Whether it was theirs; then they decide anew, and it is not wanted any more."""
            ...


log = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between two looks at heartbeats and newcomers."""


class Keeper:
    """One for a controller's life; `adopt` gives it what the controller has found."""

    def __init__(self, config: Config, network: Network, note: Note, clock: Clock) -> None:
        self._config, self._note, self._clock = config, note, clock
        self._launcher = Launcher(config, network, note)
        self._heartbeats = Heartbeats(config.limits.silence_s)
        self._gateways = Heartbeats(config.limits.gateway_silence_s)
        self._budgets: dict[str, RestartBudget] = {}
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._ending = False
        self.groups = Groups()
        self.instances: dict[str, Launched] = {}
        self.loads: dict[str, Load] = {}
        self.book = RosterBook(Roster(0))
        self.fatal: BadInput | None = None
        """Why the model cannot be served at all; what has been served once, can be."""
        self._has_served = False
        self.given_up: dict[str, str] = {}
        """Instances that are wanted but not started any more: why the last one failed."""

    @property
    def roster(self) -> Roster:
        return self.book.roster

    def begin(
        self, found: Recovered, me: Member, link: ZmqLink, tasks: asyncio.TaskGroup, starts: Starts
    ) -> None:
        """Takes over what was found, and starts what of it is missing."""
        self._link, self._tasks, self._starts = link, tasks, starts
        now = self._clock.now()
        # What was up before this controller may lack an instance at this very moment.
        self._has_served = bool(found.instances)
        self.book = RosterBook(found.roster)
        self.book.join(me, now)
        for launched in found.instances:
            self.instances[launched.spec.name] = launched
            self._heartbeats.heard(launched.spec.name, now)
            self.spawn(self._keep(launched))
        for gateway in self.roster.of_kind(Kind.GATEWAY):
            self._gateways.heard(gateway.name, now)
        for member in self.roster.of_kind(Kind.INSTANCE):
            link.connect(member.name, member.address)
        self.desire(self.roster.desired)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(work)

    # What is wanted.

    def desire(self, specs: Iterable[InstanceSpec]) -> None:
        """From now on these instances are wanted; those that are missing are started, also if
        they had been given up.

        Once all are to go, none is: a role switch may still be under way then.
        """
        self.book.desire(() if self._ending else specs)
        self.given_up.clear()
        for spec in largest_first(self.roster.desired):
            if spec.name not in self.instances:
                self._start(spec)
        self.announce()

    def _start(self, spec: InstanceSpec) -> None:
        launched = Launched(spec, self.groups)
        self.instances[spec.name] = launched
        self.spawn(self._keep(launched))

    def unwant(self, name: str) -> None:
        self.desire(spec for spec in self.roster.desired if spec.name != name)

    def wants(self, name: str) -> bool:
        return any(spec.name == name for spec in self.roster.desired)

    def change(self, spec: InstanceSpec) -> bool:
        """Wants an instance as this says; False if it is not wanted at all any more."""
        if not self.wants(spec.name):
            return False
        others = (one for one in self.roster.desired if one.name != spec.name)
        self.desire((*others, spec))
        return True

    def up(self, name: str) -> Launched:
        launched = self.instances.get(name)
        if launched is None or launched.stage != "up":
            raise NotFound(f"no instance {name} is up")
        return launched

    async def until_up(self, spec: InstanceSpec, within_s: float) -> None:
        """Returns when the instance is up as `spec` says, or is not wanted so any more, and
        after a while at the latest."""
        deadline_s = self._clock.now() + within_s
        while spec in self.roster.desired and self._clock.now() < deadline_s:
            launched = self.instances.get(spec.name)
            if launched is not None and launched.spec == spec and launched.stage == "up":
                return
            await self.changed(LOOK_S)

    async def all_gone(self) -> None:
        """Stops every instance."""
        self._ending = True
        self.desire(())
        for launched in self.instances.values():
            launched.dismiss("shut down")
        while self.instances:
            await self.changed(LOOK_S)

    async def _keep(self, launched: Launched) -> None:
        """An instance from its start to its end; then `_restart` sees to the next one."""
        name, reason = launched.spec.name, "it stopped"
        try:
            if launched.stage != "up":
                await launched.unless_condemned(self._launcher.launch(launched))
                self._note("instance", name, "up", role=launched.spec.role.value)
                self._starts.up(name)
                self._has_served = self._has_served or self._all_up()
            await launched.ended()
            self._note("instance", name, "stopped")
        except (TandemError, RayError, TimeoutError) as error:
            reason = self._ended_by(launched, error)
            if self._starts.failed(name):
                self.unwant(name)
        self._forget(name)
        await launched.take_down()
        del self.instances[name]
        self.announce()
        if self.wants(name):
            await self._restart(name, reason)

    def _all_up(self) -> bool:
        launched = (self.instances.get(spec.name) for spec in self.roster.desired)
        return all(one is not None and one.stage == "up" for one in launched)

    def _ended_by(self, launched: Launched, error: Exception) -> str:
        """Tells why it is gone."""
        name = launched.spec.name
        cause = getattr(error, "cause", error)
        if isinstance(cause, BadInput) and launched.stage != "up" and not self._has_served:
            self.fatal = cause
        text = "lost" if self.wants(name) else "stopped"
        # Ray's and asyncio's errors may have no words at all.
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        self._note("instance", name, text, reason=reason)
        return reason

    async def _restart(self, name: str, reason: str) -> None:
        limits = self._config.limits
        budget = self._budgets.setdefault(
            name, RestartBudget(limits.restarts, limits.restart_window_s)
        )
        pause_s = budget.take(self._clock.now())
        if pause_s is None or self.fatal is not None:
            self.given_up[name] = reason
            self._note("instance", name, "given up", restarts=limits.restarts, reason=reason)
            return
        await asyncio.sleep(pause_s)
        for spec in self.roster.desired:
            if spec.name == name and name not in self.instances:
                self._note("instance", name, "restarting")
                self._start(spec)

    # Who is there.

    def admits(self, instance: str) -> bool:
        launched = self.instances.get(instance)
        return launched is not None and launched.shows_itself

    def joins(self, member: Member, known: int) -> None:
        """A member shows itself and tells what roster it has carried out."""
        now = self._clock.now()
        self.book.heard(member.name, known)
        if member.kind is Kind.GATEWAY:
            self._gateways.heard(member.name, now)
        if self.book.join(member, now):
            self._note(member.kind.value, member.name, "joined", address=member.address)
            self.announce()

    def lose_gateway(self, name: str) -> None:
        self._gateways.forget(name)
        if self.book.leave(name):
            self._note("gateway", name, "lost")
            self.announce()

    def heard(self, name: str, load: Load) -> bool:
        """Whether it is a sign of life: what was said before the end may be read after it."""
        if self.roster.find(name) is None:
            return False
        self._heartbeats.heard(name, self._clock.now())
        self.loads[name] = load
        return True

    def look(self, now: float) -> tuple[str, ...]:
        """Doubts who is silent and settles who is known; the gateways that are silent."""
        for name in self._heartbeats.silent(now):
            launched = self.instances.get(name)
            if launched is not None and name not in self._asked:
                self._asked[name] = self.spawn(self._ask(name, launched))
        if self.book.settle(now):
            self.announce()
        return self._gateways.silent(now)

    def view(self) -> View:
        """What can be balanced: a newcomer that not everyone knows yet takes nothing."""
        known = self.roster.settled
        return View(
            self._clock.now(),
            tuple(
                InstanceView(
                    load,
                    device=self.instances[name].spec.device,
                    tensor_parallel=self.instances[name].spec.tensor_parallel,
                    pipeline_parallel=self.instances[name].spec.pipeline_parallel,
                )
                for name, load in sorted(self.loads.items())
                if name in known and name in self.instances
            ),
        )

    async def _ask(self, name: str, launched: Launched) -> None:
        """A silent instance that does not answer either is lost, whatever Ray thinks."""
        try:
            await answer(launched.workers[0].ping.remote(), self._config.limits.answer_s)
            if self.roster.find(name) is not None:
                self._heartbeats.heard(name, self._clock.now())
        except TandemError as error:
            launched.condemn(f"silent: {error}")
        finally:
            del self._asked[name]

    def _forget(self, name: str) -> None:
        self._heartbeats.forget(name)
        self.loads.pop(name, None)
        self._link.disconnect(name)
        self.book.leave(name)
        self.announce()

    def announce(self) -> None:
        for member in self.roster.of_kind(Kind.INSTANCE):
            self._link.connect(member.name, member.address)
        self._news.set()
        self._news = asyncio.Event()

    async def changed(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
        except TimeoutError:
            return
