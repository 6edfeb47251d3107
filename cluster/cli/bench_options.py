"""What `tandem bench` can be told, an option each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# The server.
Url = Annotated[str, typer.Option(help="The server's base URL.")]
Versus = Annotated[
    list[str] | None, typer.Option(help="Another server to compare with; repeatable.")
]
Model = Annotated[str | None, typer.Option(help="The first one served.")]
Chat = Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions.")]
Temperature = Annotated[float, typer.Option(min=0.0)]
Timeout = Annotated[float, typer.Option(help="Per request.")]

# When requests are sent, and how many.
WorkloadFile = Annotated[
    Path | None, typer.Option(help="Our CSV, or an Azure, BurstGPT or Mooncake trace.")
]
Rate = Annotated[
    float | None, typer.Option(help="Requests a second; stretches a workload's own times.")
]
RampTo = Annotated[float | None, typer.Option(help="The rate rises (or falls) to this one.")]
Burstiness = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="Coefficient of variation of the gaps: 1 is Poisson.", show_default="1"
    ),
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="Closed loop with so many users instead.")
]
Requests = Annotated[int | None, typer.Option(min=1, help="How many; 200, or all of a workload.")]
Duration = Annotated[float | None, typer.Option(help="Only requests that are due before this.")]
Rounds = Annotated[
    int | None, typer.Option(min=1, help="How often servers take turns.", show_default="3")
]
WarmUp = Annotated[int, typer.Option(min=0, help="Requests before, not counted.")]

# What they ask for.
PromptTokens = Annotated[int | None, typer.Option(min=1, help="Median length.", show_default="256")]
OutputTokens = Annotated[int | None, typer.Option(min=1, help="Median length.", show_default="64")]
Spread = Annotated[
    float | None,
    typer.Option(min=0.0, help="Of the lengths' logarithm: 0 is all alike.", show_default="0"),
]
Prefixes = Annotated[int | None, typer.Option(min=1, help="How many texts prompts begin with.")]
PrefixTokens = Annotated[int | None, typer.Option(min=1, help="Their length.", show_default="128")]
Turns = Annotated[int, typer.Option(min=1, help="Turns of each conversation.")]
Think = Annotated[
    float | None, typer.Option(min=0.0, help="Between its turns.", show_default="1.0")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of times and lengths.", show_default="0")]
PromptSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**32 - 1,
        help="Of the prompts; new in every run, so that no prefix cache knows them.",
        show_default="random, printed",
    ),
]

# What is wanted of the server, and what is written.
Goodput = Annotated[
    bool, typer.Option("--goodput", help="Find the highest rate that keeps the attainment.")
]
Attainment = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="The share that must meet its targets.", show_default="0.9"
    ),
]
TargetSeconds = Annotated[float, typer.Option(help="Target; a workload's own columns win.")]
CsvFile = Annotated[Path | None, typer.Option(help="Every request, one row each.")]
ReportFile = Annotated[Path | None, typer.Option(help="An HTML page with plots.")]
