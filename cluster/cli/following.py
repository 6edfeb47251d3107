"""`tandem simulate --policy`: what a policy would have done with a plan's fleet, and its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.policy_file import parse_policy, starting_policy
from engine.errors import BadConfig
from engine.messages import Role

if TYPE_CHECKING:
    from pathlib import Path

    from placement.planning.costbook import CostBook
    from placement.planning.plan import Plan
    from placement.scaling.policy import Policy
    from placement.simulation.dynamics import FleetRecord

SHOWN_CHANGES = 40
"""Of the timeline in the terminal; all are in the JSON."""


def read_policy(path: Path) -> Policy:
    text = starting_policy(path)
    assert text is not None
    return parse_policy(text)


def check_budget(planned: Plan, policy: Policy) -> None:
    if planned.workers > policy.budget_accelerators:
        rule = f"the plan starts with {planned.workers} accelerators"
        raise BadConfig("budget_accelerators", policy.budget_accelerators, rule)


def fleet_figures(
    record: FleetRecord, policy: Policy, planned: Plan, book: CostBook
) -> dict[str, Any]:
    """What became of the fleet, beside what the plan would cost as it stands."""
    hours = record.lasted_s / 3600.0
    static_cost = sum(pool.instances * book.cost_per_hour(pool.cut) for pool in planned.pools)
    return {
        "policy": policy.name,
        "accelerator_hours": record.accelerator_hours,
        "cost": record.cost(_prices(planned, book)),
        "plan_accelerator_hours": planned.workers * hours,
        "plan_cost": static_cost * hours,
        "most_accelerators": record.most_accelerators,
        "direction_changes_per_hour": record.turns_an_hour,
        "starts": record.starts,
        "failed_starts": record.failed_starts,
        "stops": record.stops,
        "switches": record.switches,
        "migrations": record.migrations,
        "timeline": _timeline(record),
    }


def _prices(planned: Plan, book: CostBook) -> dict[str, float]:
    """Dollars an hour of one worker, by role; one that is not planned is as the first."""
    cuts = {pool.role.value: pool.cut for pool in reversed(planned.pools)}
    first = planned.pools[0].cut
    prices = {}
    for role in Role:
        cut = cuts.get(role.value, first)
        prices[role.value] = book.cost_per_hour(cut) / cut.workers
    return prices


def _timeline(record: FleetRecord) -> list[dict[str, Any]]:
    return [{"time_s": round(at, 3), **counts} for at, counts in record.timeline]


def show_fleet(fleet: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", fleet["policy"], "the plan as it stands", title="Fleet", title_justify="left")
    hours = (fleet["accelerator_hours"], fleet["plan_accelerator_hours"])
    table.add_row("accelerator-hours", *(f"{value:.3f}" for value in hours))
    table.add_row("cost ($)", f"{fleet['cost']:.2f}", f"{fleet['plan_cost']:.2f}")
    for name in ("most_accelerators", "starts", "failed_starts", "stops", "switches", "migrations"):
        table.add_row(name.replace("_", " "), str(fleet[name]), "")
    for role, turns in fleet["direction_changes_per_hour"].items():
        table.add_row(f"direction changes an hour, {role}", f"{turns:.2f}", "")
    roles = sorted({key for change in fleet["timeline"] for key in change} - {"time_s"})
    changes = Table("time (s)", *roles, title="Instances", title_justify="left")
    for change in fleet["timeline"][:SHOWN_CHANGES]:
        counts = (str(change.get(role, 0)) for role in roles)
        changes.add_row(f"{change['time_s']:.0f}", *counts)
    console = Console()
    console.print(table, changes)
    left = len(fleet["timeline"]) - SHOWN_CHANGES
    if left > 0:
        console.print(f"and {left} changes more, see --json")
