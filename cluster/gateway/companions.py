"""Keeps the gateways beside the serve process's own: started, started again when lost, stopped."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import NAMESPACE, answer
from cluster.control.liveness import RestartBudget
from cluster.doors.tls import is_loopback
from cluster.gateway.front import LAST_ANSWERS_S, gateway_name
from cluster.gateway.process import GatewayProcess
from engine.errors import BadInput, InstanceLost, TandemError

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.instance.leading import Network

log = logging.getLogger(__name__)

STOP_S = 10.0


class Companions:
    """`run` until cancelled; raises if a gateway cannot be kept up."""

    def __init__(self, config: Config, network: Network, controller: Any) -> None:
        self._config, self._network, self._controller = config, network, controller
        self._actors: dict[int, Any] = {}
        numbers = range(1, config.gateway.instances)
        self._opened = {number: asyncio.Event() for number in numbers}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in self._opened:
                tasks.create_task(self._keep(number))

    async def opened(self) -> None:
        """Returns once each has served requests."""
        await asyncio.gather(*(event.wait() for event in self._opened.values()))

    async def drain(self) -> None:
        """All of them admit nothing more and end what they have, within the config's limit."""
        within_s = self._config.limits.drain_s + LAST_ANSWERS_S
        await self._tell("drain", within_s)

    async def stop(self) -> None:
        await self._tell("stop", STOP_S)

    async def _tell(self, verb: str, within_s: float) -> None:
        calls = [getattr(actor, verb).remote() for actor in self._actors.values()]
        results = await asyncio.gather(
            *(answer(call, within_s) for call in calls), return_exceptions=True
        )
        for number, result in zip(self._actors, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("gateway did not %s gateway=%s", verb, gateway_name(number))

    async def _keep(self, number: int) -> None:
        limits, name = self._config.limits, gateway_name(number)
        budget = RestartBudget(limits.restarts, limits.restart_window_s)
        loop = asyncio.get_running_loop()
        while (pause_s := budget.take(loop.time())) is not None:
            await asyncio.sleep(pause_s)
            try:
                await self._live(number)
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, BadInput):
                    raise error.cause from None
                log.warning("gateway lost gateway=%s error=%s", name, str(error).splitlines()[0])
            else:
                return
            await self._announce_loss(name)
        raise InstanceLost(f"{name} has been given up after {limits.restarts} restarts")

    async def _live(self, number: int) -> None:
        """One life of a gateway, to its end."""
        actor = self._actors[number] = self._start(number)
        http_url, grpc_address = await actor.open.remote()
        name = gateway_name(number)
        log.info("gateway ready gateway=%s http=%s grpc=%s", name, http_url, grpc_address)
        self._opened[number].set()
        await actor.ended.remote()

    async def _announce_loss(self, name: str) -> None:
        """Sooner than the controller would notice the silence."""
        try:
            await answer(self._controller.gateway_lost.remote(name), self._config.limits.answer_s)
        except TandemError as error:
            log.warning("loss not announced gateway=%s error=%s", name, error)

    def _start(self, number: int) -> Any:
        strategy: Any = "SPREAD"
        if is_loopback(self._config.gateway.host):
            node = ray.get_runtime_context().get_node_id()
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = ray.remote(GatewayProcess).options(
            num_cpus=0, namespace=NAMESPACE, scheduling_strategy=strategy
        )
        config = self._config.model_dump_json()
        return actor.remote(config, self._network, self._controller, number)
