"""The figures as rows that the terminal and the report show alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTS = (
    ("requests", "requests", "{:.0f}"),
    ("failed", "failed", "{:.0f}"),
    ("rate_rps", "offered rate (1/s)", "{:.3f}"),
    ("throughput_tokens_s", "output tokens (1/s)", "{:.1f}"),
    ("goodput_rps", "goodput (1/s)", "{:.3f}"),
)
LATENCY_TITLES = {
    "ttft_s": "Time to first token",
    "tpot_s": "Time per output token",
    "e2e_s": "Whole request",
}

Cell = tuple[str, str]
"""A figure and the interval it lies in."""


def figure_rows(documents: Sequence[dict[str, Any]]) -> list[tuple[str, list[Cell]]]:
    """One row a figure, one cell a server."""
    rows = [
        (title, [(shape.format(found[key]), "") for found in documents])
        for key, title, shape in COUNTS
    ]
    rows.append(("within targets", [_share(found) for found in documents]))
    for name, title in LATENCY_TITLES.items():
        for point in ("p50", "p90", "p99"):
            cells = [_latency(found, name, point) for found in documents]
            rows.append((f"{title}, {point} (ms)", cells))
    return rows


def _share(found: dict[str, Any]) -> Cell:
    low, high = found["confidence"]["attainment"]
    return f"{found['attainment']:.1%}", f"{low:.1%} to {high:.1%}"


def _latency(found: dict[str, Any], name: str, point: str) -> Cell:
    value, interval = found[name][point], found["confidence"][name][point]
    if value is None or interval is None:
        return "-", ""
    low, high = (edge * 1e3 for edge in interval)
    return f"{value * 1e3:.1f}", f"{low:.1f} to {high:.1f}"


def figures_table(documents: Sequence[dict[str, Any]]) -> Table:
    """With the 95% interval beside each latency."""
    table = Table("", *(str(found["url"]) for found in documents))
    for title, cells in figure_rows(documents):
        shown = (
            f"{value} [dim]{interval}[/dim]" if interval else value for value, interval in cells
        )
        table.add_row(title, *shown)
    return table
