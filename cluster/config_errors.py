"""Turns a pydantic report into the one line a person can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import BadConfig, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import ValidationError

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def first_error(error: ValidationError, schema: dict[str, Any]) -> BadConfig:
    """The report's first entry; an unknown key names the nearest one that exists there."""
    entries = error.errors(include_url=False)
    entry = next((e for e in entries if e["type"] in UNKNOWN), entries[0])
    steps = entry["loc"]
    path = dotted(steps)
    if entry["type"] in UNKNOWN:
        return unknown_name(path, str(steps[-1]), valid_keys(schema, steps[:-1]))
    value = entry["input"] if not isinstance(entry["input"], dict | list) else "..."
    return BadConfig(path or "config", value, _rule(entry["msg"]))


def dotted(steps: Sequence[str | int]) -> str:
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")


def valid_keys(schema: dict[str, Any], steps: Sequence[str | int]) -> list[str]:
    """Names allowed in the mapping at `steps` of a JSON schema."""
    here = schema
    for step in steps:
        if isinstance(step, int):
            here = _resolve(schema, here.get("items", {}))
        else:
            here = _resolve(schema, here.get("properties", {}).get(step, {}))
    return sorted(here.get("properties", {}))


def _resolve(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    for option in part.get("anyOf", [part]):
        name = option.get("$ref", "").rpartition("/")[2]
        if name:
            found: dict[str, Any] = schema["$defs"][name]
            return found
    return part


def _rule(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
