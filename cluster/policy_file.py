"""Reads policy files: one error with its line, its rule and the nearest valid name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from cluster.config_errors import first_error
from cluster.yaml_file import MAX_FILE_BYTES, parse_yaml
from engine.errors import BadConfig
from placement.scaling.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

MAX_DEPTH = 16
STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def parse_policy(text: str) -> Policy:
    """A checked policy, or one BadConfig whose field begins with the line."""
    if len(text.encode()) > MAX_FILE_BYTES:
        raise BadConfig("policy", f"{len(text)} characters", f"larger than {MAX_FILE_BYTES} bytes")
    _check_nesting(text)
    values = parse_yaml(text)
    try:
        return Policy.model_validate_json(_as_json(values))
    except ValidationError as error:
        bad = first_error(error, policy_schema())
        where = f"line {line_of(text, bad.field)}: {bad.field}"
        raise BadConfig(where, bad.value, bad.rule) from None


def starting_policy(path: Path | None) -> str | None:
    """The checked text of the policy that a config names."""
    if path is None:
        return None
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig("autoscaling.policy", str(path), f"cannot be read: {error}") from error
    parse_policy(text)
    return text


def policy_schema() -> dict[str, Any]:
    """The JSON schema of a policy file."""
    return Policy.model_json_schema()


def line_of(text: str, path: str) -> int:
    """Where `roles.prefill.signals[0]` is written; the nearest part above it if it is not."""
    node = yaml.compose(text, yaml.SafeLoader)
    line = 1
    for index, key in STEP.findall(path):
        found = _item(node, int(index)) if index else _entry(node, key)
        if found is None:
            break
        line, node = found
    return line


def _item(node: yaml.Node | None, index: int) -> tuple[int, yaml.Node] | None:
    if not isinstance(node, yaml.SequenceNode) or index >= len(node.value):
        return None
    return node.value[index].start_mark.line + 1, node.value[index]


def _entry(node: yaml.Node | None, key: str) -> tuple[int, yaml.Node] | None:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if name.value == key:
            return name.start_mark.line + 1, value
    return None


def _check_nesting(text: str) -> None:
    """A policy comes over the network: one that grows when it is read is refused first."""
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            mark = event.start_mark
            line = "policy" if mark is None else f"line {mark.line + 1}"
            if depth > MAX_DEPTH:
                raise BadConfig(line, f"depth {depth}", f"nested deeper than {MAX_DEPTH}")
            if isinstance(event, yaml.AliasEvent):
                raise BadConfig(line, f"*{event.anchor}", "write it out: policies have no aliases")
    except yaml.YAMLError:
        # What is not YAML is reported by the parser proper, with its problem.
        return


def _as_json(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, default=str)
    except TypeError as error:
        raise BadConfig("policy", "...", f"every key must be plain text: {error}") from error
