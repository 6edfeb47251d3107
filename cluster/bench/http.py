"""The lightest client we could measure: one asyncio protocol a connection over httptools.

A load generator shares its machine with the server under test, so every microsecond it
spends on a token shows up in the result.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import httptools

from cluster.bench.sse import BadStream, EventSplitter, error_text
from engine.errors import BadInput, TandemError, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

now = time.perf_counter
"""An event loop's own clock may tick in whole milliseconds."""
IDLE_CONNECTIONS = 256
LARGEST_PLAIN_BODY_BYTES = 1 << 20


class ConnectionClosed(TransportError):
    """The server closed before it had answered."""


class HttpRefused(TransportError):
    """The server answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status}: {message}")


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test."""

    host: str
    port: int
    base_path: str
    tls: bool
    api_key: str | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.host}:{self.port}{self.base_path}"


def parse_target(url: str, api_key: str | None = None) -> Target:
    """A base URL, with or without a trailing /v1."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise BadInput("url", url, str(error)) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput("url", url, "must look like http://HOST:PORT")
    tls = parts.scheme == "https"
    base_path = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port or (443 if tls else 80), base_path, tls, api_key)


class Exchange:
    """One request and its answer, handed over piece by piece as they arrive."""

    def __init__(self, on_event: Callable[[bytes, float], None], done: asyncio.Future[None]):
        self._on_event = on_event
        self.done = done
        self.status: int | None = None
        self.streams = False
        self.framed = False
        """Whether the answer says where it ends; if not, it ends with the connection."""
        self._events = EventSplitter()
        self._body = bytearray()

    def take_body(self, data: bytes, now_s: float) -> None:
        if self.streams and self.status == 200:
            for event in self._events.feed(data):
                self._on_event(event, now_s)
        elif len(self._body) + len(data) <= LARGEST_PLAIN_BODY_BYTES:
            self._body += data
        else:
            raise BadStream(f"an answer of more than {LARGEST_PLAIN_BODY_BYTES} bytes")

    def complete(self, now_s: float) -> None:
        if self.status != 200:
            self.fail(HttpRefused(self.status or 0, _error_message(bytes(self._body))))
            return
        if self._body:
            self._on_event(bytes(self._body), now_s)
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: TandemError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def _error_message(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return body[:200].decode(errors="replace")
    return error_text(answer.get("error", answer) if isinstance(answer, dict) else answer)[:200]


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection that serves one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self.reusable = True
        self.answered = False
        """Whether anything has come back for the current exchange."""

    def send(self, request: bytes, exchange: Exchange) -> None:
        assert self._exchange is None, "one exchange at a time"
        self._exchange, self.answered = exchange, False
        if self._transport is None or self._transport.is_closing():
            self._fail(ConnectionClosed("the connection had been closed"))
            return
        self._transport.write(request)

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now_s, self.answered = now(), True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, BadStream) as error:
            self.close()
            self._fail(_cause(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        exchange = self._exchange
        if exc is None and exchange is not None and exchange.status and not exchange.framed:
            self.on_message_complete()
        else:
            self._fail(ConnectionClosed(str(exc) if exc else "the server closed the connection"))

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange, name = self._exchange, name.lower()
        if exchange is None:
            return
        if name == b"content-type":
            exchange.streams = value.startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            exchange.framed = True

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.take_body(body, self._now_s)

    def on_message_complete(self) -> None:
        self.reusable = self.reusable and self._parser.should_keep_alive()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.complete(self._now_s)

    def _fail(self, error: TandemError) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.fail(error)


def _cause(error: Exception) -> TandemError:
    """httptools wraps what its callbacks raise."""
    cause = error.__context__ or error
    return cause if isinstance(cause, TandemError) else BadStream(f"not HTTP/1.1: {error}")


class Client:
    """Keeps connections to one server and reuses those that are idle."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if target.tls else None

    def request_bytes(
        self, method: str, path: str, body: bytes = b"", headers: Iterable[str] = ()
    ) -> bytes:
        """A whole request, ready to be written at its moment."""
        target = self.target
        lines = [
            f"{method} {target.base_path}{path} HTTP/1.1",
            f"Host: {target.host}:{target.port}",
            *headers,
        ]
        if target.api_key:
            lines.append(f"Authorization: Bearer {target.api_key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def exchange(self, request: bytes, on_event: Callable[[bytes, float], None]) -> None:
        """Sends, hands every event over, and returns at the end of the answer."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and await self._reused(connection, request, on_event):
                return
        await self._run(await self._connect(), request, on_event)

    async def _reused(
        self, connection: Connection, request: bytes, on_event: Callable[[bytes, float], None]
    ) -> bool:
        """False where the server had closed the idle connection before it saw the request."""
        try:
            await self._run(connection, request, on_event)
        except ConnectionClosed:
            if connection.answered:
                raise
            return False
        return True

    async def _run(
        self, connection: Connection, request: bytes, on_event: Callable[[bytes, float], None]
    ) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.send(request, Exchange(on_event, done))
        try:
            await done
        except BaseException:
            connection.close()
            raise
        if connection.reusable and len(self._idle) < IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self) -> Connection:
        loop, target = asyncio.get_running_loop(), self.target
        try:
            _, connection = await loop.create_connection(
                Connection, target.host, target.port, ssl=self._tls
            )
        except OSError as error:
            raise TransportError(f"{target.url}: {error.strerror or error}") from error
        return connection

    async def fetch(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A plain answer in one piece."""
        pieces: list[bytes] = []
        await self.exchange(
            self.request_bytes(method, path, body), lambda data, _: pieces.append(data)
        )
        return b"".join(pieces)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
