"""`tandem profile` and `tandem plan`: what would run best, before it runs."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path  # noqa: TC003 - typer reads annotations
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import plan_options as option  # noqa: TC001 - these, too
from cluster.cli.options import Json, check_output
from engine.errors import unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from placement.latency.measured import Run
    from placement.latency.profile import Profile as Measurements
    from placement.planning.costbook import CostBook
    from placement.planning.optimizer import Answer
    from placement.planning.plan import Plan
    from placement.planning.question import Objective, Question
    from placement.workload import Workload as Load
    from placement.workload_redrawn import Lengths

MOST_REQUESTS_FACTOR = 8
"""A candidate that serves many needs more requests for its batches to fill."""


def register(app: typer.Typer) -> None:
    app.command()(profile)
    app.command()(plan)


def plan(
    *,
    model: option.Model,
    hardware: option.Hardware,
    workload: option.Workload,
    ttft: option.Seconds,
    tpot: option.Seconds,
    attainment: option.Attainment = 0.9,
    objective: option.Goal = "goodput",
    lengths: option.LengthsFrom = "seen",
    rate: option.Rate = None,
    power_cap: option.PowerCap = None,
    requests: option.Requests = 600,
    processes: option.Processes = None,
    seed: option.Seed = 0,
    profile: option.Profile = None,
    output: option.Output = None,
    report: option.Report = None,
    as_json: Json = False,
) -> None:
    """The pools that serve most within the targets, and what they beat."""
    from cluster.cli.planning import cost_book, fleet_with
    from placement.planning.plan import Target
    from placement.planning.question import Question
    from placement.workload_files import read_workload
    from placement.workload_redrawn import Redraw, redrawn

    check_output("output", output)
    check_output("report", report)
    fleet = fleet_with(hardware, profile)
    book = cost_book(model, fleet)
    question = Question(
        Target(ttft, tpot, attainment),
        _objective(objective),
        rate,
        power_cap,
        requests=requests,
        most_requests=requests * MOST_REQUESTS_FACTOR,
        seed=seed,
        processes=processes or os.cpu_count() or 1,
        overheads=book.overheads,
    )
    redraw = Redraw(lengths_of(lengths), seed=seed)
    answer = _answer(book, redrawn(read_workload(workload), redraw), question)
    found = replace(answer.plan, model=model, hardware=fleet)
    _write_plan(answer, found, output, report)
    _show_plan(found, as_json=as_json)


def _answer(book: CostBook, load: Load, question: Question) -> Answer:
    from placement.planning.optimizer import answer

    with _progress("simulating candidates") as progress:
        return answer(book, load, question, progress)


def _write_plan(answer: Answer, found: Plan, output: Path | None, report: Path | None) -> None:
    if output is not None:
        output.write_text(found.to_yaml(), encoding="utf-8")
    if report is not None:
        from cluster.cli.plan_report import plan_report

        with _progress("drawing the report") as progress:
            report.write_text(plan_report(answer, found, progress), encoding="utf-8")


def profile(
    model: Annotated[str, typer.Argument(help="demo, a checkpoint directory or a hub id.")],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The profile.", metavar="PROFILE.json")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    device_name: Annotated[
        str | None, typer.Option(help="In the catalog.", show_default="by what is found")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of a CPU worker.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="auto, or float8_e4m3fn on a GPU.")] = "auto",
    rounds: Annotated[
        int, typer.Option(min=1, help="Over all passes; the mean of middle halves counts.")
    ] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer passes.")] = False,
    neighbours: Annotated[
        int, typer.Option(min=0, help="Measures also while so many other instances compute here.")
    ] = 0,
    serving: Annotated[
        int, typer.Option(min=0, help="So many times servers and their clients are measured, too.")
    ] = 0,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Measures passes also over so many workers of this machine.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the requests to measured servers.")] = 0,
    as_json: Json = False,
) -> None:
    """Measures passes of the engine and KV copies on this machine, and fits what they cost."""
    check_output("output", output)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from cluster.profiling.measure import Measuring, find_device, measure

    found = find_device(device, device_name)
    settings = Measuring(
        model,
        found,
        threads=threads,
        dtype=dtype,
        kv_dtype=kv_dtype,
        rounds=rounds,
        quick=quick,
        neighbours=neighbours,
        serving=serving,
        tensor_parallel=tensor_parallel,
        seed=seed,
    )
    with _progress("measuring") as progress:
        document = measure(settings, progress)
    output.write_text(json.dumps(document, indent=1), encoding="utf-8")
    _show_profile(document, as_json=as_json)


def lengths_of(name: str) -> Lengths:
    from placement.workload_redrawn import Lengths

    names = [one.value for one in Lengths]
    if name not in names:
        raise unknown_name("lengths", name, names)
    return Lengths(name)


def _objective(name: str) -> Objective:
    from placement.planning.question import Objective

    names = [objective.value for objective in Objective]
    if name not in names:
        raise unknown_name("objective", name, names)
    return Objective(name)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, told how much of how much is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), refresh_per_second=2) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _show_plan(found: Plan, *, as_json: bool) -> None:
    import yaml
    from rich.console import Console

    from cluster.cli.plan_table import alternatives_table, figures_table, pools_table

    if as_json:
        print(json.dumps(yaml.safe_load(found.to_yaml()), allow_nan=False))
        return
    console = Console()
    console.print(pools_table(found), figures_table("predicted", found.predicted))
    if found.alternatives:
        console.print(alternatives_table(found))
    console.print(found.reason, highlight=False)
    note_extrapolation(found.predicted)


def note_extrapolation(figures: dict[str, Any]) -> None:
    for beyond in figures.get("extrapolated", ()):
        print(f"beyond what was measured: {beyond}", file=sys.stderr)


def _both_ways(run: Run) -> Iterator[tuple[float, float]]:
    """What each pass took beside neighbours, and alone."""
    for crowded, alone in zip(run.crowded_samples, run.samples, strict=False):
        yield crowded.seconds, alone.seconds


def _show_serving(measured: Measurements) -> None:
    """What steps take in service, and what requests wait for beside them."""
    from cluster.profiling.others import DISTURBING_CORES

    machine = measured.machine(1, 1)
    if machine is not None:
        between, times = measured.in_service.between, measured.in_service.times
        prompts, decodes, _ = machine.waits
        print(
            f"in service, passes take {times.prompts:.2f} (prompts) and {times.decodes:.2f} times "
            f"(decodes) as long, {times.several_s * 1e3:.2f} ms more where several decode, and "
            f"{machine.cold_s * 1e3:.2f} ms more after a rest, or where no prompts follow some"
        )
        print(
            f"between passes: {between.step_s * 1e3:.2f} ms, {between.token_s * 1e6:.0f} us a "
            f"token, {between.prompts_s * 1e3:.2f} ms more after prompts"
        )
        print(
            f"waiting for a processor: prompts {prompts.alone:.0%} of their time, "
            f"{prompts.beside:.0%} beside neighbours; decodes {decodes.alone:.0%} and "
            f"{decodes.beside:.0%}"
        )
        print(f"a request is {measured.arrival_s * 1e3:.1f} ms on its way")
    if measured.handoff_s:
        print(f"a hand-off takes {measured.handoff_s * 1e3:.1f} ms beside its copy")
    if measured.other_cores > DISTURBING_CORES:
        print(
            f"other processes, or other guests of this machine's host, took "
            f"{measured.other_cores:.2f} cores while a server was measured, and made it slower: "
            "profile again without them",
            file=sys.stderr,
        )


def _show_profile(document: dict[str, Any], *, as_json: bool) -> None:
    from rich.console import Console

    from cluster.cli.plan_table import samples_table
    from placement.latency.measured import fit_link, fit_run
    from placement.latency.profile_file import profile_from

    if as_json:
        print(json.dumps(document, allow_nan=False))
        return
    measured = profile_from(document)
    run, *cut_runs = measured.runs
    fit, report = fit_run(run)
    console = Console()
    console.print(samples_table(run.samples, [fit.step_s(one.step) for one in run.samples]))
    print(f"{measured.model} on {measured.device}: {report}")
    for cut in cut_runs:
        print(f"over {cut.tensor_parallel} workers: {fit_run(cut)[1]}")
    if run.crowded_samples:
        _, crowded = fit_run(run.beside)
        slower = [crowded_s / alone_s for crowded_s, alone_s in _both_ways(run)]
        print(
            f"neighbours that compute: {run.neighbours}; passes take {median(slower):.2f} times "
            f"as long in the median; {crowded}"
        )
    _show_serving(measured)
    if not measured.transfers:
        print("KV transfer was not measured: it takes two GPUs", file=sys.stderr)
        return
    link = fit_link(measured.transfers)
    print(f"KV transfer: {link.latency_s * 1e6:.0f} us + {link.bytes_per_s / 1e9:.2f} GB/s")
