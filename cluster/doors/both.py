"""Where clients come in: a gateway's HTTP server and its gRPC server, opened and closed as one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn

from cluster.doors.http_protocol import bounded_http
from cluster.doors.tls import uvicorn_options
from engine.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp

    from cluster.config import GatewayConfig

BACKLOG = 2048
LAST_ANSWERS_S = 5
"""How long open connections may take over their last bytes when the door closes."""


class HttpServer:
    """uvicorn on the running loop, without its signal handlers."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._socket = listen(config.host, config.http_port, "gateway.http_port")
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                http=bounded_http(config.http),
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=LAST_ANSWERS_S,
                **uvicorn_options(config.tls),
            )
        )
        self._serving: asyncio.Task[None] | None = None
        scheme = "http" if config.tls is None else "https"
        self.url = f"{scheme}://{host_in_url(config.host)}:{self._socket.getsockname()[1]}"

    async def open(self) -> None:
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    async def close(self) -> None:
        """Takes no more connections, and gives open ones a moment to end."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the deployment's, not the door's."""
        yield


def listen(host: str, port: int, field: str) -> socket.socket:
    """A listening socket; BadConfig if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        rule = f"cannot listen on {host}: {error.strerror}"
        raise BadConfig(field, port, rule) from error
    listener.listen(BACKLOG)
    return listener


def host_in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
