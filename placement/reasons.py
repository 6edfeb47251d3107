"""Why a plan was chosen, in words that a person can check against the figures beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from placement.candidate import AGGREGATED, DISAGGREGATED, HYBRID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from placement.candidate import Scored

CLOSE = 0.02
"""What simulations of this length cannot tell apart."""


def explain(winner: Scored, others: Sequence[Scored], objective: str) -> str:
    best = {other.candidate.kind: other for other in reversed(others)}
    parts = [_headline(winner, best)]
    parts += [
        _comparison(winner, best[kind])
        for kind in (AGGREGATED, DISAGGREGATED, HYBRID)
        if kind in best and kind not in _told(winner)
    ]
    parts.append(f"Beyond its goodput the first thing to give way is {winner.goodput.limit}.")
    if objective != "goodput":
        parts.append(f"Chosen for least {objective} at the rate asked for.")
    return " ".join(parts)


def _told(winner: Scored) -> set[str]:
    """Kinds that need no sentence of their own: the winner's, and what its headline speaks of."""
    kind = winner.candidate.kind
    return {kind, DISAGGREGATED} if kind == AGGREGATED else {kind}


def _headline(winner: Scored, best: dict[str, Scored]) -> str:
    kind, candidate = winner.candidate.kind, winner.candidate
    serves = f"{candidate} serves {winner.per_accelerator:.4g} requests/s per accelerator"
    split = best.get(DISAGGREGATED)
    if kind == AGGREGATED and split is not None:
        more = winner.per_accelerator / split.per_accelerator - 1
        if more < 0:
            return (
                f"Do not disaggregate: {serves}; the best split pools, {split.candidate}, serve "
                f"{-more:.0%} more per accelerator but suit this fleet or objective worse."
            )
        return (
            f"Do not disaggregate: aggregated serves {more:.0%} more here because the best split "
            f"pools, {split.candidate}, are limited by {_because(split)}. {serves}."
        )
    if kind == AGGREGATED:
        return f"Do not disaggregate: no split pools meet the targets on this fleet. {serves}."
    return f"{serves}."


def _comparison(winner: Scored, other: Scored) -> str:
    ratio = winner.per_accelerator / other.per_accelerator - 1
    name = {AGGREGATED: "aggregated", DISAGGREGATED: "split", HYBRID: "hybrid"}
    what = f"the best {name[other.candidate.kind]} candidate, {other.candidate}"
    if abs(ratio) < CLOSE:
        return f"It is as good as {what} (within {CLOSE:.0%})."
    if ratio > 0:
        return f"That is {ratio:.0%} more than {what}, which is limited by {_because(other)}."
    return f"That is {-ratio:.0%} less than {what}, which fits this objective or fleet worse."


def _because(other: Scored) -> str:
    limit = other.goodput.limit
    explanations = {
        "TTFT": "TTFT: prompts wait too long for their turn",
        "TPOT": "TPOT: its batches take too long per token",
    }
    return explanations.get(limit, limit)
