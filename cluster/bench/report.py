"""The bench's HTML report: one file, nothing fetched, light and dark."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.bench.figures import LATENCIES, by_round, mean_parts
from cluster.bench.svg import Axis, Series, axis, bars, chart, share_axis
from cluster.bench.table import LATENCY_TITLES, figure_rows
from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.bench.run import Measured
    from cluster.bench.sample import Sample

CDF_POINTS = 200
MOST_DOTS = 1500
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5c6570;--line:#dde1e6;
--s0:#2563c9;--s1:#c2571a;--s2:#2f855a;--s3:#8a4bc0;--s4:#b8860b;--s5:#c2356b}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ee;--soft:#9aa4b0;--line:#2c333b;
--s0:#6ea8ff;--s1:#f0955a;--s2:#5fc796;--s3:#bd8cf0;--s4:#e0b84a;--s5:#f078a4}}
body{margin:0 auto;max-width:1000px;padding:1.2rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:1.6rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:1rem}
figure{margin:0;padding:.7rem;border:1px solid var(--line);border-radius:8px}
figcaption{font-weight:600;margin-bottom:.3rem}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--line)}.mark{stroke:var(--soft);stroke-dasharray:4 3}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;white-space:nowrap}
th:first-child,td:first-child{text-align:left}small{color:var(--soft)}
@media(max-width:600px){td small{display:block}td:first-child{white-space:normal}
th,td{padding:.3rem}}
""" + "".join(
    f"polyline.s{n}{{stroke:var(--s{n})}}circle.s{n},rect.s{n}{{fill:var(--s{n})}}"
    f"i.s{n}{{background:var(--s{n})}}"
    for n in range(6)
)


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
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Bench of {escape(names)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Bench of {escape(names)}</h1>{_table(documents)}<ul>{notes}</ul>"
        f'<h2>Plots</h2><div class="plots">{"".join(plots)}</div>{_foot(measured)}</body></html>'
    )


def _table(documents: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(found['url'])}</th>" for found in documents)
    rows = [_row(title, cells) for title, cells in figure_rows(documents)]
    return f'<div class="table"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _row(title: str, cells: Iterable[tuple[str, str]]) -> str:
    columns = "".join(f"<td>{value} <small>{interval}</small></td>" for value, interval in cells)
    return f"<tr><td>{escape(title)}</td>{columns}</tr>"


def _values(samples: Iterable[Sample], name: str) -> list[float]:
    return [value for one in samples if (value := LATENCIES[name](one)) is not None]


def _cdf(measured: Sequence[Measured], name: str, title: str) -> str:
    """With the strictest and loosest target marked."""
    shares = np.linspace(0, 1, CDF_POINTS)
    values = [np.array(_values(one.samples, name)) * 1e3 for one in measured]
    series = [
        Series(one.url, list(zip(np.quantile(known, shares), shares, strict=True)))
        for one, known in zip(measured, values, strict=True)
        if len(known)
    ]
    x = axis("milliseconds", [value for known in values for value in known], log=True)
    return chart(title, x, share_axis("share of requests"), series, _targets(measured, name))


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
    return [chart("Attainment over rate", x, share_axis("within targets"), series)]


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
            rows.append((one.url, [(part, (parts[part] or 0.0) * 1e3) for part in TTFT_PARTS]))
    return [bars("Where the time to a flowing stream goes", "mean ms", rows)] if rows else []


def _foot(measured: Sequence[Measured]) -> str:
    lag_s = max(one.lag_s for run in measured for one in run.samples)
    return (
        "<p><small>Latencies count from the moment each request was due. The generator was at "
        f"most {lag_s * 1e3:.1f} ms late. Intervals hold 95% of bootstrap resamples.</small></p>"
    )
