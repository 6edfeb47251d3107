"""The detached actor that keeps the cluster as it was asked to be.

It owns no request and no token: when it dies, streams go on, and its successor learns what
there is from the instances themselves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from cluster.actors import answer
from cluster.config import Config
from cluster.control.balancing import Balancing
from cluster.control.launch import Launched, Launcher
from cluster.control.liveness import Heartbeats, RestartBudget
from cluster.control.pools import Ground, initial_specs, pool_spec
from cluster.control.recovery import Recovered, recover
from cluster.control.replanning import PlannerProcess
from cluster.control.scaling import PolicyStatus, Scaling, Usage
from cluster.events import Event, EventLog
from cluster.roster import CONTROLLER, InstanceSpec, Kind, Member, Roster, RosterBook, next_name
from cluster.watching.logs import set_up_logging
from cluster.zmq_link import ZmqLink
from engine.clock import SystemClock
from engine.errors import BadInput, BadRequest, InstanceLost, NotFound, TandemError
from engine.messages import InstanceState, Load, Migrate, Role
from placement.scaling.signals import Phase, Unit
from placement.view import InstanceView, View

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterable

    from cluster.control.policy_source import PolicyText
    from cluster.instance.leading import Network
    from engine.messages import Message

log = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between two looks at heartbeats and newcomers."""


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance as the controller sees it; `load` is None until it has told one."""

    spec: InstanceSpec
    stage: str
    progress: float
    """Of the stage, where it has any."""
    member: Member | None
    load: Load | None


@dataclass(frozen=True, slots=True)
class Scaled:
    started: tuple[str, ...]
    draining: tuple[str, ...]


class Controller:
    """Methods are called over Ray; each waits until a restarted controller has recovered."""

    def __init__(self, config: str, network: Network, ground: Ground) -> None:
        set_up_logging()
        self._config = Config.model_validate_json(config)
        self._ground, self._network = ground, network
        self._clock = SystemClock()
        self._events = EventLog()
        self._launcher = Launcher(self._config, network)
        self._instances: dict[str, Launched] = {}
        self._loads: dict[str, Load] = {}
        self._heartbeats = Heartbeats(self._config.limits.silence_s)
        self._gateways = Heartbeats(self._config.limits.gateway_silence_s)
        self._budgets: dict[str, RestartBudget] = {}
        self._book = RosterBook(Roster(0))
        self._news = asyncio.Event()
        self._recovered = asyncio.Event()
        self._fatal: BadInput | None = None
        self._balancing = Balancing(self._config.migration, self._view, self._send, self._note)
        accelerators = {role: self._config.pools.of(role).workers for role in Role}
        planner = PlannerProcess(self._config)
        self._scaling = Scaling(self, accelerators, self._note, self._clock, planner)
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._lease_until_s = self._clock.now() + self._config.limits.supervisor_lease_s
        self._main = asyncio.get_running_loop().create_task(self._run())

    # For members.

    async def sync(self, me: Member, known: int, wait_s: float) -> Roster:
        """Joins, tells what the member has carried out, and waits a while for news."""
        await self._recovered.wait()
        now = self._clock.now()
        self._book.heard(me.name, known)
        if me.kind is Kind.GATEWAY:
            self._gateways.heard(me.name, now)
        elif me.name not in self._instances:
            raise InstanceLost(f"{me.name} is not wanted any more")
        if self._book.join(me, now):
            self._events.add(now, me.kind.value, me.name, "joined", address=me.address)
            self._announce()
        if self._book.roster.version == known:
            await self._changed(wait_s)
        return self._book.roster

    async def renew(self) -> None:
        """The serve process lives; without this the cluster stops by itself."""
        self._lease_until_s = self._clock.now() + self._config.limits.supervisor_lease_s

    async def note(self, kind: str, subject: str, text: str, fields: dict[str, object]) -> None:
        """Something that a gateway saw."""
        if kind == "migration":
            self._balancing.ended(subject, text)
        self._note(kind, subject, text, **fields)

    async def gateway_lost(self, name: str) -> None:
        """Whoever keeps the gateway knows sooner than its silence would tell."""
        await self._recovered.wait()
        self._lose_gateway(name)

    def _lose_gateway(self, name: str) -> None:
        self._gateways.forget(name)
        self._scaling.gateway_lost(name)
        if self._book.leave(name):
            self._note("gateway", name, "lost")
            self._announce()

    async def used(self, gateway: str, usage: Usage) -> None:
        """The load as a gateway sees it, for the autoscaler."""
        await self._recovered.wait()
        self._scaling.told(gateway, usage)

    # For the autoscaler.

    def units(self) -> tuple[Unit, ...]:
        """Every instance that takes accelerators now or is about to."""
        wanted = {spec.name: spec for spec in self._book.roster.desired}
        specs = wanted | {name: one.spec for name, one in self._instances.items()}
        return tuple(
            Unit(name, spec.role, spec.workers, self._phase(name, wanted), self._loads.get(name))
            for name, spec in sorted(specs.items())
        )

    def _phase(self, name: str, wanted: Collection[str]) -> Phase:
        if name not in wanted:
            return Phase.DRAINING
        return Phase.READY if name in self._loads else Phase.STARTING

    def grow(self, role: Role) -> str:
        taken = [*self._instances, *(spec.name for spec in self._book.roster.desired)]
        spec = pool_spec(self._config, self._ground, role, next_name(role, taken))
        self._desire((*self._book.roster.desired, spec))
        return spec.name

    def retire(self, name: str) -> None:
        launched = self._instances.get(name)
        if launched is not None and launched.stage == "up":
            self._spawn(self._empty(name))
            return
        self._unwant(name)
        if launched is not None:
            launched.condemn("not wanted any more")

    async def _empty(self, name: str) -> None:
        """It may die at that very moment, which is no reason for the controller to die too."""
        try:
            await self.drain(name)
        except TandemError as error:
            self._note("scale", name, "not drained", reason=str(error))

    def turn(self, name: str, role: Role) -> None:
        self._spawn(self._turn(name, role))

    async def _turn(self, name: str, role: Role) -> None:
        try:
            await self.set_role(name, role)
        except TandemError as error:
            self._note("scale", name, "not switched", reason=str(error))

    # For operators.

    async def report(self) -> tuple[InstanceReport, ...]:
        """Every instance that is or should be; raises if the model cannot be served at all."""
        if self._fatal is not None:
            raise self._fatal
        await self._recovered.wait()
        specs = {spec.name: spec for spec in self._book.roster.desired}
        specs |= {name: instance.spec for name, instance in self._instances.items()}
        return tuple(
            InstanceReport(
                specs[name],
                self._instances[name].stage if name in self._instances else "waiting",
                self._instances[name].progress if name in self._instances else 0.0,
                self._book.roster.find(name),
                self._loads.get(name),
            )
            for name in sorted(specs)
        )

    async def events(self, after: int, wait_s: float) -> tuple[Event, ...]:
        return await self._events.wait_after(after, wait_s)

    async def last_event(self) -> int:
        return self._events.last

    async def scale(self, role: Role, instances: int) -> Scaled:
        """Starts or drains as many as it takes; returns at once."""
        await self._recovered.wait()
        wanted = [spec for spec in self._book.roster.desired if spec.role is role]
        if instances < len(wanted):
            surplus = tuple(spec.name for spec in wanted[instances:])
            for name in surplus:
                self.retire(name)
            return Scaled((), surplus)
        started: list[InstanceSpec] = []
        for _ in range(instances - len(wanted)):
            taken = [*self._instances, *(s.name for s in self._book.roster.desired)]
            name = next_name(role, [*taken, *(spec.name for spec in started)])
            started.append(pool_spec(self._config, self._ground, role, name))
        self._desire((*self._book.roster.desired, *started))
        return Scaled(tuple(spec.name for spec in started), ())

    async def apply_policy(self, policy: PolicyText) -> list[str]:
        """From now on the autoscaler follows this policy; what changes, a line each."""
        await self._recovered.wait()
        return self._scaling.apply(policy)

    async def policy(self) -> PolicyStatus | None:
        """What is in force; None while nothing is."""
        await self._recovered.wait()
        return self._scaling.status

    async def set_role(self, name: str, role: Role) -> None:
        await self._recovered.wait()
        launched = self._up(name)
        await answer(launched.workers[0].set_role.remote(role), self._config.limits.answer_s)
        launched.spec = replace(launched.spec, role=role)
        others = [spec for spec in self._book.roster.desired if spec.name != name]
        self._desire((*others, launched.spec))
        self._note("instance", name, "role changed", role=role.value)

    async def drain(self, name: str) -> None:
        """Moves its requests away and stops it; returns when it is gone or its time is up."""
        await self._recovered.wait()
        launched = self._up(name)
        self._unwant(name)
        self._note("instance", name, "draining")
        limit_s = self._config.limits.drain_s
        try:
            await answer(launched.workers[0].drain.remote(), limit_s)
        except TandemError as error:
            log.warning("drain incomplete instance=%s error=%s", name, error)
        launched.condemn("drained")

    async def migrate(self, request_id: str, target: str) -> tuple[str, str]:
        """Asks the request's owner to move it; returns the source and the target."""
        await self._recovered.wait()
        self._up(target)
        for source, load in sorted(self._loads.items()):
            if any(running.request_id == request_id for running in load.sequences):
                if source == target:
                    raise BadRequest("instance", target, f"runs {request_id} already")
                self._link.send(source, Migrate(request_id, target, "operator"))
                return source, target
        raise NotFound(f"no instance runs {request_id}")

    async def shut_down(self) -> None:
        """Stops every instance; the streams must have ended before."""
        self._scaling.close()
        self._desire(())
        for launched in self._instances.values():
            launched.condemn("shut down")
        while self._instances:
            await self._changed(LOOK_S)

    # Keeping the cluster.

    async def _run(self) -> None:
        """The process's boundary: a controller that breaks makes room for its successor."""
        try:
            await self._keep_all()
        except Exception:
            log.exception("controller failed")
            os._exit(1)

    async def _keep_all(self) -> None:
        self._link = ZmqLink(
            CONTROLLER, self._network.bind(CONTROLLER), self._network.key, self._config.limits.links
        )
        me = Member(CONTROLLER, Kind.CONTROLLER, uuid.uuid4().hex, self._link.address)
        specs = initial_specs(self._config, self._ground)
        found = await recover(specs, self._clock.now())
        self._book = RosterBook(found.roster)
        self._book.join(me, self._clock.now())
        async with asyncio.TaskGroup() as self._tasks:
            self._adopt(found)
            self._recovered.set()
            self._desire(self._book.roster.desired)
            self._tasks.create_task(self._listen())
            self._tasks.create_task(self._look())
            self._tasks.create_task(self._balancing.run())
            self._tasks.create_task(self._scaling.run())

    def _adopt(self, found: Recovered) -> None:
        for launched in found.instances:
            self._instances[launched.spec.name] = launched
            self._heartbeats.heard(launched.spec.name, self._clock.now())
            self._spawn(self._keep(launched))
        for gateway in self._book.roster.of_kind(Kind.GATEWAY):
            self._gateways.heard(gateway.name, self._clock.now())
        for member in self._book.roster.of_kind(Kind.INSTANCE):
            self._link.connect(member.name, member.address)

    async def _keep(self, launched: Launched) -> None:
        """An instance from its start to its end; the next one is started by `_desire`."""
        name = launched.spec.name
        try:
            if launched.stage != "up":
                await launched.unless_condemned(self._launcher.launch(launched))
                self._note("instance", name, "up", role=launched.spec.role.value)
                self._scaling.up(name)
            await launched.ended()
            self._note("instance", name, "stopped")
        except (TandemError, RayError, TimeoutError) as error:
            self._ended_by(launched, error)
            if self._scaling.failed(name):
                self._unwant(name)
        self._forget(name)
        await launched.take_down()
        del self._instances[name]
        self._announce()
        if any(spec.name == name for spec in self._book.roster.desired):
            await self._restart(name)

    def _ended_by(self, launched: Launched, error: Exception) -> None:
        name = launched.spec.name
        cause = getattr(error, "cause", error)
        if isinstance(cause, BadInput) and launched.stage != "up":
            self._fatal = cause
        wanted = any(spec.name == name for spec in self._book.roster.desired)
        text = "lost" if wanted else "stopped"
        self._note("instance", name, text, reason=str(cause).splitlines()[0])

    async def _restart(self, name: str) -> None:
        limits = self._config.limits
        budget = self._budgets.setdefault(
            name, RestartBudget(limits.restarts, limits.restart_window_s)
        )
        pause_s = budget.take(self._clock.now())
        if pause_s is None or self._fatal is not None:
            self._note("instance", name, "given up", restarts=limits.restarts)
            return
        await asyncio.sleep(pause_s)
        self._note("instance", name, "restarting")
        self._desire(self._book.roster.desired)

    def _desire(self, specs: Iterable[InstanceSpec]) -> None:
        """From now on these instances are wanted; those that are missing are started."""
        self._book.desire(specs)
        for spec in self._book.roster.desired:
            if spec.name not in self._instances:
                launched = Launched(spec)
                self._instances[spec.name] = launched
                self._spawn(self._keep(launched))
        self._announce()

    def _unwant(self, name: str) -> None:
        self._desire(spec for spec in self._book.roster.desired if spec.name != name)

    async def _listen(self) -> None:
        while True:
            sender, message = await self._link.receive()
            # What an instance said before its end may be read after it: that is no sign of life.
            if isinstance(message, Load) and self._book.roster.find(sender) is not None:
                self._heartbeats.heard(sender, self._clock.now())
                self._loads[sender] = message
                if message.state is InstanceState.DRAINING:
                    self._balancing.empty()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._clock.now()
            for name in self._heartbeats.silent(now):
                launched = self._instances.get(name)
                if launched is not None and name not in self._asked:
                    self._asked[name] = self._spawn(self._ask(name, launched))
            for gateway in self._gateways.silent(now):
                self._lose_gateway(gateway)
            if self._book.settle(now):
                self._announce()
            if now > self._lease_until_s:
                self._lease_until_s = float("inf")
                log.error("the serve process has vanished: shutting down")
                self._spawn(self._abandon())

    async def _ask(self, name: str, launched: Launched) -> None:
        """A silent instance that does not answer either is lost, whatever Ray thinks."""
        try:
            await answer(launched.workers[0].ping.remote(), self._config.limits.answer_s)
            if self._book.roster.find(name) is not None:
                self._heartbeats.heard(name, self._clock.now())
        except TandemError as error:
            launched.condemn(f"silent: {error}")
        finally:
            del self._asked[name]

    async def _abandon(self) -> None:
        await self.shut_down()
        os._exit(0)

    def _view(self) -> View:
        """What can be balanced: a newcomer that not everyone knows yet takes nothing."""
        known = self._book.roster.settled
        return View(
            self._clock.now(),
            tuple(
                InstanceView(
                    load,
                    device=self._instances[name].spec.device,
                    tensor_parallel=self._instances[name].spec.tensor_parallel,
                    pipeline_parallel=self._instances[name].spec.pipeline_parallel,
                )
                for name, load in sorted(self._loads.items())
                if name in known and name in self._instances
            ),
        )

    def _send(self, to: str, message: Message) -> None:
        self._link.send(to, message)

    def _forget(self, name: str) -> None:
        self._heartbeats.forget(name)
        self._loads.pop(name, None)
        self._link.disconnect(name)
        self._book.leave(name)
        self._announce()

    def _announce(self) -> None:
        for member in self._book.roster.of_kind(Kind.INSTANCE):
            self._link.connect(member.name, member.address)
        self._news.set()
        self._news = asyncio.Event()

    async def _changed(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
        except TimeoutError:
            return

    def _up(self, name: str) -> Launched:
        launched = self._instances.get(name)
        if launched is None or launched.stage != "up":
            raise NotFound(f"no instance {name} is up")
        return launched

    def _note(self, kind: str, subject: str, text: str, **fields: object) -> None:
        pairs = " ".join(f"{name}={value}" for name, value in fields.items())
        log.info("%s %s=%s %s", text, kind, subject, pairs)
        self._events.add(self._clock.now(), kind, subject, text, **fields)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(work)
