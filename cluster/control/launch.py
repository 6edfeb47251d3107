"""Brings one instance up on Ray, all its workers or none, and takes it down again."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import NAMESPACE, answer, find_worker, worker_name
from cluster.control.placing import placed, wants_of
from cluster.instance.worker import Worker
from engine.errors import DeadlineExceeded, InstanceLost, TandemError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ray.util.placement_group import PlacementGroup

    from cluster.config import Config
    from cluster.control.balancing import Note
    from cluster.control.placing import Groups
    from cluster.instance.leading import Network
    from cluster.roster import InstanceSpec

log = logging.getLogger(__name__)

PROGRESS_S = 0.2
"""Between two looks at how far workers are."""
GONE_POLL_S = 0.05
GONE_S = 120.0
FINISH_S = 2.0
"""For a last step, and for what a worker has yet to write."""


@dataclass(slots=True, eq=False)
class Launched:
    """An instance's actors and the resources they stand on."""

    spec: InstanceSpec
    groups: Groups
    workers: list[Any] = field(default_factory=list)
    group: PlacementGroup | None = None
    stage: str = "placing"
    """placing, starting, loading, warming up, up or stopping; for the person who waits."""
    progress: float = 0.0
    """The share of the loading or of the warm-up that is done."""
    condemned: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Fails as soon as somebody knows better than Ray that the instance is lost."""

    dismissed: bool = False
    """Whether it is up and ends in order: it may yet finish what it has begun to write."""

    @property
    def shows_itself(self) -> bool:
        """Whether its leader may join; one that is taken down goes on asking for a while."""
        return self.stage in ("warming up", "up")

    def condemn(self, why: str) -> None:
        if not self.condemned.done():
            self.condemned.set_exception(InstanceLost(why))

    def dismiss(self, why: str) -> None:
        """Nothing is wrong with it, but its time is over."""
        self.dismissed = self.stage == "up"
        self.condemn(why)

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
        self.stage = "stopping"
        if self.dismissed:
            await self._let_finish()
        for worker in self.workers:
            ray.kill(worker)
        for rank in range(self.spec.workers):
            await _until_gone(self.spec.name, rank)
        self.groups.release(self.spec)

    async def _let_finish(self) -> None:
        finishing = asyncio.gather(*(worker.finish.remote() for worker in self.workers))
        try:
            await answer(finishing, FINISH_S)
        except (TandemError, RayError) as error:
            log.warning("instance does not finish instance=%s error=%s", self.spec.name, error)


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
            stage = instance.stage
            await instance.take_down()
            wanted = f" (wants {wants_of(instance.spec)})" if stage == "placing" else ""
            raise DeadlineExceeded(f"still {stage} after {limit_s:g} s{wanted}") from None
        except BaseException:
            await instance.take_down()
            raise

    async def _launch(self, instance: Launched) -> None:
        spec = instance.spec
        instance.group = instance.groups.hold(spec)
        if instance.group is not None:
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
    try:
        while not work.done():
            looks = (worker.progress.remote() for worker in instance.workers)
            instance.progress = min(await asyncio.gather(*looks))
            await asyncio.wait([work], timeout=PROGRESS_S)
        return work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def adopt(spec: InstanceSpec, groups: Groups) -> Launched:
    """An instance that was up before this controller was."""
    workers = [find_worker(spec.name, rank) for rank in range(spec.workers)]
    return Launched(spec, groups, workers, groups.adopt(spec), "up")
