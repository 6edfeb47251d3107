"""`tandem serve` and `tandem doctor`: what runs on this machine."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.config import Config

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(doctor)


def serve(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.yaml | PLAN.yaml | MODEL]",
            help='A config file, a plan, a checkpoint directory or a hub id; "demo" if not given.',
        ),
    ] = None,
    *,
    prefill: Annotated[int | None, typer.Option(help="Prefill instances.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode instances.")] = None,
    mixed: Annotated[int | None, typer.Option(help="Instances that do both.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    http_port: Annotated[int | None, typer.Option(help="0 picks a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0 picks a free one.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; without it, one is started here.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="An autoscaling policy file.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the config's schema.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow other hosts in without TLS or keys.")
    ] = False,
) -> None:
    """Starts the cluster in the foreground, until SIGINT or SIGTERM."""
    from cluster.config import load_config
    from cluster.config_docs import config_schema
    from cluster.watching.logs import set_up_logging

    if schema:
        print(json.dumps(config_schema(), indent=2))
        return
    set_up_logging()
    flags = {
        "device": device,
        "gateway.host": host,
        "gateway.http_port": http_port,
        "gateway.grpc_port": grpc_port,
        "autoscaling.policy": policy,
        **pool_flags(prefill, decode, mixed, alone=source is None or not source.endswith("ml")),
    }
    given = {path: value for path, value in flags.items() if value is not None}
    config = load_config(source, **given)
    check_exposure(config, insecure=insecure)
    from cluster.deploy import serve as serve_config

    serve_config(config, address, _say_ready)


def _say_ready(line: str) -> None:
    print(line, flush=True)


def pool_flags(
    prefill: int | None, decode: int | None, mixed: int | None, *, alone: bool
) -> dict[str, Any]:
    """Instance counts; without a config file, --mixed alone means no others."""
    if alone and mixed and prefill is None and decode is None:
        prefill = decode = 0
    return {
        "pools.prefill.instances": prefill,
        "pools.decode.instances": decode,
        "pools.mixed.instances": mixed,
    }


def check_exposure(config: Config, *, insecure: bool) -> None:
    """Other hosts may reach an unprotected server only if somebody insists."""
    from cluster.doors.tls import check_tls, exposure_warning

    gateway = config.gateway
    keys = gateway.api_keys_file is not None
    warning = exposure_warning(gateway.host, gateway.tls, keys=keys, insecure=insecure)
    if warning is not None:
        print(warning, file=sys.stderr)
    if gateway.tls is not None:
        check_tls(gateway.tls)


def doctor(*, as_json: Json = False) -> None:
    """What this machine offers and what is missing."""
    from cluster.cli.doctor import examine, show

    findings = examine()
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        show(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)
