"""How a deployment does as the rate grows, and how busy it is meanwhile: what reports draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.simulation.simulator import Simulation, simulate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from placement.simulation.deployment import Deployment
    from placement.simulation.dynamics import Dynamics
    from placement.simulation.outcome import Outcome
    from placement.workload import Workload

RATE_SHARES = (0.2, 0.4, 0.6, 0.75, 0.9, 1.0, 1.15, 1.4)
"""Of a goodput: the rates at which a deployment is looked at."""
WINDOWS = 60
"""Into which utilisation over time is divided at least, up to twice as many."""
SHORTEST_S = 1e-3 / WINDOWS


@dataclass(frozen=True, slots=True)
class RatePoint:
    rate_rps: float
    attainment: float
    ttft_p90_s: float | None
    tpot_p90_s: float | None


def over_rates(
    deployment: Deployment,
    workload: Workload,
    rates_rps: Iterable[float],
    dynamics: Dynamics | None = None,
) -> list[RatePoint]:
    """The same requests at each rate."""
    points = []
    for rate_rps in rates_rps:
        load = workload.at_rate(rate_rps)
        figures = simulate(deployment, load, dynamics=dynamics).figures()
        p90s = figures["ttft_s"]["p90"], figures["tpot_s"]["p90"]
        points.append(RatePoint(rate_rps, figures["attainment"], *p90s))
    return points


@dataclass(frozen=True, slots=True)
class Utilisation:
    """The share of each window in which a role's instances were busy."""

    ends_s: NDArray[np.float64]
    by_role: dict[str, NDArray[np.float64]]


@dataclass(slots=True)
class _Watch:
    """Looks at an ongoing simulation at the end of each window; the longer it lasts, the longer
    they become."""

    simulation: Simulation
    requests: int
    window_s: float
    seen_s: list[float] = field(default_factory=list)
    busy_s: list[dict[str, float]] = field(default_factory=list)

    def look(self, now: float) -> None:
        total: dict[str, float] = {}
        for one in self.simulation.all_instances:
            total[one.model.role.value] = total.get(one.model.role.value, 0.0) + one.busy_s
        self.seen_s.append(now)
        self.busy_s.append(total)
        if len(self.seen_s) == 2 * WINDOWS:
            self.seen_s, self.busy_s = self.seen_s[1::2], self.busy_s[1::2]
            self.window_s *= 2
        if self.simulation.ledger.ended < self.requests:
            self.simulation.at(now + self.window_s, _look, self)


def _look(watch: Any, now: float) -> None:
    watch.look(now)


def watched(
    deployment: Deployment, workload: Workload, dynamics: Dynamics | None = None
) -> tuple[Outcome, Utilisation]:
    """A simulation and how busy each role was over its time."""
    simulation = Simulation(deployment, workload, dynamics=dynamics)
    window_s = max(workload.duration_s / WINDOWS, SHORTEST_S)
    watch = _Watch(simulation, len(workload), window_s)
    simulation.at(float(workload.arrival_s[0]) + window_s, _look, watch)
    outcome = simulation.run()
    instances: dict[str, int] = {}
    for model in deployment.instances:
        instances[model.role.value] = instances.get(model.role.value, 0) + 1
    shares = {
        role: _shares([busy[role] for busy in watch.busy_s], count * watch.window_s)
        for role, count in instances.items()
    }
    return outcome, Utilisation(np.array(watch.seen_s) - workload.arrival_s[0], shares)


def _shares(busy_s: list[float], most_s: float) -> NDArray[np.float64]:
    """A run counts when it ends: what a window cannot hold was done in those before it."""
    windows = np.diff(np.array([0.0, *busy_s]))
    for place in range(len(windows) - 1, 0, -1):
        excess = max(windows[place] - most_s, 0.0)
        windows[place] -= excess
        windows[place - 1] += excess
    shares: NDArray[np.float64] = np.minimum(windows / most_s, 1.0)
    return shares
