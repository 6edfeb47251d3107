"""The highest rate at which enough requests meet their targets, by bisection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MOST_PROBES = 14


@dataclass(frozen=True, slots=True)
class Search:
    start_rps: float = 1.0
    attainment: float = 0.9
    tolerance: float = 0.05
    """The bracket's relative width at which the search ends."""
    probe_s: float = 20.0
    """The least time a rate is held: a burst that is over before queues grow proves nothing."""
    lowest_rps: float = 0.01
    highest_rps: float = 10_000.0


async def find_goodput(
    search: Search, attainment_at: Callable[[float], Awaitable[float]]
) -> float | None:
    """The highest rate that was seen to hold; None where not even the lowest one does.

    Doubles or halves to a bracket, then bisects it by the geometric mean.
    """
    holds_rps: float | None = None
    fails_rps: float | None = None
    rate_rps = search.start_rps
    for _ in range(MOST_PROBES):
        if await attainment_at(rate_rps) >= search.attainment:
            holds_rps = rate_rps
        else:
            fails_rps = rate_rps
        following = _next_rps(search, holds_rps, fails_rps)
        if following is None:
            break
        rate_rps = following
    return holds_rps


def _next_rps(search: Search, holds_rps: float | None, fails_rps: float | None) -> float | None:
    if holds_rps is None:
        assert fails_rps is not None
        return fails_rps / 2 if fails_rps > search.lowest_rps else None
    if fails_rps is None:
        return holds_rps * 2 if holds_rps < search.highest_rps else None
    if fails_rps / holds_rps <= 1 + search.tolerance:
        return None
    return float((holds_rps * fails_rps) ** 0.5)
