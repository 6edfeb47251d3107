"""What instances share with others on their machine, and what that costs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

REST_S = 0.005
"""Without work for so long, an instance begins from a rest."""
WINDOW_S = 0.12
"""About how long a machine keeps its pace."""


class Wait(NamedTuple):
    """For a processor, as a part of the time for which a pass has one."""

    alone: float = 0.0
    beside: float = 0.0


class Waits(NamedTuple):
    """What serves tokens takes its time from passes, and from longer ones more."""

    prompts: Wait = Wait()
    decodes: Wait = Wait()
    others: float = 1.0
    """Instances that computed in the mean, where others did."""

    def slowed(self, others: float, *, prompts: bool) -> float:
        """How many times as long a pass takes while so many others compute."""
        wait = self.prompts if prompts else self.decodes
        near = min(1.0, others / self.others)
        return 1.0 + wait.alone + near * (wait.beside - wait.alone)


@dataclass(frozen=True, slots=True)
class Machine:
    """For one instance: its neighbours, what serves their tokens, and others that are not seen."""

    waits: Waits
    width: int = 1
    """As many of the instances that were measured compute where this one does."""
    cold_s: float = 0.0
    """How much longer a pass takes after a rest, when caches are others' and clocks low, and one
    of decodes alone after prompts."""
    paces: tuple[float, ...] = ()
    """How many times as long as on average all takes, for a while each."""
