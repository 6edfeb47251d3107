"""Rank 0 of an instance: the host, its link, and what it does about the rest of the cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cluster.actors import PULL_ANSWER_S, ControllerSync, answer, find_worker
from cluster.instance.draining import Emptying
from cluster.instance.host import Host, HostSettings
from cluster.instance.instance import Instance
from cluster.instance.mover import InstanceMover
from cluster.membership import Membership, listeners
from cluster.roster import Kind, Member
from cluster.settings import instance_settings
from cluster.zmq_link import ZmqLink
from engine.blocks import BlockPool
from engine.clock import SystemClock
from engine.errors import InstanceLost, TandemError

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.instance.mover import Rank
    from cluster.instance.rank import LoadedRank
    from cluster.instance.worker import Worker
    from cluster.roster import InstanceSpec, Roster, Seat
    from cluster.zmq_link import ClusterKey
    from engine.batch import Executor
    from engine.messages import Role
    from kvtransfer.transfer import PullOrder

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
SETTLE_S = 1.0
"""How long a drained instance must have been empty."""


@dataclass(frozen=True, slots=True)
class Network:
    """Where links are bound: a directory of socket files, or TCP with the cluster's key."""

    directory: str | None
    key: ClusterKey | None

    def bind(self, name: str) -> str:
        if self.directory is None:
            return f"tcp://{ray.util.get_node_ip_address()}:*"
        return f"ipc://{self.directory}/{name}-{os.getpid()}"


class RemoteRank:
    """Another worker of this instance; if it is gone, so is the instance."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def pull(self, order: PullOrder) -> None:
        await answer(self._actor.pull.remote(order), PULL_ANSWER_S)

    async def cancel(self, transfer: str) -> None:
        await answer(self._actor.cancel.remote(transfer), PULL_ANSWER_S)


class Leading:
    """Follows the roster for the whole instance."""

    def __init__(
        self,
        config: Config,
        spec: InstanceSpec,
        loaded: LoadedRank,
        *,
        executor: Executor,
        seats: tuple[Seat, ...],
        network: Network,
    ) -> None:
        self._config, self._spec = config, spec
        self._loaded, self._executor = loaded, executor
        self._clock = SystemClock()
        self._others = [find_worker(spec.name, rank) for rank in range(1, spec.workers)]
        self._link = ZmqLink(spec.name, network.bind(spec.name), network.key, config.limits.links)
        me = Member(spec.name, Kind.INSTANCE, uuid.uuid4().hex, self._link.address, spec, seats)
        sync = ControllerSync(config.limits.controller_s)
        self.membership = Membership(me, self._link, self, sync)
        self._host: Host | None = None
        self._worker: Worker | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._meetings: dict[str, asyncio.Lock] = {}

    async def run(self, worker: Worker) -> None:
        self._worker = worker
        pool = BlockPool(
            self._loaded.blocks,
            self._config.engine.block_tokens,
            cache_prefixes=self._config.engine.cache_prefixes,
        )
        instance = Instance(
            self._spec.name,
            self._spec.role,
            pool,
            self._loaded.runner.layout,
            settings=instance_settings(self._config),
            eos=self._loaded.checkpoint.eos_token_ids,
        )
        limits = self._config.limits
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            remote = [RemoteRank(actor) for actor in self._others]
            ranks: list[Rank] = [self._loaded.mover, *remote]
            self._host = Host(
                instance,
                executor=self._executor,
                link=self._link,
                mover=InstanceMover(ranks, tasks),
                clock=self._clock,
                settings=HostSettings(heartbeat_s=limits.heartbeat_s, pass_s=limits.pass_s),
            )
            tasks.create_task(self._host.run())
            tasks.create_task(self.membership.run())

    async def drain(self) -> None:
        """Returns once every request has ended or moved away, nobody reads from here, and nothing
        more has come for a while."""
        self._hosted.instance.drain()
        emptying = Emptying(SETTLE_S)
        while not emptying.is_over(self._hosted.instance.load(), self._clock.now()):
            self._hosted.pump()
            await asyncio.sleep(DRAIN_POLL_S)

    def set_role(self, role: Role) -> None:
        self._hosted.instance.set_role(role)
        self._hosted.pump()

    def close(self) -> None:
        self._link.close()

    # Following the roster.

    async def joined(self, member: Member) -> None:
        """A new instance's pools become reachable from every rank of this one."""
        if member.spec is None:
            return
        assert self._worker is not None
        name, workers = member.name, member.spec.workers
        async with self._in_order(name):
            calls = [actor.meet.remote(name, workers) for actor in self._others]
            try:
                await self._worker.meet(name, workers)
                for call in calls:
                    await answer(call, PULL_ANSWER_S)
            except TandemError as error:
                # If it died, the roster will say so; else the next pull meets it.
                log.warning("no way to peer=%s me=%s error=%s", name, self._spec.name, error)

    def lost(self, member: Member) -> None:
        self._hosted.lost(member.name)
        if member.spec is not None and self._tasks is not None:
            self._tasks.create_task(self._part(member.name, member.spec.workers))

    def updated(self, roster: Roster) -> None:
        self._hosted.tell(listeners(roster, self._spec.name))

    async def _part(self, instance: str, ranks: int) -> None:
        assert self._worker is not None
        async with self._in_order(instance):
            calls = [actor.part.remote(instance, ranks) for actor in self._others]
            await self._worker.part(instance, ranks)
            for call in calls:
                await answer(call, PULL_ANSWER_S)

    def _in_order(self, instance: str) -> asyncio.Lock:
        """Parting from an instance is over before its successor is met."""
        return self._meetings.setdefault(instance, asyncio.Lock())

    @property
    def _hosted(self) -> Host:
        if self._host is None:
            raise InstanceLost(f"{self._spec.name} is not up")
        return self._host
