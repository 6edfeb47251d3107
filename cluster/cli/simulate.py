"""`tandem simulate`: what a plan would do with a workload, in virtual time."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.cli import simulate_options as option
from cluster.cli.options import Json, check_output
from cluster.cli.plan import lengths_of, note_extrapolation
from cluster.cli.plan_options import LengthsFrom, Profile, Report, Workload  # noqa: TC001 - too
from engine.errors import BadConfig, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import typer

    from cluster.config import Config
    from placement.planning.costbook import CostBook
    from placement.planning.plan import Plan
    from placement.simulation.deployment import Deployment
    from placement.simulation.dynamics import Dynamics, Failure
    from placement.simulation.simulator import Simulation
    from placement.workload import Workload as Load
    from placement.workload_redrawn import Redraw

STARTED = re.compile(r"(prefill|decode|mixed)-\d+")
"""What a policy may have started."""


def register(app: typer.Typer) -> None:
    app.command()(simulate)


def simulate(
    *,
    plan: option.PlanFile,
    workload: Workload,
    rate: option.Rate = None,
    lengths: LengthsFrom = "seen",
    burstiness: option.Burstiness = None,
    day_swing: option.DaySwing = None,
    peak_hour: option.PeakHour = None,
    requests: option.Requests = None,
    seed: option.Seed = None,
    policy: option.Policy = None,
    fail: option.Fail = None,
    start_s: option.StartSeconds = None,
    admission: option.Admission = False,
    profile: Profile = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """What a plan would do with a workload, by the cluster's own schedulers in virtual time."""
    from cluster.cli.planning import config_of, cost_book, planned_fleet, read_plan_file
    from placement.simulation.simulator import Simulation
    from placement.workload_files import read_workload
    from placement.workload_redrawn import redrawn

    check_output("report", report)
    _check_acting(policy, fail, start_s, report, admission=admission)
    redraw = _redraw(lengths, burstiness, (day_swing, peak_hour), requests, seed)
    planned, config = read_plan_file(plan), config_of(plan)
    book = cost_book(planned.model, planned_fleet(planned, profile), config.engine)
    load = redrawn(read_workload(workload), redraw, rate)
    deployment = _deployment(planned, config, book, load)
    dynamics = _dynamics(config, policy, start_s, admission=admission)
    dynamics = replace(dynamics, failures=_failures(fail or (), deployment, policy))
    simulation = Simulation(deployment, load, dynamics=dynamics)
    figures = _figures(simulation, dynamics, planned, book)
    if report is not None:
        from cluster.cli.plan_report import simulation_report

        text = simulation_report(planned, deployment, load, dynamics, figures)
        report.write_text(text, encoding="utf-8")
    _show(figures, as_json=as_json)
    _note_what_is_not_simulated(plan, figures, len(dynamics.failures))


def _refuse(given: Mapping[str, object], rule: str) -> None:
    for field, value in given.items():
        if value is not None:
            raise BadConfig(field, value, rule)


def _check_acting(
    policy: Path | None,
    fail: list[str] | None,
    start_s: float | None,
    report: Path | None,
    *,
    admission: bool,
) -> None:
    if policy is None and not fail:
        _refuse({"start-s": start_s}, "needs --policy or --fail")
    if policy is not None:
        beside = {"report": report, "admission": admission or None}
        _refuse(beside, "is for a plan as it stands: not with --policy")


def _redraw(
    lengths: str,
    burstiness: float | None,
    day: tuple[float | None, float | None],
    requests: int | None,
    seed: int | None,
) -> Redraw:
    from placement.workload_redrawn import Redraw

    swing, peak_hour = day
    kind = lengths_of(lengths)
    if swing is None:
        _refuse({"peak-hour": peak_hour}, "needs --day-swing")
    else:
        _refuse({"requests": requests}, "a day has as many as its rate brings: no --day-swing")
    if burstiness is None and swing is None and lengths == "seen":
        _refuse({"seed": seed}, "needs --burstiness, --day-swing or --lengths fitted")
    redraw = Redraw(kind, burstiness, swing, requests=requests, seed=seed or 0)
    return redraw if peak_hour is None else replace(redraw, peak_hour=peak_hour)


def _failures(
    asked: Iterable[str], deployment: Deployment, policy: Path | None
) -> tuple[Failure, ...]:
    """Of instances of the plan; with a policy also of those that may be started."""
    return tuple(_failure(text, deployment.names, may_start=policy is not None) for text in asked)


def _failure(text: str, names: Sequence[str], *, may_start: bool) -> Failure:
    from placement.simulation.dynamics import Failure

    name, _, seconds = text.rpartition("@")
    try:
        time_s = float(seconds)
    except ValueError:
        time_s = -1.0
    if not name or not 0 <= time_s <= option.LONGEST_S:
        raise BadConfig("fail", text, "must be INSTANCE@SECONDS, as in decode-0@30")
    if name not in names and not (may_start and STARTED.fullmatch(name)):
        raise unknown_name("fail", name, names)
    return Failure(time_s, name)


def _deployment(planned: Plan, config: Config, book: CostBook, load: Load) -> Deployment:
    """The pools that the fleet has room for, as their config has them served."""
    from cluster.cli.planning import as_configured, check_memory, check_room
    from placement.planning.candidate import deployment_for

    check_room(planned, book.hardware)
    check_memory(planned, book, load)
    return as_configured(deployment_for(planned, book), config)


def _dynamics(
    config: Config, policy: Path | None, start_s: float | None, *, admission: bool
) -> Dynamics:
    from cluster.cli.following import read_policy
    from cluster.cli.planning import dynamics_of

    dynamics = dynamics_of(config, admission=admission)
    if policy is not None:
        dynamics = replace(dynamics, policy=read_policy(policy))
    return dynamics if start_s is None else replace(dynamics, start_s=start_s)


def _figures(
    simulation: Simulation, dynamics: Dynamics, planned: Plan, book: CostBook
) -> dict[str, Any]:
    from cluster.cli.following import check_budget, fleet_figures

    if dynamics.policy is not None:
        check_budget(planned, dynamics.policy)
    outcome = simulation.run()
    figures = outcome.figures()
    if dynamics.admission is not None:
        figures["refused"] = outcome.refused
    if dynamics.policy is not None:
        figures["fleet"] = fleet_figures(simulation.record, dynamics.policy, planned, book)
    if dynamics.failures:
        record = simulation.record
        figures["failures"] = {"instances": record.losses, "replayed_requests": record.replays}
    if outcome.beyond:
        figures["extrapolated"] = list(outcome.beyond)
    return figures


def _show(figures: dict[str, Any], *, as_json: bool) -> None:
    from rich.console import Console

    from cluster.cli.following import show_fleet
    from cluster.cli.plan_table import figures_table

    if as_json:
        print(json.dumps(figures, allow_nan=False))
        return
    Console().print(figures_table("simulated", figures))
    note_extrapolation(figures)
    if "failures" in figures:
        instances, replayed = figures["failures"].values()
        print(f"instances that failed: {instances}; requests answered anew: {replayed}")
    if "fleet" in figures:
        show_fleet(figures["fleet"])


def _note_what_is_not_simulated(plan: Path, figures: dict[str, Any], failures: int) -> None:
    from cluster.cli.planning import not_simulated

    if unheeded := not_simulated(plan):
        print(f"not simulated: {', '.join(unheeded)}", file=sys.stderr)
    missed = failures - figures["failures"]["instances"] if failures else 0
    if missed:
        print(f"failures of instances that were not there: {missed}", file=sys.stderr)
