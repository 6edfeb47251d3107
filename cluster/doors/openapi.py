"""/openapi.json, made from the same models that check the bodies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from cluster.doors import openai, openai_replies

if TYPE_CHECKING:
    from pydantic import BaseModel

ERRORS = {
    400: "A field breaks a rule; `param` names it.",
    401: "The API key is missing or unknown.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Refused for now; Retry-After says when to come back.",
    503: "The instances that could answer are gone.",
    504: "Not done within the time limit.",
}
KEY_ERRORS = (401,)
BODY_ERRORS = (400, 408, 413, 415)


@dataclass(frozen=True, slots=True)
class _Operation:
    path: str
    summary: str
    reply: type[BaseModel] | None
    body: type[BaseModel] | None = None
    stream: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    keyed: bool = True
    parameters: tuple[str, ...] = ()
    reply_type: str = "application/json"


ANSWER_ERRORS = (404, 429, 503, 504)
OPERATIONS = (
    _Operation("/v1/models", "The model that is served", openai_replies.ModelList),
    _Operation(
        "/v1/models/{name}",
        "One model",
        openai_replies.Model,
        errors=(404,),
        parameters=("name",),
    ),
    _Operation(
        "/v1/completions",
        "Continue a text",
        openai_replies.CompletionReply,
        openai.CompletionBody,
        openai_replies.CompletionReply,
        ANSWER_ERRORS,
    ),
    _Operation(
        "/v1/chat/completions",
        "Answer a conversation",
        openai_replies.ChatReply,
        openai.ChatBody,
        openai_replies.ChatChunk,
        ANSWER_ERRORS,
    ),
    _Operation(
        "/tokenize",
        "Text to tokens",
        openai_replies.TokenizeReply,
        openai.TokenizeBody,
        errors=(404,),
    ),
    _Operation(
        "/detokenize",
        "Tokens to text",
        openai_replies.DetokenizeReply,
        openai.DetokenizeBody,
        errors=(404,),
    ),
    _Operation("/health", "Whether requests are served", openai_replies.Health, keyed=False),
    _Operation("/live", "Whether the process answers", openai_replies.Health, keyed=False),
    _Operation("/ready", "Whether requests are served", openai_replies.Health, keyed=False),
)


@cache
def openapi_document(*, with_keys: bool, metrics: bool = False) -> dict[str, Any]:
    kinds = {
        kind for one in OPERATIONS for kind in (one.reply, one.body, one.stream) if kind is not None
    }
    kinds.add(openai_replies.ErrorReply)
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in ordered], ref_template="#/components/schemas/{model}"
    )
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": "1"},
        "paths": {one.path: _path(one, with_keys=with_keys) for one in OPERATIONS},
        "components": components,
    }
    if metrics:
        document["paths"]["/metrics"] = _metrics_path(with_keys=with_keys)
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _path(one: _Operation, *, with_keys: bool) -> dict[str, Any]:
    content = {one.reply_type: {"schema": _ref(one.reply)}}
    if one.stream is not None:
        content["text/event-stream"] = {"schema": _event(one.stream)}
    responses: dict[str, Any] = {"200": {"description": one.summary, "content": content}}
    for status in _statuses(one, with_keys=with_keys):
        responses[str(status)] = _error(status)
    if one.reply is openai_replies.Health and one.path != "/live":
        responses["503"] = {"description": "Not now.", "content": content}
    operation: dict[str, Any] = {"summary": one.summary, "responses": responses}
    if with_keys and one.keyed:
        operation["security"] = [{"key": []}]
    operation["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in one.parameters
    ]
    if one.body is None:
        return {"get": operation}
    body = {"application/json": {"schema": _ref(one.body)}}
    operation["requestBody"] = {"required": True, "content": body}
    return {"post": operation}


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """A server-sent event: a chunk, an error that ends the stream, or [DONE]."""
    json_text = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(chunk), _ref(openai_replies.ErrorReply)]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, json_text]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _statuses(one: _Operation, *, with_keys: bool) -> list[int]:
    keyed = KEY_ERRORS if with_keys and one.keyed else ()
    body = BODY_ERRORS if one.body is not None else ()
    return sorted({*keyed, *body, *one.errors})


def _metrics_path(*, with_keys: bool) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {
            "description": "Prometheus metrics",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    }
    if with_keys:
        responses["401"] = _error(401)
    return {"get": {"summary": "Prometheus metrics", "responses": responses}}


def _error(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": ERRORS[status],
        "content": {"application/json": {"schema": _ref(openai_replies.ErrorReply)}},
    }
    if status == 429:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return response


def _ref(kind: type[BaseModel] | None) -> dict[str, str]:
    assert kind is not None
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
