"""Plans, simulations and profiles as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from cluster.bench.table import COUNTS, LATENCY_TITLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from placement.plan import Plan
    from placement.profile import Sample

COSTS = (
    ("goodput_rps_per_gpu", "goodput per accelerator (1/s)", "{:.3f}"),
    ("cost_per_hour", "cost per hour ($)", "{:.2f}"),
    ("power_w", "power (W)", "{:.0f}"),
)


def pools_table(plan: Plan) -> Table:
    table = Table("role", "instances", "tensor", "pipeline", "device", title=f"Plan: {plan.model}")
    for pool in plan.pools:
        cut = pool.cut
        sizes = (pool.instances, cut.tensor, cut.pipeline)
        table.add_row(pool.role.value, *map(str, sizes), cut.device)
    return table


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    table = Table("", title, title_justify="left")
    for name, shown in figure_rows(figures):
        table.add_row(name, shown)
    return table


def figure_rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Figures that are not there have no row; those that nothing was seen of, a dash."""
    for key, title, shape in (*COUNTS, *COSTS):
        if key in figures:
            yield title, "-" if figures[key] is None else shape.format(figures[key])
    for key, title in LATENCY_TITLES.items():
        for point in ("p50", "p90", "p99"):
            value = figures[key][point]
            yield f"{title}, {point} (ms)", "-" if value is None else f"{value * 1e3:.1f}"


def alternatives_table(plan: Plan) -> Table:
    columns = ("kind", "pools", "goodput (1/s)", "per accelerator", "$ an hour", "W", "limited by")
    table = Table(*columns, title="What it beat")
    for other in plan.alternatives:
        pools = " + ".join(str(pool) for pool in other.pools)
        rates = (f"{other.goodput_rps:.3f}", f"{other.goodput_rps_per_gpu:.3f}")
        prices = (f"{other.cost_per_hour:.2f}", f"{other.power_w:.0f}")
        table.add_row(other.kind, pools, *rates, *prices, other.limit)
    return table


def samples_table(samples: Sequence[Sample], fitted_s: Sequence[float]) -> Table:
    columns = ("tokens", "draws", "pairs", "KV tokens read", "measured (ms)", "fitted (ms)", "off")
    table = Table(*columns, title="Passes")
    for (step, seconds), fit_s in zip(samples, fitted_s, strict=True):
        sums = (step.tokens, step.draws, step.pairs, step.kv_read_tokens)
        times = (f"{seconds * 1e3:.3f}", f"{fit_s * 1e3:.3f}", f"{fit_s / seconds - 1:+.1%}")
        table.add_row(*map(str, sums), *times)
    return table
