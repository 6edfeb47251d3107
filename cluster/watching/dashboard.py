"""The live page: three static files, one document, and a stream of it."""

from __future__ import annotations

import asyncio
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cluster.doors.http_errors import error_response
from engine.errors import Overloaded, TandemError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from cluster.watching.whole import WholeCluster

REFRESH_S = 0.5
MOST_VIEWERS = 32
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Dashboard:
    """Routes for a gateway's HTTP door. `admit` raises for a caller without a valid key: the
    page itself is public, what it shows is not."""

    def __init__(
        self,
        whole: WholeCluster,
        admit: Callable[[Request], object] = lambda _: None,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._whole, self._admit, self._refresh_s = whole, admit, refresh_s
        self._viewers = 0
        self._latest: tuple[dict[str, Any], bytes] | None = None

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/dashboard", self._page("html")),
            Route("/dashboard/dashboard.css", self._page("css")),
            Route("/dashboard/dashboard.js", self._page("js")),
            Route("/dashboard/data", self._data),
            Route("/dashboard/stream", self._stream),
        ]

    def _page(self, kind: str) -> Callable[[Request], Response]:
        body = files("cluster.watching").joinpath(f"static/dashboard.{kind}").read_bytes()

        def page(_: Request) -> Response:
            return Response(body, media_type=KINDS[kind], headers=HEADERS)

        return page

    async def _data(self, request: Request) -> Response:
        try:
            self._admit(request)
        except TandemError as error:
            return error_response(error)
        return Response(await self._document(), media_type="application/json", headers=HEADERS)

    async def _stream(self, request: Request) -> Response:
        try:
            self._admit(request)
            if self._viewers >= MOST_VIEWERS:
                raise Overloaded(f"{MOST_VIEWERS} people are watching already", 5.0)
        except TandemError as error:
            return error_response(error)
        return StreamingResponse(self._updates(), media_type="text/event-stream", headers=HEADERS)

    async def _updates(self) -> AsyncIterator[bytes]:
        self._viewers += 1
        try:
            while True:
                yield b"data: " + await self._document() + b"\n\n"
                await asyncio.sleep(self._refresh_s)
        finally:
            self._viewers -= 1

    async def _document(self) -> bytes:
        """Written once, however many watch."""
        document = await self._whole.document()
        if self._latest is None or self._latest[0] is not document:
            self._latest = document, json.dumps(document, separators=(",", ":")).encode()
        return self._latest[1]
