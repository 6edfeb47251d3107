"""Why a plan was chosen, in words that a person can check against the figures beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from placement.planning.candidate import AGGREGATED, DISAGGREGATED, HYBRID, MIX
from placement.planning.question import Objective

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from placement.planning.choice import Choice
    from placement.planning.costbook import CostBook, Cut
    from placement.planning.question import Question

CLOSE = 0.02
"""What simulations of this length cannot tell apart."""
NAMES = {
    AGGREGATED: "aggregated candidate",
    DISAGGREGATED: "split candidate",
    HYBRID: "hybrid candidate",
    MIX: "mix",
}
EXPLANATIONS = {
    "TTFT": "TTFT: prompts wait too long for their turn",
    "TPOT": "TPOT: its batches take too long per token",
}


class Reasons:
    """Compares in the terms of what was asked for, with the kinds of candidates that fit."""

    def __init__(self, book: CostBook, question: Question, kinds: Collection[str]) -> None:
        self._book, self._question, self._kinds = book, question, kinds

    def explain(self, winner: Choice, rivals: Sequence[Choice], unknown: Sequence[Cut] = ()) -> str:
        """`rivals` in order of preference; those that cannot answer the question come last.
        `unknown` cuts were left out."""
        best: dict[str, Choice] = {}
        for rival in rivals:
            best.setdefault(rival.candidate.kind, rival)
        kind = winner.candidate.kind
        best.pop(kind, None)
        parts = []
        if kind == AGGREGATED:
            parts.append(self._against_splitting(winner, best.pop(DISAGGREGATED, None)))
        parts.append(f"{winner.candidate} {self._achieves(winner)}.")
        parts += [self._comparison(winner, best[name]) for name in NAMES if name in best]
        if winner.candidate.units is not None:
            parts.append(self._why_together(winner))
        limit = winner.scored.goodput.limit
        parts.append(f"Beyond its goodput the first thing to give way is {limit}.")
        if unknown:
            parts.append(f"{left_out(unknown)}.")
        return " ".join(parts)

    def _why_together(self, winner: Choice) -> str:
        crossing_s = winner.candidate.crossing_token_s(self._book) * 1000
        network = self._book.hardware.network.name
        return (
            f"KV stays within nodes: over {network} that of 1000 prompt tokens would take "
            f"{crossing_s * 1e3:.3g} ms longer."
        )

    def _against_splitting(self, winner: Choice, split: Choice | None) -> str:
        if split is None and DISAGGREGATED not in self._kinds:
            return (
                "Do not disaggregate: this fleet has no room for a prefill beside a decode "
                "instance that meet the targets."
            )
        if split is None:
            return "Do not disaggregate: no split pools meet the targets on this fleet."
        if not split.serves(self._question):
            return f"Do not disaggregate: {self._shortfall(split)}."
        difference = self._difference(winner, split)
        if difference is None:
            return (
                f"Do not disaggregate: aggregated is as good as the best split pools, "
                f"{split.candidate} (within {CLOSE:.0%}), and simpler."
            )
        return (
            f"Do not disaggregate: aggregated {difference} here because the best split pools, "
            f"{split.candidate}, are limited by {_because(split)}."
        )

    def _comparison(self, winner: Choice, rival: Choice) -> str:
        what = f"the best {NAMES[rival.candidate.kind]}, {rival.candidate}"
        if not rival.serves(self._question):
            shortfall = self._shortfall(rival)
            return f"{shortfall[0].upper()}{shortfall[1:]}."
        difference = self._difference(winner, rival)
        if difference is None:
            return f"It is as good as {what} (within {CLOSE:.0%})."
        return (
            f"It {difference} than {what}, which {self._achieves(rival)} and is limited by "
            f"{_because(rival)}."
        )

    def _shortfall(self, rival: Choice) -> str:
        what = f"the best {NAMES[rival.candidate.kind]}, {rival.scored.candidate},"
        if rival.copies < 1:
            return f"{what} draws {rival.scored.power_w:.0f} W, over the power cap"
        return (
            f"{what} serves {rival.rate_rps:.4g} requests/s in all {rival.copies} of its copies "
            f"that fit, not the {self._question.rate_rps:g} asked for"
        )

    def _difference(self, winner: Choice, rival: Choice) -> str | None:
        """How much better, in the objective's own terms; None for what cannot be told apart."""
        objective = self._question.objective
        prices = (one.price(self._book, objective) for one in (winner, rival))
        ours, theirs = prices
        if abs(ours - theirs) <= CLOSE * abs(theirs):
            return None
        change = ours / theirs - 1
        size = f"{abs(change):.0%}"
        match objective:
            case Objective.GOODPUT:
                return f"serves {size} more"
            case Objective.PER_ACCELERATOR:
                return f"serves {size} more per accelerator"
            case Objective.ACCELERATORS:
                return f"needs {size} fewer accelerators"
            case Objective.COST:
                return f"costs {size} less"
            case Objective.POWER:
                return f"draws {size} less power"

    def _achieves(self, choice: Choice) -> str:
        share = choice.scored.per_accelerator
        serves = f"serves {choice.rate_rps:.4g} requests/s ({share:.4g} per accelerator)"
        match self._question.objective:
            case Objective.COST:
                return f"{serves} for ${choice.candidate.cost_per_hour(self._book):.2f} an hour"
            case Objective.POWER:
                return f"{serves} and draws {choice.power_w:.0f} W at {self._question.rate_rps:g}"
            case Objective.ACCELERATORS:
                return f"{serves} and takes {choice.candidate.accelerators} of the accelerators"
            case _:
                return serves


def left_out(cuts: Sequence[Cut]) -> str:
    names = ", ".join(map(str, cuts))
    return f"Not considered: {names}, of which the profile measured no server"


def _because(choice: Choice) -> str:
    limit = choice.scored.goodput.limit
    return EXPLANATIONS.get(limit, limit)
