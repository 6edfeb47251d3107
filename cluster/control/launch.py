"""Brings one instance up on Ray, all its workers or none, and takes it down again."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError
from ray.util import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import NAMESPACE, find_worker, worker_name
from cluster.instance.worker import Worker
from engine.errors import DeadlineExceeded, InstanceLost

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ray.util.placement_group import PlacementGroup

    from cluster.config import Config
    from cluster.control.balancing import Note
    from cluster.instance.leading import Network
    from cluster.roster import InstanceSpec

log = logging.getLogger(__name__)

PROGRESS_S = 0.2
"""Between two looks at how far workers are."""
GROUP_PREFIX = "tandem-"
GONE_POLL_S = 0.05
GONE_S = 120.0
OBSTACLES = {
    "NO_RESOURCES": "others use what it wants",
    "INFEASIBLE": "no node has what it wants",
}
"""What Ray finds in the way of a placement group, at its first attempt."""


@dataclass(slots=True, eq=False)
class Launched:
    """An instance's actors and the resources they stand on."""

    spec: InstanceSpec
    workers: list[Any] = field(default_factory=list)
    group: PlacementGroup | None = None
    stage: str = "placing"
    """placing, starting, loading, warming up or up; for the person who waits."""
    progress: float = 0.0
    """The share of the loading or of the warm-up that is done."""
    condemned: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Fails as soon as somebody knows better than Ray that the instance is lost."""

    def condemn(self, why: str) -> None:
        if not self.condemned.done():
            self.condemned.set_exception(InstanceLost(why))

    async def ended(self) -> None:
        """Returns when a worker has stopped; raises InstanceLost when one is gone."""
        await self.unless_condemned(*(_ended(worker) for worker in self.workers))

    async def unless_condemned(self, *works: Coroutine[None, None, None]) -> None:
        """Waits for the first of the works, or raises as soon as the instance is condemned."""
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, _ = await asyncio.wait(
                [*tasks, self.condemned], return_when=asyncio.FIRST_COMPLETED
            )
            for one in done:
                one.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def take_down(self) -> None:
        """Kills what is left of the instance and waits until Ray has forgotten it."""
        for worker in self.workers:
            ray.kill(worker)
        for rank in range(self.spec.workers):
            await _until_gone(self.spec.name, rank)
        if self.group is not None:
            remove_placement_group(self.group)


async def _ended(worker: Any) -> None:
    try:
        await worker.ended.remote()
    except RayActorError as error:
        raise InstanceLost(str(error).splitlines()[0]) from error


async def _until_gone(instance: str, rank: int) -> None:
    """A name can be given again only after its former bearer is dead."""
    for _ in range(int(GONE_S / GONE_POLL_S)):
        try:
            find_worker(instance, rank)
        except InstanceLost:
            return
        await asyncio.sleep(GONE_POLL_S)
    raise DeadlineExceeded(f"{worker_name(instance, rank)} does not die")


def group_name(instance: str) -> str:
    return f"{GROUP_PREFIX}{instance}"


async def remove_groups_but(instances: set[str]) -> None:
    """Frees what a dead controller reserved for instances that it did not bring up."""
    kept = {group_name(instance) for instance in instances}
    names = {group["name"] for group in placement_group_table().values()}
    left = {name for name in names - kept if name.startswith(GROUP_PREFIX)}
    for name in sorted(left):
        await _remove_group(name)


async def _remove_group(name: str) -> None:
    """Returns when the name can be given again; Ray also lists groups that are long gone."""
    removed = False
    for _ in range(int(GONE_S / GONE_POLL_S)):
        try:
            group = get_placement_group(name)
        except ValueError:
            return
        if not removed:
            log.warning("leftover removed placement_group=%s", name)
            remove_placement_group(group)
            removed = True
        await asyncio.sleep(GONE_POLL_S)
    raise DeadlineExceeded(f"placement group {name} is not removed")


def stage_bundles(spec: InstanceSpec) -> list[dict[str, float]]:
    """A bundle per pipeline stage: Ray keeps a bundle on one node, and stages may part."""
    worker = {name: amount for name, amount in spec.resources if amount > 0}
    stage = {name: amount * spec.tensor_parallel for name, amount in worker.items()}
    return [stage] * spec.pipeline_parallel


async def placed(group: PlacementGroup, spec: InstanceSpec, note: Note) -> None:
    """Returns once the group has its place. What is in the way is told as soon as it is known, and
    waited for: others may end, or a node may join."""
    ready = asyncio.ensure_future(group.ready())
    told = ""
    try:
        while not ready.done():
            found = await asyncio.to_thread(placement_group_table, group)
            obstacle = OBSTACLES.get(found["stats"]["scheduling_state"], told)
            if obstacle != told:
                told = obstacle
                wants = ", ".join(f"{name}={amount:g}" for name, amount in spec.resources)
                note("instance", spec.name, "has no place", reason=told, wants=wants)
            await asyncio.wait([ready], timeout=PROGRESS_S)
        await ready
    finally:
        ready.cancel()


class Launcher:
    def __init__(self, config: Config, network: Network, note: Note) -> None:
        self._config, self._network, self._note = config, network, note

    async def launch(self, instance: Launched) -> None:
        """Fills `instance` in as it comes up; on failure nothing of it is left."""
        limit_s = self._config.limits.start_s
        try:
            async with asyncio.timeout(limit_s):
                await self._launch(instance)
        except TimeoutError:
            await instance.take_down()
            wanted = dict(instance.spec.resources) if instance.stage == "placing" else ""
            raise DeadlineExceeded(f"still {instance.stage} after {limit_s:g} s {wanted}") from None
        except BaseException:
            await instance.take_down()
            raise

    async def _launch(self, instance: Launched) -> None:
        spec = instance.spec
        if bundles := stage_bundles(spec):
            strategy = "STRICT_PACK" if spec.pipeline_parallel == 1 else "PACK"
            instance.group = placement_group(
                bundles, strategy=strategy, name=group_name(spec.name), lifetime="detached"
            )
            await placed(instance.group, spec, self._note)
        instance.stage = "starting"
        for rank in range(spec.workers):
            instance.workers.append(self._actor(instance, rank))
        leader, *followers = instance.workers
        meeting = await leader.meeting.remote() if followers else ""
        instance.stage = "loading"
        loads = asyncio.gather(*(worker.load.remote(meeting) for worker in instance.workers))
        seats = await _watched(loads, instance)
        for follower in followers:
            await follower.follow.remote()
        instance.stage, instance.progress = "warming up", 0.0
        await _watched(asyncio.ensure_future(leader.warm_up.remote()), instance)
        await leader.lead.remote(tuple(seats))
        instance.stage = "up"

    def _actor(self, instance: Launched, rank: int) -> Any:
        spec = instance.spec
        resources = dict(spec.resources)
        options: dict[str, Any] = {}
        if instance.group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                instance.group, placement_group_bundle_index=rank // spec.tensor_parallel
            )
        actor = ray.remote(Worker).options(
            name=worker_name(spec.name, rank),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            memory=resources.pop("memory", None),
            resources=resources,
            **options,
        )
        return actor.remote(self._config.model_dump_json(), spec, rank, self._network)


async def _watched(work: asyncio.Future[Any], instance: Launched) -> Any:
    """The work's result; meanwhile its slowest worker tells how far it is."""
    while not work.done():
        shares = await asyncio.gather(*(worker.progress.remote() for worker in instance.workers))
        instance.progress = min(shares)
        await asyncio.wait([work], timeout=PROGRESS_S)
    return work.result()


def adopt(spec: InstanceSpec) -> Launched:
    """An instance that was up before this controller was."""
    workers = [find_worker(spec.name, rank) for rank in range(spec.workers)]
    group = get_placement_group(group_name(spec.name)) if stage_bundles(spec) else None
    return Launched(spec, workers, group, "up")
