"""A gateway beside the serve process's own: a Ray actor with its own ports."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from cluster.collector import spare_what_is_loaded
from cluster.config import Config
from cluster.gateway.front import Front, gateway_name, read_model
from cluster.watching.logs import set_up_logging
from engine.errors import InstanceLost

if TYPE_CHECKING:
    from cluster.instance.leading import Network

log = logging.getLogger(__name__)

READY_POLL_S = 0.05


class GatewayProcess:
    """The actor; it dies with the serve process, which owns it."""

    def __init__(self, config: str, network: Network, controller: Any, number: int) -> None:
        set_up_logging()
        self._config = Config.model_validate_json(config)
        self._network, self._controller, self._number = network, controller, number
        self._front: Front | None = None
        self._work: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    async def open(self) -> tuple[str, str]:
        """Returns the HTTP URL and the gRPC address once requests are served there.

        Raises what breaks it before that, or InstanceLost where it is stopped.
        """
        model = await asyncio.wrap_future(read_model(self._config))
        front = Front(self._config, self._network, model, self._controller, self._number)
        self._front = front
        self._work = asyncio.create_task(front.run())
        while not front.gateway.ready:
            over, _ = await asyncio.wait([self._work], timeout=READY_POLL_S)
            if over:
                await self.ended()
                raise InstanceLost(f"{gateway_name(self._number)} was stopped before it was ready")
        spare_what_is_loaded()
        await front.open_doors()
        return front.http_url, front.grpc_address

    async def ended(self) -> None:
        """Returns once it was told to stop; raises what broke it."""
        assert self._front is not None
        assert self._work is not None
        try:
            await self._work
        except asyncio.CancelledError:
            log.info("gateway stopped gateway=%s", gateway_name(self._number))
        finally:
            await self._front.close()
            self._closed.set()

    async def drain(self) -> None:
        if self._front is not None:
            await self._front.drain()

    async def stop(self) -> None:
        """Returns once the doors are closed."""
        if self._work is not None:
            self._work.cancel()
            await self._closed.wait()
