"""Plans, simulations and profiles as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from cluster.bench.table import COUNTS, LATENCY_TITLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from placement.latency.measured import Sample
    from placement.planning.plan import Plan

SHARE = ("attainment", "within targets", "{:.1%}")
COSTS = (
    ("goodput_rps_per_gpu", "goodput per accelerator (1/s)", "{:.3f}"),
    ("cost_per_hour", "cost per hour ($)", "{:.2f}"),
    ("power_w", "power (W)", "{:.0f}"),
)


POOL_COLUMNS = ("role", "instances", "tensor", "pipeline", "device")


def pool_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    for pool in plan.pools:
        sizes = (pool.instances, pool.cut.tensor, pool.cut.pipeline)
        yield (pool.role.value, *map(str, sizes), pool.cut.device)


def placing_of(plan: Plan) -> str:
    """Where the pools' instances have to lie."""
    if plan.co_located is None:
        return ""
    parts = ", ".join(
        f"{pool.instances // plan.co_located.units} {pool.role.value}" for pool in plan.pools
    )
    return f"side by side on the same nodes, in each of {plan.co_located.units} units: {parts}"


def pools_table(plan: Plan) -> Table:
    table = Table(*POOL_COLUMNS, title=f"Plan: {plan.model}", caption=placing_of(plan))
    for row in pool_rows(plan):
        table.add_row(*row)
    return table


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    table = Table("", title, title_justify="left")
    for name, shown in figure_rows(figures):
        table.add_row(name, shown)
    return table


def figure_rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Figures that are not there have no row; those that nothing was seen of, a dash."""
    for key, title, shape in (*COUNTS, SHARE, *COSTS):
        if key in figures:
            yield title, "-" if figures[key] is None else shape.format(figures[key])
    for key, title in LATENCY_TITLES.items():
        for point in ("p50", "p90", "p99"):
            value = figures[key][point]
            yield f"{title}, {point} (ms)", "-" if value is None else f"{value * 1e3:.1f}"


PRICE_COLUMNS = ("$ an hour", "W")
RIVAL_COLUMNS = (
    "kind",
    "pools",
    "chunk",
    "goodput (1/s)",
    "per accelerator",
    *PRICE_COLUMNS,
    "limited by",
)


def rival_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    """In as many copies as the question takes."""
    for other in plan.alternatives:
        rates = (f"{other.goodput_rps:.3f}", f"{other.goodput_rps_per_gpu:.3f}")
        prices = (f"{other.cost_per_hour:.2f}", f"{other.power_w:.0f}")
        yield (other.kind, str(other), str(other.token_budget), *rates, *prices, other.limit)


def alternatives_table(plan: Plan) -> Table:
    """A terminal has no room for the prices."""
    kept = [place for place, name in enumerate(RIVAL_COLUMNS) if name not in PRICE_COLUMNS]
    table = Table(*(RIVAL_COLUMNS[place] for place in kept), title="What it beat")
    for row in rival_rows(plan):
        table.add_row(*(row[place] for place in kept))
    return table


def samples_table(samples: Sequence[Sample], fitted_s: Sequence[float]) -> Table:
    columns = ("tokens", "draws", "pairs", "KV tokens read", "measured (ms)", "fitted (ms)", "off")
    table = Table(*columns, title="Passes")
    for (step, seconds), fit_s in zip(samples, fitted_s, strict=True):
        sums = (step.tokens, step.draws, step.pairs, step.kv_read_tokens)
        times = (f"{seconds * 1e3:.3f}", f"{fit_s * 1e3:.3f}", f"{fit_s / seconds - 1:+.1%}")
        table.add_row(*map(str, sums), *times)
    return table
