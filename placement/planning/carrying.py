"""For a given rate: each candidate is asked only at that rate, and in how few copies it carries it.

Highest rates are measured of the leaders alone, and of kinds that do not carry what is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from placement.planning.candidate import deployment_of, power_of, score
from placement.planning.goodput import RESOLUTION, find_fewest_copies
from placement.planning.question import Objective
from placement.planning.scoring import (
    GUESSED_SHARE,
    LEADERS,
    OVER_BOUND,
    ROUGH,
    batches,
    score_prospects,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from placement.planning.candidate import Candidate, Scored, Trial
    from placement.planning.costbook import CostBook
    from placement.planning.goodput import Carried
    from placement.planning.plan import Target
    from placement.planning.question import Question
    from placement.planning.scoring import Setting, Spread
    from placement.planning.search import Prospect, Search
    from placement.simulation.deployment import Overheads
    from placement.simulation.dynamics import Dynamics
    from placement.workload import Workload

RUNNERS_UP = 2
"""That are measured besides the best of each family."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How many copies of one candidate carry a rate; travels to another process."""

    book: CostBook
    candidate: Candidate
    workload: Workload
    target: Target
    overheads: Overheads
    dynamics: Dynamics
    rate_rps: float
    least: int
    guess: int
    most: int


def carry(asked: Asked) -> Carried | None:
    return find_fewest_copies(
        deployment_of(asked.book, asked.candidate, asked.target, asked.overheads),
        asked.workload,
        asked.target.attainment,
        asked.rate_rps,
        least=asked.least,
        guess=asked.guess,
        most=asked.most,
        dynamics=asked.dynamics,
    )


def asked_of(
    setting: Setting, candidate: Candidate, rate_rps: float, *, least: int, guess: int, most: int
) -> Asked:
    return Asked(
        book=setting.book,
        candidate=candidate,
        workload=setting.sample_for(rate_rps / guess),
        target=setting.target,
        overheads=setting.overheads,
        dynamics=setting.dynamics,
        rate_rps=rate_rps,
        least=least,
        guess=guess,
        most=most,
    )


def measured(setting: Setting, asked: Asked, carried: Carried, bound_rps: float) -> Trial:
    """How much more than its part of the rate a copy would serve: less than one of fewer copies
    would have to, over the same requests; or of a single one whatever it can."""
    guess_rps = max(asked.rate_rps * (1 + ROUGH), bound_rps * GUESSED_SHARE)
    if carried.copies > 1:
        guess_rps = asked.rate_rps / (carried.copies - 1)
    trial = setting.trial(
        asked.candidate,
        guess_rps,
        worth_rps=0.0,
        most_rps=bound_rps * OVER_BOUND,
        copies=carried.copies,
    )
    load = asked.workload if carried.copies > 1 else trial.workload
    return replace(trial, workload=load, carried=carried, resolution=RESOLUTION)


@dataclass(frozen=True, slots=True)
class _Able:
    """A candidate that carries the rate, and what it takes for that."""

    price: float
    prospect: Prospect
    asked: Asked
    carried: Carried

    @property
    def deployed(self) -> Candidate:
        return self.prospect.candidate.times(self.carried.copies)


class Carrying:
    def __init__(self, setting: Setting, question: Question, search: Search) -> None:
        assert question.rate_rps is not None, "the objective needs one"
        self._setting, self._question, self._search = setting, question, search
        self._rate_rps = question.rate_rps
        self._able: list[_Able] = []
        self._lowest: dict[tuple[str, ...], float] = {}
        """Of each family: what the best of it takes."""

    def score(self, spread: Spread, progress: Callable[[int, int], None]) -> list[Scored]:
        """`progress` is told how many prospects of how many are done."""
        prospects = sorted(self._search.prospects(), key=self._promise)
        unable_too = len(prospects) + LEADERS
        for done, batch in batches(prospects):
            asked = list(self._worth_asking(batch))
            for (prospect, one), carried in zip(
                asked, spread(carry, [one for _, one in asked]), strict=True
            ):
                if carried is not None:
                    self._learn(prospect, one, carried)
            progress(done, unable_too)
        scored = list(spread(score, [self._trial(leader) for leader in self._leaders()]))
        unable = [one for one in prospects if one.candidate.family not in self._lowest]
        if unable:
            scored += score_prospects(
                self._setting,
                self._search,
                unable,
                spread,
                lambda done, total: progress(len(prospects) + done, len(prospects) + total),
            )
        else:
            progress(unable_too, unable_too)
        return scored

    def _promise(self, prospect: Prospect) -> tuple[float, str]:
        """What it would take if it served its usual share of its bound."""
        copies = ceil(self._rate_rps / (prospect.bound_rps * GUESSED_SHARE))
        return copies * self._least_price(prospect.candidate), str(prospect.candidate)

    def _worth_asking(self, batch: Sequence[Prospect]) -> Iterator[tuple[Prospect, Asked]]:
        """In no more copies than fit the fleet and are as cheap as the best of its family."""
        for prospect in batch:
            candidate, bound_rps = prospect.candidate, prospect.bound_rps
            most = self._search.copies(candidate)
            price = self._least_price(candidate)
            if candidate.family in self._lowest and price > 0:
                most = min(most, int(self._lowest[candidate.family] / price + 1e-9))
            least = ceil(self._rate_rps / (bound_rps * OVER_BOUND) - 1e-9)
            if least <= most:
                guess = min(max(ceil(self._rate_rps / (bound_rps * GUESSED_SHARE)), least), most)
                yield (
                    prospect,
                    asked_of(
                        self._setting,
                        candidate,
                        self._rate_rps,
                        least=least,
                        guess=guess,
                        most=most,
                    ),
                )

    def _least_price(self, candidate: Candidate) -> float:
        """Of a copy, whatever it does."""
        book = self._setting.book
        match self._question.objective:
            case Objective.COST:
                return candidate.cost_per_hour(book)
            case Objective.POWER:
                return power_of(book, candidate, None)
            case _:
                return candidate.accelerators

    def _learn(self, prospect: Prospect, asked: Asked, carried: Carried) -> None:
        candidate, cap_w = prospect.candidate, self._question.power_cap_w
        power_w = power_of(self._setting.book, candidate, carried.outcome) * carried.copies
        if cap_w is not None and power_w > cap_w:
            return
        price = self._least_price(candidate) * carried.copies
        if self._question.objective is Objective.POWER:
            price = power_w
        self._able.append(_Able(price, prospect, asked, carried))
        lowest = self._lowest.get(candidate.family, price)
        self._lowest[candidate.family] = min(lowest, price)

    def _leaders(self) -> list[_Able]:
        """The best of each family, then what came closest, each deployed only once."""
        apart = {one.deployed: one for one in sorted(self._able, key=_rank, reverse=True)}
        by_rank = sorted(apart.values(), key=_rank)
        firsts: dict[tuple[str, ...], _Able] = {}
        for one in by_rank:
            firsts.setdefault(one.prospect.candidate.family, one)
        runners_up = [one for one in by_rank if one not in firsts.values()][:RUNNERS_UP]
        return [*firsts.values(), *runners_up]

    def _trial(self, able: _Able) -> Trial:
        return measured(self._setting, able.asked, able.carried, able.prospect.bound_rps)


def _rank(able: _Able) -> tuple[float, float, str]:
    """Of equally dear ones that comes first which is the farthest from its targets."""
    return able.price, able.carried.strain, str(able.prospect.candidate)
