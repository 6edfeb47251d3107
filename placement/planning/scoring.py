"""Simulates candidates: first roughly, the most promising first, then the leaders finely."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Protocol, TypeVar

from placement.planning.candidate import Trial, score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from placement.planning.candidate import Candidate, Scored
    from placement.planning.costbook import CostBook
    from placement.planning.plan import Target
    from placement.planning.search import Prospect, Search
    from placement.simulation.deployment import Overheads
    from placement.simulation.dynamics import Dynamics
    from placement.workload import Workload

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
GUESSED_SHARE = 0.7
"""Of a candidate's bound: where its bisection starts."""
ROUGH = 0.08
"""Resolution at which candidates are compared before the leaders are measured finely."""
LEADERS = 8
BATCH = 8
"""Candidates simulated at once; what one batch finds prunes the next."""
ANSWERS_LONG = 4
FIRST_TOKENS_LONG = 10
OVER_BOUND = 1.2
"""Times the rate that mean loads allow: targets that some may miss leave a little more."""
TYPICAL_TPOT_SHARE = 0.5
WORTHLESS_SHARE = 0.8
"""A candidate whose bound is under this share of the best one found is not simulated."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all candidates are simulated with."""

    book: CostBook
    sample: Workload
    target: Target
    overheads: Overheads
    dynamics: Dynamics
    processes: int
    requests: int
    """Simulated at least."""

    def trial(
        self,
        candidate: Candidate,
        guess_rps: float,
        *,
        worth_rps: float,
        most_rps: float,
        copies: int = 1,
    ) -> Trial:
        """Of one that is to serve about so much."""
        return Trial(
            book=self.book,
            candidate=candidate,
            workload=self.sample_for(guess_rps),
            target=self.target,
            overheads=self.overheads,
            dynamics=self.dynamics,
            guess_rps=guess_rps,
            worth_rps=worth_rps,
            most_rps=most_rps,
            copies=copies,
        )

    def sample_for(self, rate_rps: float) -> Workload:
        """Arrivals last several times as long as an answer, so that batches fill, and as a first
        token may take, so that a burst is not mistaken for a rate."""
        tokens = float(self.sample.output_tokens.mean())
        answer_s = tokens * self.target.tpot_s * TYPICAL_TPOT_SHARE
        lasting_s = max(ANSWERS_LONG * answer_s, FIRST_TOKENS_LONG * self.target.ttft_s)
        wanted = min(rate_rps * lasting_s, len(self.sample))
        return self.sample.first(max(self.requests, int(wanted)))


class Spread(Protocol):
    """Does the same work for each of many, here or in other processes; answers in their order."""

    def __call__(
        self, work: Callable[[Asked], Answered], asked: Iterable[Asked], /
    ) -> Iterator[Answered]: ...


def score_prospects(
    setting: Setting,
    search: Search,
    prospects: Sequence[Prospect],
    spread: Spread,
    progress: Callable[[int, int], None],
) -> list[Scored]:
    """`progress` is told how many prospects of how many are done."""
    best = _Best()
    total = len(prospects) + LEADERS
    rough: list[Scored] = []
    for done, batch in batches(prospects):
        for scored in spread(score, list(_rough_trials(setting, search, batch, best))):
            best.learn(scored)
            rough.append(scored)
        progress(done, total)
    leaders = _leaders(rough)
    fine = list(spread(score, [fine_trial(setting, leader) for leader in leaders]))
    progress(total, total)
    return fine + [one for one in rough if one not in leaders]


def _rough_trials(
    setting: Setting, search: Search, batch: Sequence[Prospect], best: _Best
) -> Iterator[Trial]:
    for prospect in batch:
        candidate, copies = prospect.candidate, search.copies(prospect.candidate)
        if best.may_beat(prospect, copies):
            trial = setting.trial(
                candidate,
                prospect.bound_rps,
                worth_rps=best.worth(candidate, copies),
                most_rps=prospect.bound_rps * OVER_BOUND,
                copies=copies,
            )
            guess_rps = prospect.bound_rps * GUESSED_SHARE
            yield replace(trial, guess_rps=guess_rps, resolution=ROUGH, dynamics=None)


def fine_trial(setting: Setting, scored: Scored) -> Trial:
    """From the rough rate; it may lie a little lower over more requests."""
    rate_rps = scored.goodput.rate_rps
    trial = setting.trial(
        scored.candidate,
        rate_rps,
        worth_rps=0.0,
        most_rps=scored.most_rps,
        copies=scored.copies,
    )
    return replace(trial, stride=ROUGH)


class _Best:
    """The best of each family so far; the rest of it need not be measured exactly."""

    def __init__(self) -> None:
        self._fleet_rps: dict[tuple[str, ...], float] = {}
        self._share_rps: dict[tuple[str, ...], float] = {}

    def may_beat(self, prospect: Prospect, copies: int) -> bool:
        family = prospect.candidate.family
        fleet = prospect.bound_rps * copies > self._fleet_rps.get(family, 0.0) * WORTHLESS_SHARE
        share = prospect.per_accelerator > self._share_rps.get(family, 0.0) * WORTHLESS_SHARE
        return fleet or share

    def worth(self, candidate: Candidate, copies: int) -> float:
        """The rate under which the candidate is neither the best fleet nor the best share."""
        family = candidate.family
        for_fleet = self._fleet_rps.get(family, 0.0) / copies
        for_share = self._share_rps.get(family, 0.0) * candidate.accelerators
        return min(for_fleet, for_share) * WORTHLESS_SHARE

    def learn(self, scored: Scored) -> None:
        family = scored.candidate.family
        self._fleet_rps[family] = max(self._fleet_rps.get(family, 0.0), scored.fleet_rps)
        self._share_rps[family] = max(self._share_rps.get(family, 0.0), scored.per_accelerator)


def _leaders(scored: Sequence[Scored]) -> list[Scored]:
    """The best of each kind by accelerator and by fleet, then what came closest."""
    serving = [one for one in scored if one.goodput.rate_rps > 0]
    by_share = sorted(serving, key=lambda one: (-one.per_accelerator, str(one.candidate)))
    by_fleet = sorted(serving, key=lambda one: (-one.fleet_rps, str(one.candidate)))
    firsts: dict[tuple[str, ...], Scored] = {}
    for measure, ranked in (("share", by_share), ("fleet", by_fleet)):
        for one in ranked:
            firsts.setdefault((measure, *one.candidate.family), one)
    return list(dict.fromkeys([*firsts.values(), *by_share[:2]]))[:LEADERS]


def batches(prospects: Sequence[Prospect]) -> Iterator[tuple[int, Sequence[Prospect]]]:
    """With how many are done after each; as large on any machine, so that plans are alike."""
    for start in range(0, len(prospects), BATCH):
        yield min(start + BATCH, len(prospects)), prospects[start : start + BATCH]


@contextmanager
def spreading(processes: int) -> Iterator[Spread]:
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map
