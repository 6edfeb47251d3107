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
Burstiness = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="Draws arrivals with this coefficient of variation of gaps: 1 is Poisson."
    ),
]
DaySwing = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Draws a day whose rate swings by this share around its mean."
    ),
]
PeakHour = Annotated[
    float | None,
    typer.Option(min=0.0, max=24.0, help="Of that day.", show_default="15"),
]
Requests = Annotated[int | None, typer.Option(min=1, help="How many, if not all.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of what is drawn.", show_default="0")]

# What acts on the instances.
Policy = Annotated[
    Path | None, typer.Option(help="An autoscaling policy to follow.", metavar="FILE")
]
StartSeconds = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=LONGEST_S,
        help="With a policy or a failure: until a started instance serves.",
        show_default="60",
    ),
]
Fail = Annotated[
    list[str] | None,
    typer.Option(
        help="An instance fails then and is started again; repeatable.",
        metavar="INSTANCE@SECONDS",
    ),
]
Admission = Annotated[
    bool,
    typer.Option("--admission", help="Refuse at once what would miss its TTFT, as a gateway."),
]
