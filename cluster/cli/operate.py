"""Commands that look at a running cluster and operate it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path  # noqa: TC003  typer reads it
from typing import Annotated, Any

import typer

from cluster.cli.options import ApiKey, Json, Server, check_output, open_client
from cluster.events import KINDS
from engine.errors import BadRequest

ROLES = ("prefill", "decode", "mixed")
COUNT = re.compile(r"[0-9]{1,6}")
EventKinds = Annotated[list[str] | None, typer.Option(help=f"Only these, of {', '.join(KINDS)}.")]

policy_app = typer.Typer(help="Autoscaling policy files.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    for command in (status, top, scale, role, drain, migrate, events, report):
        app.command()(command)
    policy_app.command("validate")(policy_validate)
    policy_app.command("apply")(policy_apply)
    policy_app.command("schema")(policy_schema)
    app.add_typer(policy_app, name="policy")


def status(*, as_json: Json = False, server: Server = None, api_key: ApiKey = None) -> None:
    """The cluster now."""
    from cluster.cli.status import as_document, draw

    with open_client(server, api_key) as client:
        reply = client.status()
    if as_json:
        print(json.dumps(as_document(reply), indent=2))
    else:
        from rich.console import Console

        Console().print(draw(as_document(reply)))


def top(
    *,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Draw it once and end.")] = False,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """What the live page shows, refreshed until interrupted."""
    from rich.console import Console
    from rich.live import Live

    from cluster.cli.top import Picture

    with open_client(server, api_key) as client:

        def seen() -> dict[str, Any]:
            document: dict[str, Any] = json.loads(client.describe().seen)
            return document

        if as_json:
            print(json.dumps(seen(), indent=2))
            return
        if once:
            Console().print(Picture(seen()))
            return
        with Live(Picture(seen()), screen=True, auto_refresh=False) as live:
            while True:
                live.refresh()
                time.sleep(interval_s)  # noqa: TID251  a person's refresh interval
                live.update(Picture(seen()))


def scale(
    target: Annotated[str, typer.Argument(metavar="ROLE=N")],
    *,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Sets how many instances a role has."""
    name, _, count = target.partition("=")
    check_role(name)
    if not COUNT.fullmatch(count):
        raise BadRequest("instances", count, "must be a whole number, as in decode=2")
    with open_client(server, api_key) as client:
        reply = client.scale(name, int(count))
    document = {"started": list(reply.started), "draining": list(reply.draining)}
    _tell(document, as_json=as_json)


def role(
    instance: str,
    new_role: Annotated[str, typer.Argument(metavar="ROLE")],
    *,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Switches an instance to another role."""
    check_role(new_role)
    with open_client(server, api_key) as client:
        client.set_role(instance, new_role)
    _tell({"instance": instance, "role": new_role}, as_json=as_json)


def drain(
    instance: str, *, as_json: Json = False, server: Server = None, api_key: ApiKey = None
) -> None:
    """Moves an instance's requests away and stops it."""
    with open_client(server, api_key) as client:
        client.drain(instance)
    _tell({"drained": instance}, as_json=as_json)


def migrate(
    request: str,
    instance: str,
    *,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """Moves a running request to another instance, and says so once it runs there."""
    with open_client(server, api_key) as client:
        reply = client.migrate(request, instance, wait=True)
    document = {"request": request, "source": reply.source, "target": reply.target}
    _tell(document, as_json=as_json)


def events(
    *,
    kind: EventKinds = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """What happens in the cluster, a line an event, until interrupted."""
    with open_client(server, api_key) as client:
        for event in client.watch(*(kind or ())):
            document = {
                "at_s": event.at_s,
                "kind": event.kind,
                "subject": event.subject,
                "text": event.text,
                "fields": dict(event.fields),
            }
            if as_json:
                print(json.dumps(document), flush=True)
            else:
                stamp = time.strftime("%H:%M:%S", time.localtime(event.at_s))
                more = " ".join(f"{name}={value}" for name, value in event.fields.items())
                print(stamp, event.kind, event.subject, event.text, more, flush=True)


def report(
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write an archive for a bug report, without prompts."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="The config or plan file to put into the archive.")
    ] = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
) -> None:
    """How the targets are met and where requests are, or all that a bug report needs."""
    from cluster.cli.status import as_document, summarize

    check_output("output", output)
    if output is not None:
        from cluster.cli.bundle import collect, write_bundle

        files = collect(lambda: open_client(server, api_key), api_key, config)
        write_bundle(output, files)
        _tell({"written": str(output), "files": sorted(files)}, as_json=as_json)
        return
    if config is not None:
        raise BadRequest("config", config, "is for --output")
    with open_client(server, api_key) as client:
        document = summarize(as_document(client.status()))
    _tell(document, as_json=as_json)


def policy_apply(
    file: Path, *, as_json: Json = False, server: Server = None, api_key: ApiKey = None
) -> None:
    """Checks a policy and puts it in force."""
    with open_client(server, api_key) as client:
        changes = client.apply_policy(_read(file))
    _tell({"applied": str(file), "changes": changes}, as_json=as_json)


def policy_schema() -> None:
    """Prints the JSON schema of a policy file."""
    from cluster.policy_file import policy_schema as schema

    print(json.dumps(schema(), indent=2))


def policy_validate(file: Path, *, as_json: Json = False) -> None:
    """Checks a policy file without a cluster."""
    from cluster.policy_file import parse_policy

    parse_policy(_read(file))
    _tell({"valid": str(file)}, as_json=as_json)


def check_role(name: str) -> None:
    if name not in ROLES:
        raise BadRequest("role", name, f"must be one of {', '.join(ROLES)}")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise BadRequest("file", str(file), error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise BadRequest("file", str(file), "must be text in UTF-8") from error


def _tell(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for name, value in document.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name}: {shown if shown != '' else '-'}")
