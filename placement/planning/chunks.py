"""Chunks of other sizes than all candidates are tried with, for the best of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from placement.planning.candidate import score
from placement.planning.carrying import asked_of, carry, measured
from placement.planning.choice import choices_of, ranked
from placement.planning.goodput import RESOLUTION
from placement.planning.scoring import OVER_BOUND, ROUGH

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from placement.planning.candidate import Candidate, Scored, Trial
    from placement.planning.choice import Choice
    from placement.planning.question import Question
    from placement.planning.scoring import Setting, Spread

LEAST_TOKENS, MOST_TOKENS = 128, 2048


@dataclass(frozen=True, slots=True)
class Chunking:
    """What the best are tried again for, and with."""

    setting: Setting
    question: Question
    spread: Spread

    def refined(self, choices: Sequence[Choice]) -> list[Choice]:
        """The best of each kind in chunks that suit it better, where there are such."""
        tried = {one.scored.candidate for one in choices}
        better = {one: self._climbed(one, tried) for one in self._firsts(choices)}
        return [better.get(one, one) for one in choices]

    def _firsts(self, choices: Sequence[Choice]) -> list[Choice]:
        able = ranked(self.setting.book, choices, self.question)
        rest = sorted(choices, key=lambda one: (-one.rate_rps, str(one.candidate)))
        firsts: dict[str, Choice] = {}
        for one in (*able, *rest):
            firsts.setdefault(one.candidate.kind, one)
        return list(firsts.values())

    def _climbed(self, choice: Choice, tried: set[Candidate]) -> Choice:
        """In chunks half or twice as large, and so on as long as that is better."""
        while True:
            others = [one for one in _neighbours(choice.scored.candidate) if one not in tried]
            tried.update(others)
            found = choices_of(self._measured(choice.scored, others), self.question)
            able = ranked(self.setting.book, [choice, *found], self.question)
            if not able or able[0] is choice:
                return choice
            choice = able[0]

    def _measured(self, scored: Scored, others: Sequence[Candidate]) -> list[Scored]:
        """What serves more than this one, or carries the rate asked for in fewer copies."""
        if self.question.objective.needs_rate:
            trials = list(self._in_fewer_copies(scored, others))
        else:
            trials = [self._trial(scored, other) for other in others]
        return list(self.spread(score, trials))

    def _trial(self, scored: Scored, other: Candidate) -> Trial:
        """Over the same requests; given up at once where it does not serve more."""
        rate_rps, seen = scored.goodput.rate_rps, scored.goodput.outcome
        assert seen is not None, "it serves"
        trial = self.setting.trial(
            other,
            rate_rps,
            worth_rps=rate_rps * (1 + RESOLUTION),
            most_rps=scored.most_rps,
            copies=scored.copies,
        )
        load = self.setting.sample.first(len(seen.arrived_s))
        return replace(trial, workload=load, stride=ROUGH)

    def _in_fewer_copies(self, scored: Scored, others: Sequence[Candidate]) -> Iterator[Trial]:
        rate_rps = self.question.rate_rps
        assert rate_rps is not None, "the objective needs one"
        most = 0 if scored.carried is None else scored.carried.copies - 1
        least = ceil(rate_rps / scored.most_rps - 1e-9)
        if least > most:
            return
        asked = [
            asked_of(self.setting, other, rate_rps, least=least, guess=most, most=most)
            for other in others
        ]
        for one, carried in zip(asked, self.spread(carry, asked), strict=True):
            if carried is not None:
                yield measured(self.setting, one, carried, scored.most_rps / OVER_BOUND)


def _neighbours(candidate: Candidate) -> list[Candidate]:
    sizes = candidate.token_budget // 2, candidate.token_budget * 2
    return [
        replace(candidate, token_budget=size)
        for size in sizes
        if LEAST_TOKENS <= size <= MOST_TOKENS
    ]
