"""Why no plan answers a question: which constraint binds, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import NoFeasiblePlan
from placement.planning.candidate import deployment_of
from placement.planning.goodput import LEAST_RATE_SHARE, Carried, what_is_missed
from placement.simulation.simulator import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from placement.planning.candidate import Scored, Trial
    from placement.planning.choice import Choice
    from placement.planning.phases import Phase
    from placement.planning.plan import Target
    from placement.planning.question import Question
    from placement.planning.scoring import Setting, Spread


def too_little(choices: Sequence[Choice], question: Question) -> NoFeasiblePlan:
    """Some serve, but none as much as is asked for or within the power cap."""
    cap = question.power_cap_w
    if cap is not None and all(one.copies < 1 for one in choices):
        least = min(one.scored.power_w for one in choices)
        rule = f"the smallest candidate draws {least:.0f} W, {least / cap - 1:.0%} over the cap"
        return NoFeasiblePlan("power_cap_w", cap, rule)
    most = max(choices, key=lambda one: one.rate_rps)
    wanted = question.rate_rps or 0.0
    bound = "under the power cap" if cap is not None else "with this hardware"
    rule = (
        f"{bound} at most {most.rate_rps:.4g} requests/s can be served ({most.candidate}); "
        f"{wanted / max(most.rate_rps, 1e-9):.2f} times as much is asked"
    )
    return NoFeasiblePlan("rate", wanted, rule)


def nothing_serves(setting: Setting, scored: Sequence[Scored], spread: Spread) -> NoFeasiblePlan:
    """None reaches the attainment; the one that comes nearest is simulated nearly idle."""
    trials = [_nearly_idle(setting, one) for one in scored]
    seen = zip(scored, spread(look, trials), strict=True)
    nearest, carried = min(seen, key=lambda pair: (pair[1].strain, str(pair[0].candidate)))
    limit = what_is_missed(carried.outcome)
    rule = (
        f"no candidate reaches {carried.attainment:.0%} at any rate: with the one that comes "
        f"nearest, {nearest.candidate}, {carried.outcome.attainment:.0%} of requests meet both "
        f"targets at {carried.rate_rps:.2g} requests/s, and {carried.attainment:.0%} would if "
        f"these were {carried.strain - 1:.0%} longer; what gives way is {limit}"
    )
    field, value = _binding(limit, setting.target)
    return NoFeasiblePlan(field, value, rule)


def _nearly_idle(setting: Setting, scored: Scored) -> Trial:
    """At a rate below which none is looked for."""
    rate_rps = scored.most_rps * LEAST_RATE_SHARE
    return setting.trial(scored.candidate, rate_rps, worth_rps=0.0, most_rps=rate_rps)


def look(trial: Trial) -> Carried:
    """Every request to its end, whatever is missed."""
    deployment = deployment_of(trial.book, trial.candidate, trial.target, trial.overheads)
    load = trial.workload.at_rate(trial.guess_rps)
    outcome = simulate(deployment, load, dynamics=trial.dynamics)
    return Carried(1, trial.guess_rps, outcome, trial.target.attainment)


def _binding(limit: str, target: Target) -> tuple[str, object]:
    match limit:
        case "TTFT":
            return "slo.ttft_s", target.ttft_s
        case "TPOT":
            return "slo.tpot_s", target.tpot_s
        case _:
            return "memory", limit


def no_room(phases: Sequence[Phase], target: Target) -> NoFeasiblePlan:
    """What meets one target misses the other, and no two fit."""
    prefill = min(phases, key=lambda phase: (phase.best_ttft_s, phase.cut)).cut
    decode = min(phases, key=lambda phase: (phase.best_tpot_s, phase.cut)).cut
    rule = (
        f"no instance meets both targets ({target.ttft_s:g} s, {target.tpot_s:g} s), and this "
        f"fleet has no room for one for each, such as {prefill} beside {decode}"
    )
    return NoFeasiblePlan("hardware", str(prefill), rule)
