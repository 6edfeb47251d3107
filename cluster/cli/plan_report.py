"""The HTML reports of `tandem plan` and `tandem simulate`."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.bench.page import cdf, page, table
from cluster.bench.svg import Series, axis, bars, chart, share_axis
from cluster.bench.table import LATENCY_TITLES
from cluster.cli.plan_table import (
    POOL_COLUMNS,
    RIVAL_COLUMNS,
    figure_rows,
    placing_of,
    pool_rows,
    rival_rows,
)
from engine.events import TTFT_PARTS
from placement.planning.candidate import deployment_of
from placement.planning.exploration import RATE_SHARES, over_rates, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from placement.planning.choice import Choice
    from placement.planning.exploration import RatePoint, Utilisation
    from placement.planning.optimizer import Answer
    from placement.planning.plan import Plan, Target
    from placement.simulation.deployment import Deployment
    from placement.simulation.dynamics import Dynamics
    from placement.simulation.outcome import Outcome
    from placement.workload import Workload

Curve = tuple[str, list["RatePoint"]]


def plan_report(answer: Answer, found: Plan, progress: Callable[[int, int], None]) -> str:
    """The chosen pools beside the best of each other kind, one copy of each."""
    drawn = _best_of_each_kind(answer)
    total, curves = len(drawn) + 1, []
    for done, (name, choice) in enumerate(drawn):
        progress(done, total)
        curves.append((name, _per_accelerator(_curve(answer, choice), choice)))
    _, busy = watched(*_at_goodput(answer, answer.chosen), answer.setting.dynamics)
    progress(total, total)
    outcomes = [(name, choice.scored.goodput.outcome) for name, choice in drawn]
    seen = [(name, one) for name, one in outcomes if one is not None]
    plots = [
        _attainment("requests per second and accelerator", curves),
        _trade_off(curves, found.target),
        *_cdfs(seen, found.target),
        _utilisation(busy),
        *_parts(seen),
    ]
    foot = (
        "One copy of each deployment, simulated by the schedulers that serve. Latencies, "
        "utilisation and parts are at its own goodput."
    )
    text = (
        f"<p>{escape(found.reason)}</p>{_plain_table(POOL_COLUMNS, pool_rows(found))}"
        f"{_small(placing_of(found))}<p>Drawn below, one copy of each: {_legend(drawn)}.</p>"
    )
    details = (
        f"<h2>What it beat</h2>{_plain_table(RIVAL_COLUMNS, rival_rows(found))}"
        f"<h2>Figures</h2>{_figures('predicted', found.predicted)}{_small(foot)}"
    )
    return page(f"Plan for {found.model}", text, plots, details)


def simulation_report(
    plan: Plan,
    deployment: Deployment,
    workload: Workload,
    dynamics: Dynamics,
    figures: dict[str, Any],
) -> str:
    """What the plan does with a workload at its rate, and around it."""
    outcome, busy = watched(deployment, workload, dynamics)
    rate_rps = workload.rate_rps
    rates = [rate_rps * share for share in RATE_SHARES] if rate_rps else []
    curves = [("this plan", over_rates(deployment, workload, rates, dynamics))]
    plots = [
        _attainment("requests per second", curves, [("as given", rate_rps)]),
        _trade_off(curves, plan.target),
        *_cdfs([("this plan", outcome)], plan.target),
        _utilisation(busy),
        *_parts([("this plan", outcome)]),
    ]
    text = f"<p>{escape(plan.deployed)}</p>"
    foot = _small("Simulated by the schedulers that serve, in virtual time.")
    details = f"<h2>Figures</h2>{_figures('simulated', figures)}{foot}"
    return page(f"Simulation of {plan.model}", text, plots, details)


def _best_of_each_kind(answer: Answer) -> list[tuple[str, Choice]]:
    best = {answer.chosen.candidate.kind: answer.chosen}
    for rival in answer.rivals:
        best.setdefault(rival.candidate.kind, rival)
    return [
        (f"{kind} (chosen)" if one is answer.chosen else kind, one) for kind, one in best.items()
    ]


def _legend(drawn: Sequence[tuple[str, Choice]]) -> str:
    return "; ".join(
        f"<b>{escape(name)}</b> {escape(str(one.scored.candidate))}" for name, one in drawn
    )


def _at_goodput(answer: Answer, choice: Choice) -> tuple[Deployment, Workload]:
    setting, scored = answer.setting, choice.scored
    deployment = deployment_of(setting.book, scored.candidate, setting.target, setting.overheads)
    rate_rps = scored.goodput.rate_rps
    return deployment, setting.sample_for(rate_rps).at_rate(rate_rps)


def _curve(answer: Answer, choice: Choice) -> list[RatePoint]:
    deployment, load = _at_goodput(answer, choice)
    rates = [load.rate_rps * share for share in RATE_SHARES]
    return over_rates(deployment, load, rates, answer.setting.dynamics)


def _per_accelerator(points: Iterable[RatePoint], choice: Choice) -> list[RatePoint]:
    accelerators = choice.scored.candidate.accelerators
    return [replace(point, rate_rps=point.rate_rps / accelerators) for point in points]


def _figures(title: str, figures: dict[str, Any]) -> str:
    return _plain_table(("", title), figure_rows(figures))


def _plain_table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    return table(columns, ((first, [(cell, "") for cell in rest]) for first, *rest in rows))


def _attainment(unit: str, curves: Sequence[Curve], marks: Sequence[tuple[str, float]] = ()) -> str:
    series = [
        Series(name, [(point.rate_rps, point.attainment) for point in points])
        for name, points in curves
    ]
    x = axis(unit, [rate for one in series for rate, _ in one.points])
    return chart("Attainment over rate", x, share_axis("within targets"), series, marks)


def _trade_off(curves: Sequence[Curve], target: Target) -> str:
    """Each line goes from a low rate to a high one: the nearer to the origin the better."""
    series = [
        Series(
            name,
            [
                (point.tpot_p90_s * 1e3, point.ttft_p90_s * 1e3)
                for point in points
                if point.tpot_p90_s is not None and point.ttft_p90_s is not None
            ],
        )
        for name, points in curves
    ]
    every = [point for one in series for point in one.points]
    x = axis("time per output token, p90 (ms)", [x for x, _ in every])
    y = axis("time to first token, p90 (ms)", [y for _, y in every], log=True)
    marks = [("target", target.tpot_s * 1e3)]
    return chart("TTFT against TPOT as the rate grows", x, y, series, marks)


def _cdfs(outcomes: Sequence[tuple[str, Outcome]], target: Target) -> list[str]:
    marks = {"ttft_s": target.ttft_s, "tpot_s": target.tpot_s}
    return [
        cdf(
            title,
            [(name, _known(getattr(one, key))) for name, one in outcomes],
            [("target", marks[key] * 1e3)] if key in marks else [],
        )
        for key, title in LATENCY_TITLES.items()
    ]


def _known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[~np.isnan(values)]


def _utilisation(busy: Utilisation) -> str:
    series = [
        Series(role, list(zip(busy.ends_s.tolist(), shares.tolist(), strict=True)))
        for role, shares in busy.by_role.items()
    ]
    x = axis("seconds", busy.ends_s.tolist())
    return chart("Utilisation over time", x, share_axis("busy"), series)


def _parts(outcomes: Sequence[tuple[str, Outcome]]) -> list[str]:
    rows = []
    for name, outcome in outcomes:
        parts = outcome.figures()["ttft_parts_s"]
        rows.append((name, [(part, (parts[part] or 0.0) * 1e3) for part in TTFT_PARTS]))
    return [bars("Where the time to a flowing stream goes", "mean ms", rows)]


def _small(text: str) -> str:
    return f"<p><small>{escape(text)}</small></p>"
