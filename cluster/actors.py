"""How the cluster's Ray actors are named and found, and how calls to them are bounded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from engine.errors import DeadlineExceeded, InstanceLost

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from cluster.roster import Member, Roster

NAMESPACE = "tandem"
CONTROLLER_NAME = "tandem-controller"
RETRY_S = 0.2
PULL_ANSWER_S = 120.0
"""Of one rank to another about KV: beyond every bound of the transports themselves. The controller
ends an instance that hangs long before."""


def worker_name(instance: str, rank: int) -> str:
    return f"tandem-{instance}-{rank}"


def find_worker(instance: str, rank: int) -> Any:
    return _find(worker_name(instance, rank))


def find_controller() -> Any:
    return _find(CONTROLLER_NAME)


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        raise InstanceLost(f"no actor {name}") from error


async def answer(call: Awaitable[Any], within_s: float) -> Any:
    """The call's result; InstanceLost if the actor is gone, DeadlineExceeded if it is stuck."""
    try:
        async with asyncio.timeout(within_s):
            return await call
    except TimeoutError as error:
        raise DeadlineExceeded(f"an actor did not answer within {within_s:g} s") from error
    except RayActorError as error:
        raise InstanceLost(str(error).splitlines()[0]) from error


class ControllerSync:
    """The long poll of a Membership; for `patience_s` it waits for a controller that starts."""

    def __init__(self, patience_s: float, poll_s: float = 2.0) -> None:
        self._patience_s, self._poll_s = patience_s, poll_s

    async def __call__(self, me: Member, known: int) -> Roster:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._poll_s + self._patience_s
        while True:
            try:
                controller = find_controller()
                call = controller.sync.remote(me, known, self._poll_s)
                roster: Roster = await answer(call, deadline - loop.time())
            except InstanceLost:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return roster
