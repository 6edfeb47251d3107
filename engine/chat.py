"""Chat templates: jinja2 in its immutable sandbox, with the helpers checkpoints expect."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import BadCheckpoint, BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.parser import Parser

    Message = Mapping[str, Any]

RENDER_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
ROLES_SHOWN = 8


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is plain text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON without jinja's HTML escapes, which models have never seen."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now(tz=UTC).astimezone().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the names a template may use: bos_token, eos_token and so on."""
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise BadCheckpoint("chat_template", error.lineno, str(error.message)) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        plain = [_with_text(index, message) for index, message in enumerate(messages)]
        try:
            return self._template.render(
                messages=plain,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except RENDER_FAILURES as error:
            raise BadRequest("messages", _roles(messages), str(error)) from error


def _roles(messages: Sequence[Message]) -> str:
    roles = [str(message.get("role")) for message in messages]
    return ", ".join(roles[:ROLES_SHOWN]) + (", ..." if len(roles) > ROLES_SHOWN else "")


def _with_text(index: int, message: Message) -> dict[str, Any]:
    """The message with a list of text parts joined, since templates for text expect a string."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, list | tuple):
        raise BadRequest(f"messages[{index}].content", content, "must be text or a list of parts")
    texts = [_part_text(f"messages[{index}].content[{i}]", part) for i, part in enumerate(content)]
    return {**message, "content": "\n".join(texts)}


def _part_text(field: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadRequest(field, kind, "must be a part of type text; this model reads nothing else")
