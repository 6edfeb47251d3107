"""The real balancer in virtual time: it looks, and its moves become migrations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from engine.messages import InstanceState
from placement.balancing.pace_balancer import balancer_for
from placement.view import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from placement.simulation.dynamics import Dynamics
    from placement.simulation.instance import SimulatedInstance
    from placement.simulation.migration import Migrations


class World(Protocol):
    instances: dict[str, SimulatedInstance]

    @property
    def unfinished(self) -> bool: ...
    def at(self, time_s: float, action: Callable[[Any, float], None], subject: Any) -> None: ...
    def look_again_s(self, now: float, every_s: float) -> float: ...


class Balancing:
    def __init__(self, world: World, migrations: Migrations, dynamics: Dynamics) -> None:
        self._world, self._migrations, self._dynamics = world, migrations, dynamics
        self._balancer = balancer_for(dynamics.balancer)

    def begin(self) -> None:
        self._world.at(self._dynamics.look_s, self._look, None)

    def moved(self, request_id: str, *, committed: bool) -> None:
        if not committed:
            self._balancer.failed(request_id)

    def _look(self, _: None, now: float) -> None:
        if self._dynamics.balance or self._must_empty():
            view = View(now, tuple(one.whole_view(now) for one in self._world.instances.values()))
            moves = self._balancer.decide(view, drain_only=not self._dynamics.balance)
            for move in moves:
                self._migrations.ask(move, now)
        if self._world.unfinished:
            next_s = self._world.look_again_s(now, self._dynamics.look_s)
            self._world.at(next_s, self._look, None)

    def _must_empty(self) -> bool:
        """A balancer that only empties need not look at a fleet where nothing is to be."""
        return any(
            one.state is InstanceState.DRAINING or one.decodes_for_others
            for one in self._world.instances.values()
        )
