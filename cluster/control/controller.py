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

from cluster.actors import answer
from cluster.config import Config
from cluster.control.balancing import Balancing
from cluster.control.keeper import LOOK_S, Keeper
from cluster.control.moves import REPLAYED, Moves
from cluster.control.pools import Ground, initial_specs, pool_spec
from cluster.control.recovery import recover
from cluster.control.replanning import PlannerProcess
from cluster.control.resharing import Resharing, move_away
from cluster.control.scaling import PolicyStatus, Scaling, Usage
from cluster.events import Event, EventLog
from cluster.gateway.journal import ARRIVING, COMMITTED
from cluster.roster import CONTROLLER, InstanceSpec, Kind, Member, Roster, next_name
from cluster.watching.logs import set_up_logging
from cluster.zmq_link import ZmqLink
from engine.clock import SystemClock
from engine.errors import BadRequest, InstanceLost, NotFound, TandemError
from engine.messages import InstanceState, Load, Migrate, Migrated, Role
from placement.scaling.allotment import expendable
from placement.scaling.signals import Phase, Unit

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cluster.control.policy_source import PolicyText
    from cluster.instance.leading import Network
    from engine.messages import Message

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance as the controller sees it; `load` is None until it has told one."""

    spec: InstanceSpec
    stage: str
    """A Launched's; without one it is waiting or, where `failure` says why, given up."""
    progress: float
    """Of the stage, where it has any."""
    member: Member | None
    load: Load | None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Scaled:
    started: tuple[str, ...]
    draining: tuple[str, ...]


def owner_of(request_id: str, loads: Mapping[str, Load]) -> str:
    """The instance that works on a request, and not one where it arrives or that it has left."""
    listed = [
        (running.state == COMMITTED, name)
        for name, load in loads.items()
        for running in load.sequences
        if running.request_id == request_id and running.state not in ARRIVING
    ]
    if not listed:
        raise NotFound(f"no instance runs {request_id}")
    return min(listed)[1]


class Controller:
    """Methods are called over Ray; each waits until a restarted controller has recovered."""

    def __init__(self, config: str, network: Network, ground: Ground) -> None:
        set_up_logging()
        self._config = Config.model_validate_json(config)
        self._ground, self._network = ground, network
        self._clock = SystemClock()
        self._events = EventLog()
        self._keeper = Keeper(self._config, network, self._note, self._clock)
        limits = self._config.limits
        self._resharing = Resharing(self._keeper, self._note, limits.drain_s, limits.start_s)
        self._recovered = asyncio.Event()
        self._balancing = Balancing(
            self._config.migration, self._keeper.view, self._send, self._note
        )
        self._moves = Moves()
        accelerators = {role: self._config.pools.of(role).workers for role in Role}
        planner = PlannerProcess(self._config)
        self._scaling = Scaling(self, accelerators, self._note, self._clock, planner)
        self._lease_until_s = self._clock.now() + self._config.limits.supervisor_lease_s
        self._main = asyncio.get_running_loop().create_task(self._run())

    # For members.

    async def sync(self, me: Member, known: int, wait_s: float) -> Roster:
        """Joins, tells what the member has carried out, and waits a while for news."""
        await self._recovered.wait()
        if me.kind is not Kind.GATEWAY and not self._keeper.admits(me.name):
            raise InstanceLost(f"{me.name} is not wanted any more")
        self._keeper.joins(me, known)
        if self._keeper.roster.version == known:
            await self._keeper.changed(wait_s)
        return self._keeper.roster

    async def renew(self) -> None:
        """The serve process lives; without this the cluster stops by itself."""
        self._lease_until_s = self._clock.now() + self._config.limits.supervisor_lease_s

    async def note(self, kind: str, subject: str, text: str, fields: dict[str, object]) -> None:
        """Something that a gateway saw."""
        if kind == "migration":
            self._balancing.ended(subject, text)
            self._moves.ended(subject, str(fields["target"]), text)
        elif (kind, text) == ("request", REPLAYED):
            self._moves.replayed(subject)
        self._note(kind, subject, text, **fields)

    async def gateway_lost(self, name: str) -> None:
        """Whoever keeps the gateway knows sooner than its silence would tell."""
        await self._recovered.wait()
        self._lose_gateway(name)

    def _lose_gateway(self, name: str) -> None:
        self._scaling.gateway_lost(name)
        self._keeper.lose_gateway(name)

    async def used(self, gateway: str, usage: Usage) -> None:
        """The load as a gateway sees it, for the autoscaler."""
        await self._recovered.wait()
        self._scaling.told(gateway, usage)

    # For the autoscaler.

    def units(self) -> tuple[Unit, ...]:
        """Every instance that takes accelerators now or is about to."""
        wanted = {spec.name for spec in self._keeper.roster.desired}
        return tuple(
            Unit(
                name,
                spec.role,
                spec.workers,
                self._phase(name, wanted),
                self._keeper.loads.get(name),
            )
            for name, spec in sorted(self._specs().items())
        )

    def _phase(self, name: str, wanted: Collection[str]) -> Phase:
        if name not in wanted:
            return Phase.DRAINING
        return Phase.READY if name in self._keeper.loads else Phase.STARTING

    def grow(self, role: Role) -> str:
        (name,) = self._start(role, 1)
        return name

    def _start(self, role: Role, count: int) -> tuple[str, ...]:
        """So many instances more."""
        others, started = self._specs(), list[InstanceSpec]()
        for _ in range(count):
            name = next_name(role, others)
            spec = pool_spec(self._config, self._ground, role, name, others.values())
            others[name] = self._resharing.of_newcomer(spec)
            started.append(others[name])
        self._keeper.desire((*self._keeper.roster.desired, *started))
        return tuple(spec.name for spec in started)

    def _specs(self) -> dict[str, InstanceSpec]:
        """Of every instance that is or should be."""
        specs = {spec.name: spec for spec in self._keeper.roster.desired}
        return specs | {name: one.spec for name, one in self._keeper.instances.items()}

    def retire(self, name: str) -> None:
        launched = self._keeper.instances.get(name)
        if launched is not None and launched.stage == "up":
            self._keeper.spawn(self._empty(name))
            return
        self._keeper.unwant(name)
        if launched is not None:
            launched.condemn("not wanted any more")

    async def _empty(self, name: str) -> None:
        """It may die at that very moment, which is no reason for the controller to die too."""
        try:
            await self.drain(name)
        except TandemError as error:
            self._note("scale", name, "not drained", reason=str(error))

    def turn(self, name: str, role: Role) -> None:
        self._keeper.spawn(self._turn(name, role))

    async def _turn(self, name: str, role: Role) -> None:
        try:
            await self.set_role(name, role)
        except TandemError as error:
            self._note("scale", name, "not switched", reason=str(error))

    def sm_shares(self) -> dict[Role, float]:
        return self._resharing.shares

    def reshare(self, shares: Mapping[Role, float]) -> None:
        self._keeper.spawn(self._resharing.carry_out(shares))

    # For operators.

    async def report(self) -> tuple[InstanceReport, ...]:
        """Every instance that is or should be; raises if the model cannot be served at all."""
        if self._keeper.fatal is not None:
            raise self._keeper.fatal
        await self._recovered.wait()
        return tuple(self._report_of(spec) for _, spec in sorted(self._specs().items()))

    def _report_of(self, spec: InstanceSpec) -> InstanceReport:
        keeper, name = self._keeper, spec.name
        launched, failure = keeper.instances.get(name), keeper.given_up.get(name)
        member, load = keeper.roster.find(name), keeper.loads.get(name)
        if launched is not None:
            return InstanceReport(spec, launched.stage, launched.progress, member, load)
        stage = "waiting" if failure is None else "given up"
        return InstanceReport(spec, stage, 0.0, member, load, failure)

    async def events(self, after: int, wait_s: float) -> tuple[Event, ...]:
        return await self._events.wait_after(after, wait_s)

    async def last_event(self) -> int:
        return self._events.last

    async def scale(self, role: Role, instances: int) -> Scaled:
        """Starts or drains as many as it takes; returns at once."""
        await self._recovered.wait()
        standing = expendable(self.units(), role)
        missing = instances - len(standing)
        if missing >= 0:
            return Scaled(self._start(role, missing), ())
        surplus = tuple(unit.name for unit in standing[:-missing])
        for name in surplus:
            self.retire(name)
        return Scaled((), surplus)

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
        launched = self._keeper.up(name)
        if not self._keeper.wants(name):
            raise BadRequest("instance", name, "is about to stop")
        await answer(launched.workers[0].set_role.remote(role), self._config.limits.answer_s)
        launched.spec = replace(launched.spec, role=role)
        self._keeper.change(launched.spec)
        self._note("instance", name, "role changed", role=role.value)

    async def drain(self, name: str) -> None:
        """Moves its requests away and stops it; returns when it is gone or its time is up."""
        await self._recovered.wait()
        launched = self._keeper.up(name)
        self._keeper.unwant(name)
        self._note("instance", name, "draining")
        await move_away(self._keeper, launched, self._config.limits.drain_s, "drained")

    async def migrate(self, request_id: str, target: str, *, wait: bool) -> tuple[str, str]:
        """Asks the owner to move a request, and may wait until it has; gives source and target."""
        await self._recovered.wait()
        self._keeper.up(target)
        source = owner_of(request_id, self._keeper.loads)
        if source == target:
            raise BadRequest("instance", target, f"runs {request_id} already")

        def ask() -> None:
            self._link.send(source, Migrate(request_id, target, "operator"))

        if wait:
            await self._moves.over(request_id, target, ask, self._config.limits.drain_s)
        else:
            ask()
        return source, target

    async def shut_down(self) -> None:
        """Stops every instance; the streams must have ended before."""
        self._scaling.close()
        await self._keeper.all_gone()

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
        wanted = initial_specs(self._config, self._ground)
        found = await recover(wanted, self._keeper.groups, self._clock.now())
        async with asyncio.TaskGroup() as tasks:
            self._keeper.begin(found, me, self._link, tasks, self._scaling)
            self._recovered.set()
            tasks.create_task(self._listen())
            tasks.create_task(self._look())
            tasks.create_task(self._balancing.run())
            tasks.create_task(self._scaling.run())

    async def _listen(self) -> None:
        while True:
            sender, message = await self._link.receive()
            if isinstance(message, Migrated):
                self._not_moved(message)
            heard = isinstance(message, Load) and self._keeper.heard(sender, message)
            if heard and self._keeper.loads[sender].state is InstanceState.DRAINING:
                self._balancing.empty()

    def _not_moved(self, message: Migrated) -> None:
        """An instance that does not have the request does not know its gateway either."""
        request_id, outcome = message.request_id, message.outcome
        self._balancing.ended(request_id, outcome)
        self._moves.ended(request_id, message.target, outcome)
        route = {"source": message.source, "target": message.target}
        self._note("migration", request_id, outcome, **route, reason=message.reason)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._clock.now()
            for gateway in self._keeper.look(now):
                self._lose_gateway(gateway)
            if now > self._lease_until_s:
                self._lease_until_s = float("inf")
                log.error("the serve process has vanished: shutting down")
                self._keeper.spawn(self._abandon())

    async def _abandon(self) -> None:
        await self.shut_down()
        os._exit(0)

    def _send(self, to: str, message: Message) -> None:
        self._link.send(to, message)

    def _note(self, kind: str, subject: str, text: str, **fields: object) -> None:
        pairs = " ".join(f"{name}={value}" for name, value in fields.items())
        log.info("%s %s=%s %s", text, kind, subject, pairs)
        self._events.add(self._clock.now(), kind, subject, text, **fields)
