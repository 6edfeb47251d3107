"""`tandem bench`: load against any OpenAI-compatible server, and what it did to it."""

from __future__ import annotations

import json
import secrets
import sys
from typing import TYPE_CHECKING, Any

from cluster.cli import bench_options as option  # noqa: TC001 - typer reads them
from cluster.cli.options import ApiKey, Json, check_output
from engine.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import typer

    from cluster.bench.goodput import Search
    from cluster.bench.http import Target
    from cluster.bench.run import Measured, Plan
    from placement.workload import Workload

DRAWN_REQUESTS = 200
ATTAINMENT = 0.9
ROUNDS = 3
THINK_S = 1.0


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    *,
    url: option.Url = "http://127.0.0.1:8000",
    vs: option.Versus = None,
    workload: option.WorkloadFile = None,
    rate: option.Rate = None,
    ramp_to: option.RampTo = None,
    concurrency: option.Concurrency = None,
    goodput: option.Goodput = False,
    attainment: option.Attainment = None,
    ttft: option.TargetSeconds = 2.0,
    tpot: option.TargetSeconds = 0.1,
    requests: option.Requests = None,
    duration_s: option.Duration = None,
    burstiness: option.Burstiness = None,
    prompt_tokens: option.PromptTokens = None,
    output_tokens: option.OutputTokens = None,
    spread: option.Spread = None,
    prefixes: option.Prefixes = None,
    prefix_tokens: option.PrefixTokens = None,
    turns: option.Turns = 1,
    think_s: option.Think = None,
    rounds: option.Rounds = None,
    warm_up: option.WarmUp = 4,
    seed: option.Seed = None,
    prompt_seed: option.PromptSeed = None,
    model: option.Model = None,
    chat: option.Chat = False,
    temperature: option.Temperature = 0.0,
    timeout_s: option.Timeout = 600.0,
    api_key: ApiKey = None,
    csv: option.CsvFile = None,
    report: option.ReportFile = None,
    as_json: Json = False,
) -> None:
    """Measure a server's latencies under load, from the moment each request was due."""
    from cluster.bench.arrange import Arrangement, Talk
    from cluster.bench.http import parse_target
    from cluster.bench.run import Plan
    from cluster.bench.server import Settings
    from engine.slo import Slo

    check_output("csv", csv)
    check_output("report", report)
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
    if concurrency is not None:
        when = {"rate": rate, "ramp-to": ramp_to, "burstiness": burstiness}
        _refuse(when | {"duration-s": duration_s}, "an open loop: leave out --concurrency")
    if not goodput:
        _refuse({"attainment": attainment}, "--goodput")
    if goodput or not vs:
        _refuse({"rounds": rounds}, "--vs, and no --goodput")
    if turns == 1:
        _refuse({"think-s": think_s}, "--turns")
    slo = Slo(_positive("ttft", ttft), _positive("tpot", tpot))
    load = _cut(_load(workload, rate, drawn, requests), duration_s)
    prompt_seed = secrets.randbits(32) if prompt_seed is None else prompt_seed
    settings = Settings(
        model, chat, temperature=temperature, timeout_s=timeout_s, prompt_seed=prompt_seed
    )
    plan = Plan(
        Arrangement(load, slo, Talk(turns, THINK_S if think_s is None else think_s)),
        concurrency=concurrency,
        search=_search(rate or load.rate_rps, attainment) if goodput else None,
        rounds=(rounds or ROUNDS) if vs else 1,
        warm_up=warm_up,
        settings=settings,
    )
    measured = _run(plan, [parse_target(one, api_key) for one in (url, *(vs or ()))])
    _tell(measured, csv, report, as_json=as_json)


def _refuse(given: Mapping[str, object], without: str) -> None:
    """Options that would have no effect as things stand."""
    for field, value in given.items():
        if value is not None:
            raise BadInput(field, value, f"needs {without}")


def _search(rate: float, attainment: float | None) -> Search:
    from cluster.bench.goodput import Search

    wanted = ATTAINMENT if attainment is None else attainment
    return Search(rate or 1.0, wanted)


def _positive(field: str, value: float) -> float:
    if not value > 0:
        raise BadInput(field, value, "must be positive")
    return value


def _load(
    path: Path | None, rate: float | None, drawn: Mapping[str, Any], requests: int | None
) -> Workload:
    """From the file if one is named, at its own times or stretched to a rate; else drawn."""
    if rate is not None:
        _positive("rate", rate)
    given = {name: value for name, value in drawn.items() if value is not None}
    if path is None:
        return _drawn(given, requests)
    for name in given.keys() - {"rate_rps"}:
        flag = name.removesuffix("_rps").replace("_", "-")
        raise BadInput(flag, given[name], "does not go with --workload, which says it all")
    return _read(path, rate, requests)


def _drawn(given: Mapping[str, Any], requests: int | None) -> Workload:
    from cluster.bench.arrange import Synthetic, draw

    if "prefix_tokens" in given and "prefixes" not in given:
        raise BadInput("prefix-tokens", given["prefix_tokens"], "needs --prefixes")
    return draw(Synthetic(requests=requests or DRAWN_REQUESTS, **given))


def _read(path: Path, rate: float | None, requests: int | None) -> Workload:
    from placement.workload_files import read_workload

    load = read_workload(path)
    load = load if requests is None else load.first(requests)
    return load if rate is None else load.at_rate(rate)


def _cut(load: Workload, duration_s: float | None) -> Workload:
    if duration_s is None:
        return load
    start_s = float(load.arrival_s[0])
    return load.between(start_s, start_s + _positive("duration-s", duration_s))


def _run(plan: Plan, targets: Sequence[Target]) -> list[Measured]:
    import uvloop

    from cluster.bench.run import Bench
    from cluster.bench.watch import progress_bars

    with progress_bars() as watch:
        return uvloop.run(Bench(plan, watch).run(targets))


def _tell(
    measured: Sequence[Measured], csv: Path | None, report: Path | None, *, as_json: bool
) -> None:
    """On standard output, and into the files that were asked for."""
    from cluster.bench.report import report as page
    from cluster.bench.sample import write_samples

    documents = [one.document() for one in measured]
    if csv is not None:
        with csv.open("w", newline="", encoding="utf-8") as out:
            write_samples(out, [(one.url, one.samples) for one in measured])
    if report is not None:
        report.write_text(page(measured, documents), encoding="utf-8")
    _print(documents, as_json=as_json)


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
