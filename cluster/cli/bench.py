"""`tandem bench`: load against any OpenAI-compatible server, and what it did to it."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path  # noqa: TC003 - typer reads it from the signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import ApiKey, Json  # noqa: TC001 - so does it these
from engine.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.bench.http import Target as Endpoint
    from cluster.bench.run import Measured, Plan
    from placement.workload import Workload

DRAWN_REQUESTS = 200
Target = Annotated[float, typer.Option(help="Target; a workload's own columns win.")]


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    *,
    url: Annotated[str, typer.Option(help="The server's base URL.")] = "http://127.0.0.1:8000",
    vs: Annotated[
        list[str] | None, typer.Option(help="Another server to compare with; repeatable.")
    ] = None,
    workload: Annotated[
        Path | None, typer.Option(help="Our CSV, or an Azure, BurstGPT or Mooncake trace.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second; stretches a workload's own times.")
    ] = None,
    ramp_to: Annotated[
        float | None, typer.Option(help="The rate rises (or falls) to this one.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop with so many users instead.")
    ] = None,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Find the highest rate that keeps the attainment.")
    ] = False,
    attainment: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The share that must meet its targets.")
    ] = 0.9,
    ttft: Target = 2.0,
    tpot: Target = 0.1,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many; 200, or all of a workload.")
    ] = None,
    duration_s: Annotated[
        float | None, typer.Option(help="Only requests that are due before this.")
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Coefficient of variation of the gaps: 1 is Poisson.", show_default="1"
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Median length.", show_default="256")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Median length.", show_default="64")
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of the lengths' logarithm: 0 is all alike.", show_default="0"),
    ] = None,
    prefixes: Annotated[
        int | None, typer.Option(min=1, help="How many texts prompts begin with.")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(min=1, help="Their length.", show_default="128")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each conversation.")] = 1,
    think_s: Annotated[float, typer.Option(min=0.0, help="Between its turns.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often servers take turns.")] = 3,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before, not counted.")] = 4,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of times and lengths.", show_default="0")
    ] = None,
    prompt_seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            help="Of the prompts; new in every run, so that no prefix cache knows them.",
            show_default="random, printed",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The first one served.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    timeout_s: Annotated[float, typer.Option(help="Per request.")] = 600.0,
    api_key: ApiKey = None,
    csv: Annotated[Path | None, typer.Option(help="Every request, one row each.")] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML page with plots.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a server's latencies under load, from the moment each request was due."""
    from cluster.bench.arrange import Arrangement, Talk
    from cluster.bench.goodput import Search
    from cluster.bench.http import parse_target
    from cluster.bench.report import report as page
    from cluster.bench.run import Plan
    from cluster.bench.sample import write_samples
    from cluster.bench.server import Settings
    from engine.slo import Slo

    drawn = {
        "rate_rps": rate,
        "ramp_to_rps": ramp_to,
        "burstiness": burstiness,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "spread": spread,
        "prefixes": prefixes,
        "prefix_tokens": prefix_tokens,
        "seed": seed,
    }
    if goodput and (concurrency is not None or ramp_to is not None):
        raise BadInput("goodput", True, "looks for one rate: without --concurrency and --ramp-to")
    slo = Slo(_positive("ttft", ttft), _positive("tpot", tpot))
    load = _cut(_load(workload, rate, drawn, requests), duration_s)
    plan = Plan(
        Arrangement(load, slo, Talk(turns, think_s)),
        concurrency=concurrency,
        search=Search(rate or load.rate_rps or 1.0, attainment) if goodput else None,
        rounds=rounds if vs else 1,
        warm_up=warm_up,
        settings=Settings(
            model,
            chat,
            temperature=temperature,
            timeout_s=timeout_s,
            prompt_seed=secrets.randbits(32) if prompt_seed is None else prompt_seed,
        ),
    )
    measured = _run(plan, [parse_target(one, api_key) for one in (url, *(vs or ()))])
    documents = [one.document() for one in measured]
    if csv is not None:
        with csv.open("w", newline="", encoding="utf-8") as out:
            write_samples(out, [(one.url, one.samples) for one in measured])
    if report is not None:
        report.write_text(page(measured, documents), encoding="utf-8")
    _print(documents, as_json=as_json)


def _positive(field: str, value: float) -> float:
    if value <= 0:
        raise BadInput(field, value, "must be positive")
    return value


def _load(
    path: Path | None, rate: float | None, drawn: dict[str, Any], requests: int | None
) -> Workload:
    """From the file if one is named, at its own times or stretched to a rate; else drawn."""
    from cluster.bench.arrange import Synthetic, draw
    from placement.workload_files import read_workload

    if rate is not None:
        _positive("rate", rate)
    given = {name: value for name, value in drawn.items() if value is not None}
    if path is None:
        if "prefix_tokens" in given and "prefixes" not in given:
            raise BadInput("prefix-tokens", given["prefix_tokens"], "needs --prefixes")
        return draw(Synthetic(requests=requests or DRAWN_REQUESTS, **given))
    for name in given.keys() - {"rate_rps"}:
        flag = name.removesuffix("_rps").replace("_", "-")
        raise BadInput(flag, given[name], "does not go with --workload, which says it all")
    load = read_workload(path)
    load = load if requests is None else load.first(requests)
    return load if rate is None else load.at_rate(rate)


def _cut(load: Workload, duration_s: float | None) -> Workload:
    if duration_s is None:
        return load
    start_s = float(load.arrival_s[0])
    return load.between(start_s, start_s + _positive("duration-s", duration_s))


def _run(plan: Plan, targets: Sequence[Endpoint]) -> list[Measured]:
    import uvloop

    from cluster.bench.run import Bench
    from cluster.bench.watch import progress_bars

    with progress_bars() as watch:
        return uvloop.run(Bench(plan, watch).run(targets))


def _print(documents: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    from rich.console import Console

    from cluster.bench.run import whole_document
    from cluster.bench.table import figures_table

    if as_json:
        print(json.dumps(whole_document(documents), allow_nan=False))
        return
    Console().print(figures_table(documents))
    for found in documents:
        for note in found["notes"]:
            print(f"{found['url']}: {note}", file=sys.stderr)
