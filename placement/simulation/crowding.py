"""Instances that share a machine slow each other down while they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from placement.simulation.deployment import InstanceModel


class Neighbour(Protocol):
    name: str
    model: InstanceModel

    @property
    def demand(self) -> float | None:
        """Processors that it keeps busy; None while it does not compute."""
        ...

    def hurry_or_slow(self, now: float) -> None:
        """As many compute beside it as `Crowd.slowed` says from now on."""
        ...


class Crowd:
    """The instances of one machine that compute at the moment."""

    def __init__(self) -> None:
        self._computing: dict[str, Neighbour] = {}
        self._demands: dict[str, float] = {}

    @property
    def times(self) -> float:
        """How many times as long all takes that needs its processors, now."""
        machines = [one.model.machine for one in self._computing.values()]
        if not machines or machines[0] is None:
            return 1.0
        return machines[0].slowed(sum(self._demands.values()))

    def slowed(self, one: Neighbour, crowded_ratio: float, demand: float) -> float:
        """How many times as long a run of this one takes: by the neighbours that its crowded
        latency was measured beside, and by what is left of the processors."""
        others = len(self._computing) - (one.name in self._computing)
        times = 1.0 + min(1.0, others / one.model.neighbours) * (crowded_ratio - 1.0)
        if one.model.machine is None:
            return times
        beside = sum(self._demands.values()) - self._demands.get(one.name, 0.0)
        return times * one.model.machine.slowed(beside + demand)

    def settle(self, one: Neighbour, now: float) -> None:
        """It may have begun to compute something else, or have nothing to do any more."""
        demand = one.demand
        if demand == self._demands.get(one.name):
            return
        if demand is None:
            del self._computing[one.name], self._demands[one.name]
        else:
            self._computing[one.name], self._demands[one.name] = one, demand
        for other in self._computing.values():
            if other is not one:
                other.hurry_or_slow(now)
