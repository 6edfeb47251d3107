"""Errors as OpenAI's clients expect them, whatever went wrong."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING

from starlette.responses import Response

from cluster.doors.keys import NotAllowed, Unauthorized
from engine.errors import (
    BadInput,
    DeadlineExceeded,
    InstanceLost,
    NotFound,
    OutOfBlocks,
    Overloaded,
    PoisonRequest,
    PromptTooLong,
    TandemError,
)

if TYPE_CHECKING:
    from starlette.exceptions import HTTPException
    from starlette.requests import Request


LOG = logging.getLogger(__name__)
INVALID = "invalid_request_error"
TOO_LONG = "context_length_exceeded"


class Refused(TandemError):
    """A request that HTTP itself has a status for."""

    def __init__(self, status: int, message: str, code: str) -> None:
        self.status, self.code = status, code
        super().__init__(message)


class UnknownModel(NotFound):
    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"The model {name!r} does not exist; this server has {served!r}.")


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def error_json(error: TandemError) -> tuple[int, bytes]:
    """Status and body."""
    status, kind, param, code = _classify(error)
    return status, error_body(str(error), kind, param, code)


def error_response(error: TandemError, headers: dict[str, str] | None = None) -> Response:
    status, body = error_json(error)
    sent = dict(headers or {})
    if isinstance(error, Overloaded):
        sent["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
    if status == 401:
        sent["www-authenticate"] = "Bearer"
    if status in (408, 413):
        sent["connection"] = "close"
    return Response(body, status, sent, "application/json")


async def http_exception(request: Request, error: HTTPException) -> Response:
    """Starlette's own 404 and 405."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    body = error_body(message, INVALID, None, code)
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


KINDS: tuple[tuple[type[TandemError], int, str, str | None], ...] = (
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (NotAllowed, 403, "permission_error", "not_an_operator"),
    (NotFound, 404, INVALID, "not_found"),
    (Overloaded, 429, "rate_limit_error", "overloaded"),
    (OutOfBlocks, 400, INVALID, TOO_LONG),
    (PoisonRequest, 500, "server_error", "poison_request"),
    (InstanceLost, 503, "server_error", "instance_lost"),
    (DeadlineExceeded, 504, "server_error", "deadline_exceeded"),
)


async def our_own_fault(request: Request, error: Exception) -> Response:
    """The last boundary: Starlette raises the error again after this, so that it is logged."""
    LOG.error("request failed path=%s error=%s", request.url.path, type(error).__name__)
    body = error_body("The server failed; its log says why.", "server_error", None, "internal")
    return Response(body, 500, media_type="application/json")


def _classify(error: TandemError) -> tuple[int, str, str | None, str | None]:
    match error:
        case Refused():
            return error.status, INVALID, None, error.code
        case BadInput(field=field):
            return 400, INVALID, field, _code_of(error)
        case UnknownModel():
            return 404, INVALID, "model", "model_not_found"
    for kind, status, name, code in KINDS:
        if isinstance(error, kind):
            return status, name, None, code
    return 500, "server_error", None, type(error).__name__


def _code_of(error: BadInput) -> str | None:
    too_long = isinstance(error, PromptTooLong) or "context is" in error.rule
    return TOO_LONG if too_long else None
