"""A machine that others share, unseen, is faster and slower by turns."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import TYPE_CHECKING

from placement.latency.machine import WINDOW_S
from placement.latency.model import steps_to_reach

if TYPE_CHECKING:
    from placement.latency.machine import Machine

WINDOWS = 4096
"""Drawn beforehand; they come again after minutes."""


def unsteadiness(name: str, machine: Machine | None) -> Unsteadiness | None:
    """Of one instance's processors; None where a machine is as fast at any time."""
    if machine is None or not machine.paces:
        return None
    return Unsteadiness(_drawn(name, machine.paces))


class Unsteadiness:
    """Paces by the window, the same for the same name."""

    __slots__ = ("_paces",)

    def __init__(self, paces: tuple[float, ...]) -> None:
        self._paces = paces

    def go(
        self, first_s: float, growth_s: float, steps: int, now: float
    ) -> tuple[float, float, int]:
        """Steps that begin now: how long they take at this pace, and how many until it may
        change."""
        window = int(now / WINDOW_S)
        pace = self._paces[window % WINDOWS]
        first_s, growth_s = pace * first_s, pace * growth_s
        if steps > 1:
            left_s = (window + 1) * WINDOW_S - now
            steps = min(steps, steps_to_reach(left_s, first_s, growth_s))
        return first_s, growth_s, steps


@lru_cache(maxsize=1024)
def _drawn(name: str, paces: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(random.Random(name).choices(paces, k=WINDOWS))  # noqa: S311 - no secret
