"""`tandem keys new`: makes an API key, shown once; the file only ever holds its hash."""

from __future__ import annotations

import json
import re
from pathlib import Path  # noqa: TC003  typer reads it
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cluster.cli.options import Json, check_output
from engine.errors import BadConfig

ENTRY = re.compile(r"(?m)^( *)- ")

commands = typer.Typer(help="API keys.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="keys")


@commands.callback()
def keys() -> None:
    """API keys for `gateway.api_keys_file`."""


@commands.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whose requests these are.")],
    *,
    name: Annotated[
        str | None, typer.Option(help="What the key is called; the tenant if not given.")
    ] = None,
    priority: Annotated[int, typer.Option(help="The highest it may ask for.")] = 0,
    requests_per_minute: Annotated[float | None, typer.Option()] = None,
    tokens_per_minute: Annotated[float | None, typer.Option()] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="May also operate the cluster.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option(help="Adds the entry to this file, which may not exist yet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prints a new key once, and the line that lets it in."""
    from cluster.doors.keys import hash_key, new_key

    check_output("file", file)
    key = new_key()
    entry = {
        "name": name or tenant,
        "hash": hash_key(key),
        "tenant": tenant,
        "priority": priority,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "operator": operator,
    }
    entry = {field: value for field, value in entry.items() if value not in (None, False)}
    check(entry)
    if file is not None:
        add(entry, file)
    if as_json:
        print(json.dumps({"key": key, "entry": entry}))
        return
    print(f"key (shown only now): {key}")
    print(f"added to {file}" if file is not None else f"line for the file:\n{line_of(entry)}")


def check(entry: dict[str, Any]) -> None:
    """Raises BadConfig for what the file would not be allowed to hold."""
    from cluster.doors.keys import KeyEntry

    try:
        KeyEntry.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadConfig(str(first["loc"][0]), first["input"], first["msg"]) from None


def line_of(entry: dict[str, Any], indent: str = "  ") -> str:
    """YAML reads JSON's flow mappings."""
    return f"{indent}- {json.dumps(entry)}"


def add(entry: dict[str, Any], file: Path) -> None:
    """Puts the entry at the end of a file that is valid before and after; only its user may read
    a file made here."""
    from cluster.doors.keys import read_keys

    if not file.exists():
        file.touch(mode=0o600)
        file.write_text("keys:\n")
    else:
        read_keys(file)
    text = file.read_text()
    first = ENTRY.search(text)
    line = line_of(entry) if first is None else line_of(entry, first[1])
    file.write_text(f"{text.rstrip()}\n{line}\n")
    try:
        read_keys(file)
    except BadConfig:
        file.write_text(text)
        rule = "its list of keys is not written one entry a line: add the entry by hand"
        raise BadConfig("file", str(file), rule) from None
