"""What `tandem plan` can be told, an option each; the first four `tandem simulate`, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Workload = Annotated[
    Path, typer.Option(help="Our CSV, or an Azure, BurstGPT or Mooncake trace.", metavar="FILE")
]
LengthsFrom = Annotated[
    str,
    typer.Option(
        help="seen, or fitted: drawn from a log-normal distribution like the workload's, "
        "without shared prefixes."
    ),
]
Report = Annotated[
    Path | None, typer.Option(help="Draws plots into this file.", metavar="FILE.html")
]
Profile = Annotated[Path | None, typer.Option(help="What `tandem profile` measured here.")]

Model = Annotated[str, typer.Option(help="demo, a directory, or a model of the catalog.")]
Hardware = Annotated[Path, typer.Option(help="The fleet.", metavar="FILE")]
Seconds = Annotated[float, typer.Option(help="Target in seconds.")]
Attainment = Annotated[float, typer.Option(help="The share that must meet both.")]
Goal = Annotated[
    str,
    typer.Option(help="goodput, goodput-per-accelerator, or least accelerators, cost or power."),
]
Rate = Annotated[float | None, typer.Option(help="Requests a second to be served.")]
PowerCap = Annotated[float | None, typer.Option(help="Watts of all accelerators.")]
Requests = Annotated[int, typer.Option(help="Simulated of each candidate at least.")]
Processes = Annotated[
    int | None, typer.Option(min=1, help="That simulate.", show_default="one per core")
]
Seed = Annotated[int, typer.Option(min=0)]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="The plan.", metavar="PLAN.yaml")
]
