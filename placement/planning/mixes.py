"""Fleets of several kinds of devices: the cheapest mix for a rate, or the one that serves most.

An integer program proposes how many of which units, from what each serves of requests of each
size; the proposal counts once the whole mix, simulated under one router, serves the rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import NoFeasiblePlan
from placement.planning.candidate import AGGREGATED, MIX, Candidate, score
from placement.planning.carrying import asked_of, carry, measured
from placement.planning.cheapest_mix import (
    InstanceType,
    cheapest_mix,
    fullest_mix,
    size_bins,
    size_buckets,
)
from placement.planning.choice import Choice
from placement.planning.packing import copies_that_fit, room_of, taken_of_room
from placement.planning.plan import PoolPlan
from placement.planning.question import Objective
from placement.planning.scoring import OVER_BOUND
from placement.workload import Arrivals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from engine.messages import Role
    from placement.planning.candidate import Scored, Trial
    from placement.planning.cheapest_mix import Mix
    from placement.planning.costbook import Cut
    from placement.planning.question import Question
    from placement.planning.scoring import Setting, Spread
    from placement.planning.search import Prospect
    from placement.workload import Workload

MOST_UNITS = 5
SIZES = 2
"""Bins of prompt lengths, and of output lengths."""
BUCKET_REQUESTS = 240
BUCKET_RESOLUTION = 0.15
OVER_RATIO = 1.5
"""Times what token counts say: a bucket may suit a device better than the whole workload does."""
MARGINS = (1.0, 1.1, 1.2, 1.35)
"""Times the rate that the program is asked for, until the whole mix simulated serves the rate."""
EXPECTED_SHARE = 0.9
"""Of what its parts serve alone: where the search for a mix's own goodput starts."""
POWER = "power_w"


@dataclass(frozen=True, slots=True)
class Unit:
    """A candidate as a building block, and about what it serves of the whole workload."""

    candidate: Candidate
    guess_rps: float
    most_rps: float


@dataclass(frozen=True, slots=True)
class Mixing:
    """What mixes are made for, and with."""

    setting: Setting
    question: Question
    spread: Spread

    def best(
        self, prospects: Sequence[Prospect], choices: Sequence[Choice], beaten: Choice | None
    ) -> list[Scored]:
        """Mixes that beat the best choice of a single kind of unit, if there is one."""
        if len(self.setting.book.hardware.groups) < 2:
            return []
        if self.question.objective.needs_rate:
            return list(self._cheapest(self._units(prospects, choices, beaten), beaten))
        if self.question.objective is Objective.GOODPUT and beaten is not None:
            return list(self._fullest(choices, beaten))
        return []

    def _units(
        self, prospects: Sequence[Prospect], choices: Sequence[Choice], beaten: Choice | None
    ) -> list[Unit]:
        """The cheapest per request of each family; and what serves only small requests in time."""
        book, objective = self.setting.book, self.question.objective
        budget = max(self.question.token_budgets) if beaten is None else _budget(beaten)
        usable = [one.scored for one in choices if _mixable(one.scored.candidate, budget)]
        by_price = sorted(
            usable,
            key=lambda one: Choice(one, 1).price(book, objective) / one.goodput.rate_rps,
        )
        families: dict[tuple[str, ...], Unit] = {}
        for one in by_price:
            unit = Unit(one.candidate, one.goodput.rate_rps, one.most_rps)
            families.setdefault(one.candidate.family, unit)
        units = list(families.values())[:MOST_UNITS]
        for prospect in prospects:
            family = prospect.candidate.family
            small = family[0] == AGGREGATED and _mixable(prospect.candidate, budget)
            if small and family not in families:
                bound_rps = prospect.bound_rps
                families[family] = Unit(prospect.candidate, bound_rps, bound_rps)
                units.append(families[family])
        return units

    def _cheapest(self, units: Sequence[Unit], beaten: Choice | None) -> Iterator[Scored]:
        """The first proposal that holds, while the program's price stays below what it beats."""
        rate_rps, book = self.question.rate_rps, self.setting.book
        assert rate_rps is not None, "the objective needs one"
        types, seen = self._types(units), None
        most = None if beaten is None else beaten.price(book, self.question.objective)
        for margin in MARGINS:
            buckets = size_buckets(self.setting.sample, rate_rps * margin, SIZES)
            try:
                mix = cheapest_mix(types, buckets, self._limits())
            except NoFeasiblePlan:
                return
            if most is not None and mix.price >= most:
                return
            proposal = _together(mix, [unit.candidate for unit in units])
            if self._is_mix(proposal) and proposal != seen:
                seen = proposal
                most_rps = sum(one.most_rps * mix.counts[str(one.candidate)] for one in units)
                asked = asked_of(self.setting, proposal, rate_rps, least=1, guess=1, most=1)
                (carried,) = self.spread(carry, [asked])
                if carried is not None:
                    trial = measured(self.setting, asked, carried, most_rps / OVER_BOUND)
                    yield from self.spread(score, [trial])
                    return

    def _fullest(self, choices: Sequence[Choice], beaten: Choice) -> Iterator[Scored]:
        """Every device at work, if the program says that this serves more than the best alone."""
        ones = [one.scored for one in choices]
        ones = [one for one in ones if _mixable(one.candidate, _budget(beaten))]
        if not ones:
            return
        types = [self._type(one.candidate, (one.goodput.rate_rps,), one.power_w) for one in ones]
        mix = fullest_mix(types, self._limits())
        expected_rps = sum(one.bucket_rps[0] * mix.counts[one.name] for one in types)
        proposal = _together(mix, [one.candidate for one in ones])
        if self._is_mix(proposal) and expected_rps > beaten.rate_rps:
            most_rps = sum(one.most_rps * mix.counts[str(one.candidate)] for one in ones)
            guess_rps = expected_rps * EXPECTED_SHARE
            trial = self.setting.trial(
                proposal, guess_rps, worth_rps=beaten.rate_rps, most_rps=most_rps
            )
            yield from self.spread(score, [trial])

    def _is_mix(self, proposal: Candidate) -> bool:
        """Of several kinds, and one that fits: the program knows nodes by widths alone."""
        return (
            proposal.kind == MIX and copies_that_fit(self.setting.book.hardware, proposal.pools) > 0
        )

    def _types(self, units: Sequence[Unit]) -> list[InstanceType]:
        """Each unit's highest rate for requests of each size alone."""
        bins = [self.setting.sample.select(rows) for rows in size_bins(self.setting.sample, SIZES)]
        trials = [self._bucket_trial(unit, load) for unit in units for load in bins]
        scored = list(self.spread(score, trials))
        types = []
        for number, unit in enumerate(units):
            mine = scored[number * len(bins) : (number + 1) * len(bins)]
            rates = tuple(one.goodput.rate_rps for one in mine)
            types.append(self._type(unit.candidate, rates, max(one.power_w for one in mine)))
        return types

    def _bucket_trial(self, unit: Unit, load: Workload) -> Trial:
        """Shorter requests can be served at a higher rate, about in proportion."""
        ratio = _mean_tokens(self.setting.sample) / _mean_tokens(load)
        most_rps = unit.most_rps * ratio * OVER_RATIO
        trial = self.setting.trial(
            unit.candidate, unit.guess_rps * ratio, worth_rps=0.0, most_rps=most_rps
        )
        arrivals = Arrivals(np.random.default_rng(self.question.seed))
        again = load.resampled(BUCKET_REQUESTS, 1.0, arrivals)
        return replace(trial, workload=again, resolution=BUCKET_RESOLUTION)

    def _type(
        self, candidate: Candidate, bucket_rps: tuple[float, ...], power_w: float
    ) -> InstanceType:
        book = self.setting.book
        match self.question.objective:
            case Objective.COST:
                price = candidate.cost_per_hour(book)
            case Objective.POWER:
                price = power_w
            case _:
                price = float(candidate.accelerators)
        most = copies_that_fit(book.hardware, candidate.pools)
        room = taken_of_room(book.hardware, candidate.pools)
        return InstanceType(str(candidate), price, most, bucket_rps, {**room, POWER: power_w})

    def _limits(self) -> dict[str, float]:
        limits: dict[str, float] = {**room_of(self.setting.book.hardware)}
        if self.question.power_cap_w is not None:
            limits[POWER] = self.question.power_cap_w
        return limits


def _budget(choice: Choice) -> int:
    return choice.scored.candidate.token_budget


def _mixable(candidate: Candidate, budget: int) -> bool:
    return candidate.token_budget == budget and candidate.units is None


def _together(mix: Mix, candidates: Sequence[Candidate]) -> Candidate:
    return combined({one: mix.counts[str(one)] for one in candidates})


def combined(counts: Mapping[Candidate, int]) -> Candidate:
    """One candidate with the pools of all, those of one role and cut made one."""
    pools: dict[tuple[Role, Cut], int] = {}
    for candidate, count in counts.items():
        for pool in candidate.pools:
            key = pool.role, pool.cut
            pools[key] = pools.get(key, 0) + count * pool.instances
    budgets = {candidate.token_budget for candidate in counts}
    assert len(budgets) == 1, "units of a mix share one setting"
    kept = sorted((item for item in pools.items() if item[1]), key=lambda item: item[0])
    return Candidate(tuple(PoolPlan(r, n, cut) for (r, cut), n in kept), budgets.pop())


def _mean_tokens(load: Workload) -> float:
    return float((load.prompt_tokens + load.output_tokens).mean())
