"""uvicorn's HTTP/1.1 with bounds: on what comes before a body, and on readers that stop reading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.doors.http_errors import INVALID, error_body
from cluster.doors.limits import HttpLimits

if TYPE_CHECKING:
    import asyncio

REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def bounded_http(limits: HttpLimits) -> type[BoundedHttp]:
    """uvicorn makes its protocols itself and knows no limits of ours."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits})


class BoundedHttp(HttpToolsProtocol):
    limits = HttpLimits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = True
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._full: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._flows()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        limit = self.limits.head_bytes
        if self._in_head and self._head_bytes > limit:
            self._refuse(431, f"A request's head may have {limit} bytes.", "head_too_large")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._full = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flows()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows a chunked body is not wanted, and could go on for ever.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """What comes now without a new head, such as a body that was not waited for, would keep the
        connection for ever: uvicorn counts it as life."""
        super().on_response_complete()
        if self.cycle.response_complete and not self._in_head and not self.transport.is_closing():
            self._stop_timer()
            self._timer = self.loop.call_later(self.limits.body_s, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg, "invalid_http")

    def _await_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._stop_timer()
        self._timer = self.loop.call_later(self.limits.head_s, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flows(self) -> None:
        if self._full is not None:
            self._full.cancel()
            self._full = None

    def _too_late(self) -> None:
        self._refuse(408, "The request did not arrive in time.", "head_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        if self.transport.is_closing():
            return
        body = error_body(message, INVALID, None, code)
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
