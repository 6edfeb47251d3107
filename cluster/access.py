"""What both clients share: how a server is reached, how long, how often, and with what outcome."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from engine.errors import (
    BadRequest,
    DeadlineExceeded,
    InstanceLost,
    NotFound,
    Overloaded,
    PoisonRequest,
    TandemError,
    TransferError,
    Unsupported,
)

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.rpc import tandem_pb2 as pb

DEFAULT_SERVER = "127.0.0.1:50051"
KEY_VARIABLE = "TANDEM_API_KEY"
TOO_LARGE = "message larger than max"
"""gRPC's own words: it has no other status for that than for a server that is busy."""
URL = ("http://", "https://")
PRINTABLE = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True, slots=True)
class ClientSettings:
    timeout_s: float = 600.0
    """Of a whole generation."""
    call_s: float = 30.0
    """Of any other call."""
    attempts: int = 4
    first_pause_s: float = 0.2
    """Before the second attempt; doubled before each later one."""
    most_pause_s: float = 5.0
    most_wait_s: float = 60.0
    """A server that asks for a longer pause has refused for good."""

    def pause_s(self, attempt: int, error: TandemError) -> float:
        """How long to wait after the given attempt, the first being 1."""
        asked = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        return max(asked, min(self.first_pause_s * 2.0 ** (attempt - 1), self.most_pause_s))

    def is_last(self, attempt: int, error: TandemError) -> bool:
        """Whether nothing is tried again after the given attempt."""
        if attempt == self.attempts or not worth_repeating(error):
            return True
        return self.pause_s(attempt, error) > self.most_wait_s


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach a server: in the clear on loopback, else with its CA and perhaps a key."""

    server: str = DEFAULT_SERVER
    api_key: str | None = field(default_factory=lambda: os.environ.get(KEY_VARIABLE))
    ca: Path | None = None
    """PEM file of the authority behind the server's certificate; None: no TLS."""
    certificate: Path | None = None
    key: Path | None = None
    """PEM files of one's own, where the server asks for them."""

    def __post_init__(self) -> None:
        if self.server.startswith(URL):
            raise BadRequest("server", self.server, "must be HOST:PORT of its gRPC, not a URL")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        if self.api_key is None:
            return ()
        if not PRINTABLE.fullmatch(self.api_key):
            raise BadRequest("api_key", "(hidden)", "must be printable ASCII characters")
        return (("authorization", f"Bearer {self.api_key}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        if self.ca is None:
            return None
        return grpc.ssl_channel_credentials(
            _pem("ca", self.ca),
            _pem("key", self.key),
            _pem("certificate", self.certificate),
        )


def _pem(name: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise BadRequest(name, str(path), error.strerror or "cannot be read") from error


@dataclass(slots=True)
class Generation:
    """A whole answer (the first of n)."""

    request_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    summary: pb.Summary | None = None

    def add(self, chunk: pb.GenerateChunk) -> None:
        self.request_id = chunk.request_id
        if chunk.HasField("summary"):
            self.summary = chunk.summary
        if chunk.choice == 0:
            self.text += chunk.text
            self.token_ids += chunk.token_ids
            self.finish_reason = chunk.finish_reason or self.finish_reason


KINDS: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.ABORTED: PoisonRequest,
    grpc.StatusCode.UNAVAILABLE: InstanceLost,
    grpc.StatusCode.FAILED_PRECONDITION: TransferError,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
}


def as_error(error: grpc.RpcError) -> TandemError:
    """The server's status as an error of ours."""
    code, details = error.code(), error.details() or ""
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
        return _bad_request(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and TOO_LARGE in details:
        return BadRequest("request", "...", details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details, _retry_after_s(error))
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return BadRequest("api_key", "...", details)
    kind = KINDS.get(code, TandemError)
    return kind(details or code.name)


def _bad_request(details: str) -> BadRequest:
    name, _, rest = details.partition(": ")
    value, _, rule = rest.partition(": ")
    return BadRequest(name, value, rule) if rule else BadRequest("request", "...", details)


def _retry_after_s(error: grpc.RpcError) -> float:
    trailers: Any = error.trailing_metadata() or ()
    return float(dict(trailers).get("retry-after", 0.0))


def worth_repeating(error: TandemError) -> bool:
    return isinstance(error, InstanceLost | Overloaded)
