"""`tandem simulate`: what a plan would do with a workload, in virtual time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.cli import simulate_options as option  # noqa: TC001 - typer reads them
from cluster.cli.options import Json  # noqa: TC001 - as well
from cluster.cli.plan import Profile, Report, Workload, check_output, note_extrapolation
from engine.errors import BadConfig

if TYPE_CHECKING:
    from pathlib import Path

    import typer

    from cluster.config import Config
    from placement.planning.costbook import CostBook
    from placement.planning.plan import Plan
    from placement.simulation.deployment import Deployment
    from placement.simulation.dynamics import Dynamics
    from placement.simulation.simulator import Simulation
    from placement.workload import Workload as Load


def register(app: typer.Typer) -> None:
    app.command()(simulate)


def simulate(
    *,
    plan: option.PlanFile,
    workload: Workload,
    rate: option.Rate = None,
    policy: option.Policy = None,
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

    check_output("report", report)
    if policy is None:
        _refuse({"start-s": start_s}, "needs --policy")
    else:
        beside = {"report": report, "admission": admission or None}
        _refuse(beside, "is for a plan as it stands: not with --policy")
    planned, config = read_plan_file(plan), config_of(plan)
    book = cost_book(planned.model, planned_fleet(planned, profile))
    load = read_workload(workload)
    load = load if rate is None else load.at_rate(rate)
    deployment = _deployment(planned, config, book, load)
    dynamics = _dynamics(config, policy, start_s, admission=admission)
    simulation = Simulation(deployment, load, dynamics=dynamics)
    figures = _figures(simulation, dynamics, planned, book)
    if report is not None:
        from cluster.cli.plan_report import simulation_report

        text = simulation_report(planned, deployment, load, dynamics, figures)
        report.write_text(text, encoding="utf-8")
    _show(figures, as_json=as_json)
    _note_what_is_not_simulated(plan)


def _refuse(given: dict[str, object], rule: str) -> None:
    for field, value in given.items():
        if value is not None:
            raise BadConfig(field, value, rule)


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
    if "fleet" in figures:
        show_fleet(figures["fleet"])


def _note_what_is_not_simulated(plan: Path) -> None:
    from cluster.cli.planning import not_simulated

    if unheeded := not_simulated(plan):
        print(f"not simulated: {', '.join(unheeded)}", file=sys.stderr)
