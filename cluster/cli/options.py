"""What several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import BadConfig

if TYPE_CHECKING:
    from cluster.client import Client

Server = Annotated[
    str | None,
    typer.Option(envvar="TANDEM_SERVER", help="gRPC address.", show_default="127.0.0.1:50051"),
]
ApiKey = Annotated[str | None, typer.Option(envvar="TANDEM_API_KEY", help="Key to show.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
CA_VARIABLE = "TANDEM_CA"


def open_client(server: str | None, api_key: str | None) -> Client:
    """TANDEM_CA names the PEM file of the server's authority where it speaks TLS."""
    import os

    from cluster.access import DEFAULT_SERVER, Access
    from cluster.client import Client

    ca = os.environ.get(CA_VARIABLE)
    return Client(Access(server or DEFAULT_SERVER, api_key, Path(ca) if ca else None))


def check_output(option: str, path: Path | None) -> None:
    """Before the work whose result could not be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise BadConfig(option, str(path), "must be a file in a directory that exists")
