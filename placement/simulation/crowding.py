"""Instances that share a machine slow each other down while they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from placement.simulation.deployment import InstanceModel


class Neighbour(Protocol):
    name: str
    model: InstanceModel

    @property
    def computes(self) -> bool: ...
    def hurry_or_slow(self, now: float) -> None:
        """As many compute beside it as `Crowd.share` says from now on."""
        ...


class Crowd:
    """The instances of one machine that compute at the moment."""

    def __init__(self) -> None:
        self._computing: dict[str, Neighbour] = {}

    @property
    def busy_share(self) -> float:
        """Of all the instances that were measured together, those that compute."""
        most = 1 + max([one.model.neighbours for one in self._computing.values()], default=1)
        return min(1.0, len(self._computing) / most)

    def share(self, one: Neighbour) -> float:
        """Of the neighbours that its crowded latency was measured beside."""
        others = len(self._computing) - (one.name in self._computing)
        return min(1.0, others / one.model.neighbours)

    def settle(self, one: Neighbour, now: float) -> None:
        """It may have begun to compute, or have nothing to do any more."""
        if one.computes == (one.name in self._computing):
            return
        if one.computes:
            self._computing[one.name] = one
        else:
            del self._computing[one.name]
        for other in self._computing.values():
            if other is not one:
                other.hurry_or_slow(now)
