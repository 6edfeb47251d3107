"""The plan that serves most, or a given rate for least: search, simulate, choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import NoFeasiblePlan
from placement.latency.catalog import entry_of
from placement.planning.candidate import score
from placement.planning.carrying import Carrying
from placement.planning.choice import Choice, choices_of, ranked
from placement.planning.chunks import Chunking
from placement.planning.co_location import CoLocation
from placement.planning.mixes import Mixing
from placement.planning.phases import check_targets, cuts_in_service, feasible_cuts, phase_of
from placement.planning.plan import Alternative, Plan
from placement.planning.reasons import Reasons, left_out
from placement.planning.refusal import no_room, nothing_serves, too_little
from placement.planning.scoring import Setting, fine_trial, score_prospects, spreading
from placement.planning.search import Search
from placement.workload import Arrivals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from placement.planning.candidate import Candidate, Scored
    from placement.planning.costbook import CostBook, Cut
    from placement.planning.plan import Target
    from placement.planning.question import Question
    from placement.planning.scoring import Spread
    from placement.workload import Workload

SLOW_COPY_SHARE = 0.05
"""Of a target; copies that take longer over the network are tried within a node too."""
CLOSEST = 5
"""Alternatives that are named besides the best of each kind."""


def plan(
    book: CostBook,
    workload: Workload,
    question: Question,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The best plan; NoFeasiblePlan names the constraint that binds."""
    return answer(book, workload, question, progress).plan


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan with what it was chosen from, for those who want to look closer."""

    plan: Plan
    chosen: Choice
    rivals: tuple[Choice, ...]
    setting: Setting


def answer(
    book: CostBook,
    workload: Workload,
    question: Question,
    progress: Callable[[int, int], None] | None = None,
) -> Answer:
    sample = representative(workload, max(question.requests, question.most_requests), question.seed)
    feasible = feasible_cuts(book, sample)
    try:
        return _answer_of(book, sample, question, feasible, progress or _unseen)
    except NoFeasiblePlan as refusal:
        unknown = _unknown(book, feasible)
        if not unknown:
            raise
        rule = f"{refusal.rule}. {left_out(unknown)}"
        raise NoFeasiblePlan(refusal.field, refusal.value, rule) from refusal


def _answer_of(
    book: CostBook,
    sample: Workload,
    question: Question,
    feasible: list[Cut],
    progress: Callable[[int, int], None],
) -> Answer:
    cuts = cuts_in_service(book, feasible)
    phases = [phase_of(book, cut, sample, question.target) for cut in cuts]
    check_targets(phases, question.target)
    slow = _slow_copies(book, sample, question.target)
    search = Search(book, phases, question.target, question.token_budgets, slow)
    prospects = search.prospects()
    if not prospects:
        raise no_room(phases, question.target)
    setting = Setting(
        book,
        sample,
        question.target,
        question.overheads,
        question.dynamics,
        question.processes,
        question.requests,
    )
    with spreading(question.processes) as spread:
        scored = _scored(setting, question, search, spread, progress)
        choices = choices_of(scored, question)
        alone = ranked(book, choices, question)
        mixing = Mixing(setting, question, spread)
        mixes = mixing.best(prospects, choices, alone[0] if alone else None)
        choices += choices_of(mixes, question)
        choices = _settled(setting, choices, question, spread)
        if not choices:
            raise nothing_serves(setting, scored, spread)
        choices = Chunking(setting, question, spread).refined(choices)
    able = ranked(book, choices, question)
    if not able:
        raise too_little(choices, question)
    chosen, rivals = able[0], _beaten(choices, able)
    kinds = frozenset(one.candidate.kind for one in prospects)
    reason = Reasons(book, question, kinds).explain(chosen, rivals, _unknown(book, feasible))
    found = _write(book, question, chosen, rivals, reason)
    return Answer(found, chosen, tuple(rivals), setting)


def _unknown(book: CostBook, feasible: list[Cut]) -> list[Cut]:
    """Left out, since nothing tells how they do in service."""
    cuts = cuts_in_service(book, feasible)
    return [cut for cut in feasible if cut not in cuts]


def _scored(
    setting: Setting,
    question: Question,
    search: Search,
    spread: Spread,
    progress: Callable[[int, int], None],
) -> list[Scored]:
    if question.objective.needs_rate:
        return Carrying(setting, question, search).score(spread, progress)
    return score_prospects(setting, search, search.prospects(), spread, progress)


def _settled(
    setting: Setting, choices: Sequence[Choice], question: Question, spread: Spread
) -> list[Choice]:
    """With the best one measured finely, whichever it is then."""
    settled = list(choices)
    while able := ranked(setting.book, settled, question):
        best = able[0]
        if not best.scored.rough:
            break
        measured = spread(score, [fine_trial(setting, best.scored)])
        settled = [one for one in settled if one is not best]
        settled += choices_of(measured, question)
    return settled


def _beaten(choices: Sequence[Choice], able: Sequence[Choice]) -> list[Choice]:
    """The best of each kind and what came close; then kinds that cannot do what is asked."""
    rest = [one for one in choices if one not in able]
    rest.sort(key=lambda one: (-one.rate_rps, one.scored.power_w, str(one.candidate)))
    kinds: dict[str, Choice] = {}
    beaten = _apart(able[0], [*able[1:], *rest])
    for one in beaten:
        kinds.setdefault(one.candidate.kind, one)
    close = [one for one in beaten if one in able][:CLOSEST]
    return list(dict.fromkeys([*kinds.values(), *close]))


def _apart(chosen: Choice, others: Iterable[Choice]) -> list[Choice]:
    """Those that deploy anything else than the chosen one and than those before them."""
    found = {chosen.deployed: chosen}
    for one in others:
        found.setdefault(one.deployed, one)
    return list(found.values())[1:]


def _unseen(done: int, total: int) -> None:
    del done, total


def _slow_copies(book: CostBook, sample: Workload, target: Target) -> Callable[[Cut, Cut], bool]:
    """Whether a prompt's KV takes a noticeable part of a target over the network."""
    tokens = float(np.quantile(sample.prompt_tokens, target.attainment))

    def is_slow(prefill: Cut, decode: Cut) -> bool:
        lanes = min(prefill.workers, decode.workers)
        if book.hardware.nodes == 1:
            return False
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


def _write(
    book: CostBook,
    question: Question,
    chosen: Choice,
    rivals: list[Choice],
    reason: str,
) -> Plan:
    candidate = chosen.candidate
    return Plan(
        model=book.shape.name,
        target=question.target,
        pools=candidate.pools,
        hardware=_describe(book),
        predicted=_predicted(book, chosen),
        alternatives=tuple(_alternative(book, rival) for rival in rivals),
        reason=reason,
        token_budget=candidate.token_budget,
        engine=book.engine,
        co_located=_co_location(book, candidate),
    )


def _co_location(book: CostBook, candidate: Candidate) -> CoLocation | None:
    if candidate.units is None:
        return None
    return CoLocation(candidate.units, candidate.crossing_token_s(book))


def _predicted(book: CostBook, chosen: Choice) -> dict[str, Any]:
    """At the rate asked for, else at the goodput: the simulated copy's figures, rates for all
    copies."""
    carried = chosen.scored.carried
    outcome = chosen.scored.goodput.outcome if carried is None else carried.outcome
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


def _alternative(book: CostBook, rival: Choice) -> Alternative:
    """In as many copies as it would take; one where not even that fits under a power cap."""
    copies = Choice(rival.scored, max(rival.copies, 1))
    return Alternative(
        copies.candidate.pools,
        copies.candidate.kind,
        copies.rate_rps,
        rival.scored.per_accelerator,
        copies.candidate.cost_per_hour(book),
        copies.power_w,
        rival.scored.goodput.limit,
        copies.candidate.token_budget,
        copies.candidate.units,
    )


def _describe(book: CostBook) -> dict[str, Any]:
    nodes = [entry_of(group) for group in book.hardware.groups]
    return {"nodes": nodes, "network": book.hardware.network.name}
