"""What `tandem simulate` can be told, an option each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LONGEST_S = 1e9

PlanFile = Annotated[Path, typer.Option(help="What `tandem plan` wrote.", metavar="FILE")]
Rate = Annotated[
    float | None, typer.Option(help="Requests a second; stretches the workload's own times.")
]

# What acts on the instances.
Policy = Annotated[
    Path | None, typer.Option(help="An autoscaling policy to follow.", metavar="FILE")
]
StartSeconds = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=LONGEST_S,
        help="With a policy: until a started instance serves.",
        show_default="60",
    ),
]
Admission = Annotated[
    bool,
    typer.Option("--admission", help="Refuse at once what would miss its TTFT, as a gateway."),
]
