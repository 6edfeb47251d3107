"""The HTTP door: OpenAI's API over the gateway's one request path."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from cluster.doors.http_answer import AnswerResponse
from cluster.doors.http_errors import (
    Refused,
    UnknownModel,
    error_response,
    http_exception,
    our_own_fault,
)
from cluster.doors.keys import EVERYONE
from cluster.doors.limits import HttpLimits
from cluster.doors.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse_body
from cluster.doors.openai_replies import ChatFormat, CompletionFormat, UsageOn
from cluster.doors.openapi import openapi_document
from cluster.gateway.call import check_chat, check_tokens
from engine.errors import BadRequest, TandemError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from cluster.doors.keys import Caller, Keyring
    from cluster.doors.openai_replies import Format
    from cluster.gateway.answer import Answer
    from cluster.gateway.call import Call
    from cluster.gateway.gateway import Gateway

    Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class HttpSettings:
    limits: HttpLimits = field(default_factory=HttpLimits)
    model_root: str = ""
    """Where the model came from, as /v1/models tells it."""


class HttpDoor:
    """An ASGI application; `extra` are routes of others, such as the live page."""

    def __init__(
        self,
        gateway: Gateway,
        settings: HttpSettings | None = None,
        *,
        keys: Keyring | None = None,
        metrics: Callable[[], tuple[bytes, str]] | None = None,
        extra: Sequence[BaseRoute] = (),
    ) -> None:
        """`metrics` gives a body and its content type."""
        self.gateway = gateway
        self.settings = settings or HttpSettings()
        self._keys, self._metrics = keys, metrics
        self._started_s = int(gateway.clock.now())
        self.app = Starlette(
            routes=[*self._routes(), *extra],
            exception_handlers={
                HTTPException: http_exception,  # type: ignore[dict-item]
                Exception: our_own_fault,
            },
        )
        self.app.router.redirect_slashes = False

    def _routes(self) -> list[BaseRoute]:
        get: dict[str, Endpoint] = {
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/health": self._health,
            "/live": self._live,
            "/ready": self._health,
            "/openapi.json": self._openapi,
        }
        if self._metrics is not None:
            get["/metrics"] = self._metrics_page
        post: dict[str, Endpoint] = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        return [
            *(Route(path, _guarded(one), methods=["GET"]) for path, one in get.items()),
            *(Route(path, _guarded(one), methods=["POST"]) for path, one in post.items()),
        ]

    # Answers.

    async def _completions(self, request: Request) -> Response:
        caller = self._caller(request)
        body = parse_body(CompletionBody, await self._body(request))
        self._check_model(body.model)
        call = body.to_call()
        return self._reply(request, call, caller, CompletionFormat, body)

    async def _chat(self, request: Request) -> Response:
        caller = self._caller(request)
        body = parse_body(ChatBody, await self._body(request))
        self._check_model(body.model)
        return self._reply(request, body.to_call(), caller, ChatFormat, body)

    def _reply(
        self,
        request: Request,
        call: Call,
        caller: Caller,
        kind: type[CompletionFormat] | type[ChatFormat],
        body: CompletionBody | ChatBody,
    ) -> AnswerResponse:
        if body.stream_options is not None and not body.stream:
            raise BadRequest("stream_options", "given", "is only for stream: true")
        priority = caller.priority_of(body.priority)
        caller.enter(self.gateway.clock.now())
        call = replace(
            call,
            priority=priority,
            tenant=caller.tenant,
            request_id=request.headers.get("x-request-id"),
            trace=request.headers.get("traceparent"),
        )
        model = self.gateway.model
        tokenizer = self.gateway.tokenizer

        def make(answer: Answer) -> Format:
            return kind(answer, model, tokenizer, body.usage)

        return AnswerResponse(
            self.gateway,
            call,
            caller,
            make,
            stream=bool(body.stream),
            with_usage=body.usage is not UsageOn.NO_CHUNK,
        )

    # Texts and tokens.

    async def _tokenize(self, request: Request) -> Response:
        self._caller(request)
        body = parse_body(TokenizeBody, await self._body(request))
        self._check_model(body.model)
        intake = self.gateway.intake
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("prompt", body.prompt, "give either prompt or messages")
        if body.messages is not None:
            chat = [message.to_template() for message in body.messages]
            check_chat(chat, intake.limits)
            text = await asyncio.to_thread(
                self.gateway.tokenizer.render_chat,
                chat,
                add_generation_prompt=body.add_generation_prompt,
            )
            tokens = await intake.tokenize(text, of="messages", add_special_tokens=False)
        else:
            text = body.prompt or ""
            tokens = await intake.tokenize(text, add_special_tokens=body.add_special_tokens)
        limit = intake.context_tokens
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def _detokenize(self, request: Request) -> Response:
        self._caller(request)
        body = parse_body(DetokenizeBody, await self._body(request))
        self._check_model(body.model)
        check_tokens("tokens", tuple(body.tokens), self.gateway.tokenizer.vocab_size)
        return _json({"prompt": await self.gateway.intake.detokenize(body.tokens)})

    # The server itself.

    async def _models(self, request: Request) -> Response:
        self._caller(request)
        return _json({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        self._caller(request)
        self._check_model(request.path_params["name"])
        return _json(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.gateway.model,
            "object": "model",
            "created": self._started_s,
            "owned_by": "tandem",
            "root": self.settings.model_root or self.gateway.model,
            "max_model_len": self.gateway.intake.context_tokens,
        }

    async def _health(self, _: Request) -> Response:
        if self.gateway.ready:
            return _json({"status": "ok"})
        return _json({"status": "draining" if self.gateway.draining else "starting"}, 503)

    async def _live(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def _metrics_page(self, request: Request) -> Response:
        self._caller(request)
        assert self._metrics is not None
        body, content_type = self._metrics()
        return Response(body, headers={"content-type": content_type})

    async def _openapi(self, _: Request) -> Response:
        return _json(
            openapi_document(with_keys=self._keys is not None, metrics=self._metrics is not None)
        )

    # What every request goes through.

    def _caller(self, request: Request) -> Caller:
        if self._keys is None:
            return EVERYONE
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else None
        return self._keys.caller(given, self.gateway.clock.now())

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.gateway.model:
            raise UnknownModel(name, self.gateway.model)

    async def _body(self, request: Request) -> bytes:
        content_type = request.headers.get("content-type", "application/json")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "The body must be application/json.", "unsupported_media_type")
        limit = self.settings.limits.body_bytes
        too_large = Refused(413, f"The body may have {limit} bytes.", "body_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise Refused(408, "The body did not arrive in time.", "body_timeout") from None
        return b"".join(parts)


def _guarded(endpoint: Endpoint) -> Endpoint:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TandemError as error:
            return error_response(error)

    return guarded


def _json(value: object, status: int = 200) -> Response:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(body, status, media_type="application/json")
