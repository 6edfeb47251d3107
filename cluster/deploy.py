"""Brings a deployment up, keeps it up until told to end, and takes everything down again."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from cluster.actors import CONTROLLER_NAME, NAMESPACE, answer
from cluster.cli.progress import show_progress
from cluster.collector import spare_what_is_loaded
from cluster.control.controller import Controller
from cluster.control.pools import Ground
from cluster.gateway.companions import Companions
from cluster.gateway.front import Front, read_model
from cluster.instance.leading import Network
from cluster.policy_file import starting_policy
from cluster.ray_session import choose_device, start_ray
from cluster.zmq_link import ClusterKey
from engine.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.config import Config
    from cluster.gateway.front import Model
    from cluster.ray_session import RaySession

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 6
"""How often in a lease the serve process shows that it lives."""
SHUT_DOWN_S = 150.0
ENDINGS = (signal.SIGINT, signal.SIGTERM)


def serve(config: Config, address: str | None, say_ready: Callable[[str], None]) -> None:
    """Blocks until SIGINT or SIGTERM; `say_ready` is given the line for standard output."""
    starting_policy(config.autoscaling.policy)
    with ExitStack() as undo:
        reading = read_model(config)
        session = start_ray(address)
        undo.callback(session.stop)
        network = open_network(session, undo)
        ground = Ground(choose_device(config, session), session.owned)
        controller = start_controller(config, network, ground)
        undo.callback(stop_controller, controller)
        import uvloop

        deployment = _Deployment(config, network, controller, say_ready)
        try:
            uvloop.run(deployment.run(reading.result()))
        except ExceptionGroup as group:
            raise _first_cause(group) from group


def _first_cause(group: ExceptionGroup[Exception]) -> Exception:
    """What broke first; its companions were cancelled because of it."""
    first = group.exceptions[0]
    return _first_cause(first) if isinstance(first, ExceptionGroup) else first


def open_network(session: RaySession, undo: ExitStack) -> Network:
    """Socket files in a private directory on a Ray of our own, encrypted TCP on any other."""
    if not session.owned:
        return Network(None, ClusterKey.generate())
    directory = Path(tempfile.mkdtemp(prefix="tandem-"))
    undo.callback(shutil.rmtree, directory, ignore_errors=True)
    return Network(str(directory), None)


def start_controller(config: Config, network: Network, ground: Ground) -> Any:
    actor = ray.remote(Controller).options(
        name=CONTROLLER_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
    )
    return actor.remote(config.model_dump_json(), network, ground)


def stop_controller(controller: Any) -> None:
    """Nothing restarts it after this."""
    ray.kill(controller, no_restart=True)


class _Deployment:
    def __init__(
        self, config: Config, network: Network, controller: Any, say_ready: Callable[[str], None]
    ) -> None:
        self._config, self._network, self._controller = config, network, controller
        self._say_ready = say_ready
        self._ending = asyncio.Event()

    async def run(self, model: Model) -> None:
        loop = asyncio.get_running_loop()
        for ending in ENDINGS:
            loop.add_signal_handler(ending, self._end, ending)
        front = Front(self._config, self._network, model, self._controller)
        companions = Companions(self._config, self._network, self._controller)
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(front.run()),
                    tasks.create_task(companions.run()),
                    tasks.create_task(self._renew()),
                ]
                if await self._until(self._started(front, companions)):
                    self._say_ready(f"ready http={front.http_url} grpc={front.grpc_address}")
                    await self._ending.wait()
                    await asyncio.gather(front.drain(), companions.drain())
                await self._shut_down()
                await companions.stop()
                for task in background:
                    task.cancel()
        finally:
            await front.close()

    async def _started(self, front: Front, companions: Companions) -> None:
        """Ready; a start that fails leaves no instance behind, which the next would take over."""
        try:
            await self._ready(front, companions)
        except TandemError:
            await self._shut_down()
            raise

    async def _shut_down(self) -> None:
        await answer(self._controller.shut_down.remote(), SHUT_DOWN_S)

    async def _ready(self, front: Front, companions: Companions) -> None:
        await show_progress(self._controller, front.ready)
        spare_what_is_loaded()
        await front.open_doors()
        await companions.opened()

    def _end(self, ending: signal.Signals) -> None:
        log.info("ending signal=%s", ending.name)
        self._ending.set()

    async def _until(self, work: Any) -> bool:
        """Whether the work was done before a signal came."""
        working = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._ending.wait())
        done, rest = await asyncio.wait([working, ending], return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        if working in done:
            working.result()
        return working in done

    async def _renew(self) -> None:
        pause_s = self._config.limits.supervisor_lease_s / RENEWALS_PER_LEASE
        while True:
            try:
                await answer(self._controller.renew.remote(), pause_s)
            except TandemError as error:
                log.warning("controller not reachable error=%s", error)
            await asyncio.sleep(pause_s)
