"""Which of the scored candidates answers the question, in how many copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from placement.planning.question import Objective

if TYPE_CHECKING:
    from collections.abc import Iterable

    from placement.planning.candidate import Candidate, Scored
    from placement.planning.costbook import CostBook
    from placement.planning.plan import PoolPlan
    from placement.planning.question import Question


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A candidate in so many copies."""

    scored: Scored
    copies: int

    @property
    def candidate(self) -> Candidate:
        return self.scored.candidate.times(self.copies)

    @property
    def deployed(self) -> tuple[tuple[PoolPlan, ...], int, int | None]:
        """Copies of a small candidate and one large one may come to the same."""
        candidate = self.scored.candidate.times(max(self.copies, 1))
        return candidate.pools, candidate.token_budget, candidate.units

    @property
    def rate_rps(self) -> float:
        return self.scored.goodput.rate_rps * self.copies

    @property
    def power_w(self) -> float:
        return self.scored.power_w * self.copies

    def price(self, book: CostBook, objective: Objective) -> float:
        """What is to be least."""
        match objective:
            case Objective.GOODPUT:
                return -self.rate_rps
            case Objective.PER_ACCELERATOR:
                return -self.scored.per_accelerator
            case Objective.ACCELERATORS:
                return self.candidate.accelerators
            case Objective.COST:
                return self.candidate.cost_per_hour(book)
            case Objective.POWER:
                return self.power_w

    def serves(self, question: Question) -> bool:
        """Whether it fits under the power cap and carries the rate asked for."""
        if self.copies < 1:
            return False
        return question.rate_rps is None or self.rate_rps >= question.rate_rps * (1 - 1e-9)


def choices_of(scored: Iterable[Scored], question: Question) -> list[Choice]:
    """Every candidate that serves at all."""
    return [_copies_for(one, question) for one in scored if one.goodput.rate_rps > 0]


def _copies_for(scored: Scored, question: Question) -> Choice:
    """As many as the rate needs and the fleet holds; for goodputs, as many as power allows."""
    copies = scored.copies
    if question.objective.needs_rate and question.rate_rps is not None:
        copies = min(copies, int(np.ceil(question.rate_rps / scored.goodput.rate_rps - 1e-9)))
    if question.power_cap_w is not None:
        copies = min(copies, int(question.power_cap_w // max(scored.power_w, 1e-9)))
    return Choice(scored, copies)


def ranked(book: CostBook, choices: Iterable[Choice], question: Question) -> list[Choice]:
    """Those that answer the question, the best first; then fewer accelerators, then more served."""
    able = [one for one in choices if one.serves(question)]
    return sorted(
        able,
        key=lambda one: (
            one.price(book, question.objective),
            one.candidate.accelerators,
            -one.rate_rps,
            str(one.candidate),
        ),
    )
