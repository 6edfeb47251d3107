"""YAML that people write: syntax errors and repeated keys named with file and line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from engine.errors import BadConfig

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error rather than the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  the parent's signature
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise BadConfig(f"line {line}", key, "this key is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; an empty file is an empty mapping."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadConfig("file", str(path), error.strerror or "cannot be read") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadConfig("file", str(path), f"larger than {MAX_FILE_BYTES} bytes")
    try:
        return parse_yaml(data.decode())
    except UnicodeDecodeError as error:
        raise BadConfig("file", str(path), f"not UTF-8: {error.reason}") from error


def parse_yaml(text: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  a subclass of the safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "file" if mark is None else f"line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadConfig(where, text.strip()[:40], f"not YAML: {problem}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadConfig("file", str(value)[:40], "must hold a mapping of keys to values")
    return value
