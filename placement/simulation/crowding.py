"""Instances that share a machine slow each other down while they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from placement.simulation.deployment import InstanceModel


class Neighbour(Protocol):
    name: str
    model: InstanceModel

    @property
    def slowed(self) -> float | None:
        """How many times as long all takes there; None while it does not compute."""
        ...

    def hurry_or_slow(self, now: float) -> None:
        """As many compute beside it as `Crowd.slowed` says from now on."""
        ...


class Crowd:
    """The instances of one machine that compute at the moment."""

    def __init__(self) -> None:
        self._computing: dict[str, Neighbour] = {}

    @property
    def times(self) -> float:
        """How many times as long all takes that needs its processors, now."""
        slowed = [one.slowed or 1.0 for one in self._computing.values()]
        return sum(slowed) / len(slowed) if slowed else 1.0

    def slowed(self, one: Neighbour, crowded_ratio: float, *, prompts: bool) -> float:
        """How many times as long a run of this one takes: by the neighbours that its crowded
        latency was measured beside, and by what waits for the processors."""
        others = len(self._computing) - (one.name in self._computing)
        times = 1.0 + min(1.0, others / one.model.neighbours) * (crowded_ratio - 1.0)
        machine = one.model.machine
        if machine is None:
            return times
        near = [other for other in self._computing.values() if other is not one]
        width = sum(other.model.accelerators for other in near) + machine.width - 1
        return times * machine.waits.slowed(width, prompts=prompts)

    def settle(self, one: Neighbour, now: float) -> None:
        """It may have begun to compute, or have nothing to do any more."""
        if (one.slowed is None) is (one.name not in self._computing):
            return
        if one.slowed is None:
            del self._computing[one.name]
        else:
            self._computing[one.name] = one
        for other in self._computing.values():
            if other is not one:
                other.hurry_or_slow(now)
