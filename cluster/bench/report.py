"""The bench's HTML report: one file, nothing fetched, light and dark."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.bench.figures import LATENCIES, by_round, mean_parts
from cluster.bench.page import cdf, page, table
from cluster.bench.svg import Axis, Series, axis, bars, chart, share_axis
from cluster.bench.table import LATENCY_TITLES, figure_rows
from cluster.packages import TANDEM, package_version
from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.bench.run import Measured
    from cluster.bench.sample import Sample

MOST_DOTS = 1500


def report(measured: Sequence[Measured], documents: Sequence[dict[str, Any]]) -> str:
    """The page for one server, or for several side by side."""
    plots = [
        *(_cdf(measured, name, title) for name, title in LATENCY_TITLES.items()),
        *_over_rate(measured),
        _over_scale(documents),
        _timeline(measured),
        *_parts(measured),
    ]
    names = ", ".join(one.url for one in measured)
    notes = "".join(
        f"<li>{escape(one.url)}: {escape(n)}</li>" for one in measured for n in one.notes
    )
    text = f"{_about(measured)}{_table(documents)}<ul>{notes}</ul>"
    return page(f"Bench of {names}", text, plots, _foot(measured))


def _about(measured: Sequence[Measured]) -> str:
    """What was asked of whom, and when."""
    samples = [sample for one in measured for sample in one.samples]
    models = ", ".join(sorted({one.model for one in measured}))
    asked = " + ".join(
        _range([float(getattr(one, name)) for one in samples], "{:.0f}")
        for name in ("prompt_tokens", "wanted_tokens")
    )
    targets = " and ".join(
        f"{_range([getattr(one.slo, name) for one in samples], '{:g}')} s {what}"
        for name, what in (("ttft_s", "to the first token"), ("tpot_s", "per token"))
    )
    tandem = package_version(TANDEM) or "from its source"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<p>Model {escape(models)}; prompt + output tokens {asked}; targets {targets}. "
        f"Measured by Tandem {tandem}, {when}.</p>"
    )


def _range(values: Sequence[float], shape: str) -> str:
    """One figure where all are alike, else the median and where they lie."""
    low, high = min(values), max(values)
    if low == high:
        return shape.format(low)
    return f"{shape.format(np.median(values))} ({shape.format(low)} to {shape.format(high)})"


def _table(documents: Sequence[dict[str, Any]]) -> str:
    columns = ("", *(found["url"] for found in documents))
    return table(columns, figure_rows(documents))


def _values(samples: Iterable[Sample], name: str) -> list[float]:
    return [value for one in samples if (value := LATENCIES[name](one)) is not None]


def _cdf(measured: Sequence[Measured], name: str, title: str) -> str:
    """With the strictest and loosest target marked."""
    values_s = [(one.url, np.array(_values(one.samples, name))) for one in measured]
    return cdf(title, values_s, _targets(measured, name))


def _targets(measured: Sequence[Measured], name: str) -> list[tuple[str, float]]:
    if name == "e2e_s":
        return []
    targets = {getattr(sample.slo, name) * 1e3 for one in measured for sample in one.samples}
    return [("target", value) for value in sorted({min(targets), max(targets)})]


def _over_rate(measured: Sequence[Measured]) -> list[str]:
    series = [
        Series(one.url, [(probe["rate_rps"], probe["attainment"]) for probe in one.probes])
        for one in measured
        if one.probes
    ]
    if not series:
        return []
    x = axis("requests per second", [rate for one in series for rate, _ in one.points])
    marks = [
        (f"goodput {one.goodput_rps:.3g}", one.goodput_rps) for one in measured if one.goodput_rps
    ]
    return [chart("Attainment over rate", x, share_axis("within targets"), series, marks)]


def _over_scale(documents: Sequence[dict[str, Any]]) -> str:
    found = [(one["url"], one["attainment_over_scale"]) for one in documents]
    series = [
        Series(url, [(at["scale"], at["attainment"]) for at in scales]) for url, scales in found
    ]
    x = Axis("targets multiplied by", 0.22, 4.4, log=True)
    marks = [("as set", 1.0)]
    return chart("Attainment over SLO scale", x, share_axis("within targets"), series, marks)


def _timeline(measured: Sequence[Measured]) -> str:
    """The time to first token of each request, where it stood in the run."""
    series = [Series(one.url, _moments(one.samples), dots=True) for one in measured]
    points = [point for one in series for point in one.points]
    x = axis("seconds into the run", [due for due, _ in points])
    y = axis("time to first token (ms)", [value for _, value in points], log=True)
    return chart("Timeline", x, y, series)


def _moments(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Rounds one after the other, thinned to what a screen can show."""
    points, offset_s = [], 0.0
    for part in by_round(samples):
        points += [(offset_s + one.due_s, one.ttft_s * 1e3) for one in part if one.ttft_s]
        offset_s += max(one.ended_s for one in part)
    return points[:: -(-len(points) // MOST_DOTS) or 1]


def _parts(measured: Sequence[Measured]) -> list[str]:
    rows = []
    for one in measured:
        parts = mean_parts(one.samples)
        if any(parts.values()):
            stacked = [(part.replace("_", " "), (parts[part] or 0.0) * 1e3) for part in TTFT_PARTS]
            rows.append((one.url, stacked))
    return [bars("Where the time to a flowing stream goes", "mean ms", rows)] if rows else []


def _foot(measured: Sequence[Measured]) -> str:
    lag_s = max(one.lag_s for run in measured for one in run.samples)
    return (
        "<p><small>Latencies count from the moment each request was due. The generator was at "
        f"most {lag_s * 1e3:.1f} ms late. Intervals hold 95% of bootstrap resamples.</small></p>"
    )
