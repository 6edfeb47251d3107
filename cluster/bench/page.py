"""What the HTML reports share: one file, nothing fetched, light and dark."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from cluster.bench.svg import SERIES_COLOURS, Series, axis, chart, share_axis

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

CDF_POINTS = 200
LONGEST_FIGURE = 14
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
svg .on{fill:var(--paper)}
.grid{stroke:var(--line)}.mark{stroke:var(--soft);stroke-dasharray:4 3}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.words{white-space:normal;text-align:left}small{color:var(--soft)}
@media(max-width:600px){td small{display:block}td:first-child{white-space:normal}
th,td{padding:.3rem}}
""" + "".join(
    f"polyline.s{n}{{stroke:var(--s{n})}}circle.s{n},rect.s{n}{{fill:var(--s{n})}}"
    f"i.s{n}{{background:var(--s{n})}}"
    for n in range(SERIES_COLOURS)
)


def page(title: str, text: str, plots: Iterable[str], foot: str) -> str:
    """`text` and `foot` are HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{text}"
        f'<h2>Plots</h2><div class="plots">{"".join(plots)}</div>{foot}</body></html>'
    )


def table(columns: Iterable[str], rows: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> str:
    """Each cell a figure and, smaller, what is said of it."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(_row(title, cells) for title, cells in rows)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _row(title: str, cells: Iterable[tuple[str, str]]) -> str:
    columns = "".join(_cell(*cell) for cell in cells)
    return f"<tr><td>{escape(title)}</td>{columns}</tr>"


def _cell(value: str, interval: str) -> str:
    """Words may take several lines; figures stay on one."""
    kind = ' class="words"' if len(value) > LONGEST_FIGURE else ""
    small = f" <small>{escape(interval)}</small>" if interval else ""
    return f"<td{kind}>{escape(value)}{small}</td>"


def cdf(
    title: str,
    values_s: Iterable[tuple[str, NDArray[np.float64]]],
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """The share of requests within each latency, in milliseconds."""
    shares = np.linspace(0, 1, CDF_POINTS)
    known = [(name, values * 1e3) for name, values in values_s if len(values)]
    series = [
        Series(name, list(zip(np.quantile(values, shares).tolist(), shares.tolist(), strict=True)))
        for name, values in known
    ]
    x = axis("milliseconds", [float(v) for _, values in known for v in values], log=True)
    return chart(title, x, share_axis("share of requests"), series, marks)
