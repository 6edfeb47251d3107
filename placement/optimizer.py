"""The plan that serves most, or a given rate for least: search, simulate, choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import BadConfig, NoFeasiblePlan
from placement.deployment import Overheads
from placement.phases import Phase, check_targets, feasible_cuts, phase_of
from placement.plan import Alternative, Plan
from placement.reasons import explain
from placement.scoring import Setting, score_prospects
from placement.search import Search
from placement.workload import Arrivals

if TYPE_CHECKING:
    from collections.abc import Callable

    from placement.candidate import Candidate, Scored
    from placement.costbook import CostBook, Cut
    from placement.plan import Target
    from placement.workload import Workload

SLOW_COPY_SHARE = 0.05
"""Of a target; copies that take longer over the network are tried within a node too."""


class Objective(str, Enum):
    GOODPUT = "goodput"
    """Most requests a second that the whole fleet can serve."""
    ACCELERATORS = "accelerators"
    """Fewest accelerators for a given rate."""
    COST = "cost"
    POWER = "power"


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan is asked for."""

    target: Target
    objective: Objective = Objective.GOODPUT
    rate_rps: float | None = None
    """What must be served; only goodput can do without."""
    power_cap_w: float | None = None
    requests: int = 600
    """Simulated of each candidate."""
    most_requests: int = 4800
    """Of one that serves many, whose batches take longer to fill."""
    seed: int = 0
    token_budgets: tuple[int, ...] = (512, 2048)
    overheads: Overheads = field(default_factory=Overheads)
    processes: int = 1

    def __post_init__(self) -> None:
        if self.objective is not Objective.GOODPUT and self.rate_rps is None:
            raise BadConfig("rate", None, f"needed to plan for least {self.objective.value}")
        if self.rate_rps is not None and self.rate_rps <= 0:
            raise BadConfig("rate", self.rate_rps, "must be positive")
        if self.requests < 50:
            raise BadConfig("requests", self.requests, "at least 50 are needed for percentiles")


def plan(
    book: CostBook,
    workload: Workload,
    question: Question,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The best plan; NoFeasiblePlan names the constraint that binds."""
    sample = representative(workload, max(question.requests, question.most_requests), question.seed)
    phases = [phase_of(book, cut, sample, question.target) for cut in feasible_cuts(book, sample)]
    check_targets(phases, question.target)
    slow = _slow_copies(book, sample, question.target)
    search = Search(book.hardware, phases, question.target, question.token_budgets, slow)
    setting = Setting(
        book, sample, question.target, question.overheads, question.processes, question.requests
    )
    scored = score_prospects(setting, search, progress or _unseen)
    chosen = _choose(book, scored, question, phases)
    return _write(book, question, chosen, scored)


def _unseen(done: int, total: int) -> None:
    del done, total


def _slow_copies(book: CostBook, sample: Workload, target: Target) -> Callable[[Cut, Cut], bool]:
    """Whether a prompt's KV takes a noticeable part of a target over the network."""
    tokens = float(np.quantile(sample.prompt_tokens, target.attainment))

    def is_slow(prefill: Cut, decode: Cut) -> bool:
        lanes = min(prefill.accelerators, decode.accelerators)
        copy_s = book.hardware.network.transfer_s(tokens * book.shape.kv_bytes_per_token / lanes)
        return copy_s > SLOW_COPY_SHARE * target.ttft_s

    return is_slow


def representative(workload: Workload, count: int, seed: int) -> Workload:
    """Requests drawn from the workload, arriving with its burstiness."""
    generator = np.random.default_rng(seed)
    gaps = np.diff(workload.arrival_s)
    bursty = float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else 1.0
    rate_rps = workload.rate_rps or 1.0
    return workload.resampled(count, rate_rps, Arrivals(generator, min(bursty, 4.0)))


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The winner in so many copies."""

    scored: Scored
    copies: int

    @property
    def candidate(self) -> Candidate:
        return self.scored.candidate.times(self.copies)

    @property
    def rate_rps(self) -> float:
        return self.scored.goodput.rate_rps * self.copies

    @property
    def power_w(self) -> float:
        return self.scored.power_w * self.copies


def _choose(
    book: CostBook, scored: list[Scored], question: Question, phases: list[Phase]
) -> _Chosen:
    serving = [one for one in scored if one.goodput.rate_rps > 0]
    if not serving:
        raise _nothing_serves(question, phases)
    choices = [_copies_for(one, question) for one in serving]
    able = [one for one in choices if _within(one, question)]
    if not able:
        raise _too_little(choices, question)
    return min(able, key=lambda one: (*_price(book, one, question), str(one.candidate)))


def _copies_for(scored: Scored, question: Question) -> _Chosen:
    """As many as the rate needs and the fleet holds; for goodput, as many as power allows."""
    copies = scored.copies
    if question.objective is not Objective.GOODPUT and question.rate_rps is not None:
        copies = min(copies, int(np.ceil(question.rate_rps / scored.goodput.rate_rps - 1e-9)))
    if question.power_cap_w is not None:
        copies = min(copies, int(question.power_cap_w // max(scored.power_w, 1e-9)))
    return _Chosen(scored, copies)


def _within(choice: _Chosen, question: Question) -> bool:
    if choice.copies < 1:
        return False
    return question.rate_rps is None or choice.rate_rps >= question.rate_rps * (1 - 1e-9)


def _price(book: CostBook, choice: _Chosen, question: Question) -> tuple[float, float]:
    """What is to be least, then what breaks ties: fewer accelerators, or more served."""
    accelerators = choice.candidate.accelerators
    match question.objective:
        case Objective.GOODPUT:
            return -choice.rate_rps, accelerators
        case Objective.ACCELERATORS:
            return accelerators, -choice.rate_rps
        case Objective.COST:
            return choice.candidate.cost_per_hour(book), accelerators
        case Objective.POWER:
            return choice.power_w, accelerators


def _nothing_serves(question: Question, phases: list[Phase]) -> NoFeasiblePlan:
    fastest = min(phases, key=lambda phase: phase.best_ttft_s)
    target = question.target
    spare = 1 - fastest.best_ttft_s / target.ttft_s
    rule = (
        f"no candidate reaches {target.attainment:.0%} at any rate; a long prompt alone takes "
        f"{fastest.best_ttft_s:.4g} s of {target.ttft_s:g} s, which leaves {spare:.0%} for waiting"
    )
    return NoFeasiblePlan("slo.attainment", target.attainment, rule)


def _too_little(choices: list[_Chosen], question: Question) -> NoFeasiblePlan:
    if question.power_cap_w is not None and all(one.copies < 1 for one in choices):
        least = min(one.scored.power_w for one in choices)
        excess = least / question.power_cap_w - 1
        rule = f"the smallest candidate draws {least:.0f} W, {excess:.0%} over the cap"
        return NoFeasiblePlan("power_cap_w", question.power_cap_w, rule)
    most = max(choices, key=lambda one: one.rate_rps)
    wanted = question.rate_rps or 0.0
    bound = "under the power cap" if question.power_cap_w is not None else "with this hardware"
    rule = (
        f"{bound} at most {most.rate_rps:.4g} requests/s can be served ({most.candidate}); "
        f"{wanted / max(most.rate_rps, 1e-9):.2f} times as much is asked"
    )
    return NoFeasiblePlan("rate", wanted, rule)


def _write(book: CostBook, question: Question, chosen: _Chosen, scored: list[Scored]) -> Plan:
    candidate = chosen.candidate
    others = _beaten(scored, chosen.scored)
    return Plan(
        model=book.shape.name,
        target=question.target,
        pools=candidate.pools,
        hardware=_describe(book),
        predicted=_predicted(book, chosen),
        alternatives=tuple(_alternative(book, other) for other in others),
        reason=explain(chosen.scored, others, question.objective.value),
        token_budget=candidate.token_budget,
    )


def _predicted(book: CostBook, chosen: _Chosen) -> dict[str, Any]:
    """At the goodput: the simulated copy's figures, rates for all copies."""
    outcome = chosen.scored.goodput.outcome
    assert outcome is not None
    figures = outcome.figures()
    for name in ("rate_rps", "throughput_tokens_s", "goodput_rps"):
        figures[name] *= chosen.copies
    figures["goodput_rps"] = chosen.rate_rps
    figures["goodput_rps_per_gpu"] = chosen.scored.per_accelerator
    figures["cost_per_hour"] = chosen.candidate.cost_per_hour(book)
    figures["power_w"] = chosen.power_w
    if outcome.beyond:
        figures["extrapolated"] = list(outcome.beyond)
    return figures


def _beaten(scored: list[Scored], winner: Scored) -> list[Scored]:
    """The best of each kind, and what came close, without the winner."""
    others = [one for one in scored if one is not winner and one.goodput.rate_rps > 0]
    ranked = sorted(others, key=lambda one: (-one.per_accelerator, str(one.candidate)))
    kinds: dict[str, Scored] = {}
    for one in ranked:
        kinds.setdefault(one.candidate.kind, one)
    return list(dict.fromkeys([*kinds.values(), *ranked[:5]]))


def _alternative(book: CostBook, other: Scored) -> Alternative:
    return Alternative(
        other.candidate.pools,
        other.candidate.kind,
        other.goodput.rate_rps,
        other.per_accelerator,
        other.candidate.cost_per_hour(book),
        other.goodput.limit,
    )


def _describe(book: CostBook) -> dict[str, Any]:
    nodes = [
        {
            "device": g.device.name,
            "count": g.nodes,
            "devices": g.devices_per_node,
            "link": g.link.name,
        }
        for g in book.hardware.groups
    ]
    return {"nodes": nodes, "network": book.hardware.network.name}
