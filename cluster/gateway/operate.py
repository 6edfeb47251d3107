"""The operator's verbs, answered by a gateway's process from its own view and the controller."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayTaskError

from cluster.actors import answer
from engine.errors import TandemError
from engine.messages import InstanceState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from cluster.control.controller import InstanceReport
    from cluster.events import Event
    from cluster.gateway.front import Front
    from engine.messages import Role

CALL_S = 10.0
WATCH_S = 5.0


class ClusterOperator:
    def __init__(self, front: Front, controller: Any) -> None:
        self._front, self._controller = front, controller

    async def status(self) -> dict[str, Any]:
        reports = await ask(self._controller.report.remote())
        policy = await ask(self._controller.policy.remote())
        return {
            "model": self._front.gateway.model,
            "endpoints": {"http": self._front.http_url, "grpc": self._front.grpc_address},
            "instances": [instance_document(report) for report in reports],
            "requests": await self._front.gateway.everywhere.requests(),
            "slo": self._front.slo_document(),
            "policy": None if policy is None else asdict(policy),
        }

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return await self._front.whole.document(), self._front.config_document()

    async def scale(self, role: Role, instances: int) -> tuple[list[str], list[str]]:
        scaled = await ask(self._controller.scale.remote(role, instances))
        return list(scaled.started), list(scaled.draining)

    async def set_role(self, instance: str, role: Role) -> None:
        await ask(self._controller.set_role.remote(instance, role))

    async def drain(self, instance: str) -> None:
        await ask(self._controller.drain.remote(instance), self._front.drain_s)

    async def migrate(self, request_id: str, instance: str, *, wait: bool) -> tuple[str, str]:
        call = self._controller.migrate.remote(request_id, instance, wait=wait)
        source, target = await ask(call, self._front.drain_s)
        return source, target

    async def apply_policy(self, yaml: str) -> list[str]:
        return await self._front.policy.apply(yaml)

    async def watch(self) -> AsyncIterator[Event]:
        last = await ask(self._controller.last_event.remote())
        while True:
            news = await ask(self._controller.events.remote(last, WATCH_S), WATCH_S + CALL_S)
            for event in news:
                last = event.number
                yield event


def instance_document(report: InstanceReport) -> dict[str, Any]:
    """An instance as `status --json` shows it."""
    spec, load = report.spec, report.load
    seats = () if report.member is None else report.member.seats
    return {
        "id": spec.name,
        "role": spec.role.value if load is None else load.role.value,
        "state": state_of(report),
        "node": seats[0].node if seats else "",
        "device": spec.device,
        "tensor_parallel": spec.tensor_parallel,
        "pipeline_parallel": spec.pipeline_parallel,
        "workers": [asdict(seat) for seat in seats],
        "queue_requests": 0 if load is None else load.queue_requests,
        "running_sequences": 0 if load is None else load.running_sequences,
        "free_blocks": 0 if load is None else load.free_blocks,
        "total_blocks": 0 if load is None else load.total_blocks,
    }


def state_of(report: InstanceReport) -> str:
    if report.failure is not None:
        return "given up"
    if report.load is not None:
        return report.load.state.value
    if report.stage == "stopping":
        return InstanceState.STOPPED.value
    return InstanceState.STARTING.value


async def ask(call: Awaitable[Any], within_s: float = CALL_S) -> Any:
    """The controller's answer; its typed errors come out as they are."""
    try:
        return await answer(call, within_s)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TandemError):
            raise cause from None
        raise
