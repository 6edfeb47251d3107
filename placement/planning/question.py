"""What a plan is asked for: targets, and what is to be most or least."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import TYPE_CHECKING

from engine.errors import BadConfig
from placement.simulation.deployment import Overheads
from placement.simulation.dynamics import Dynamics

if TYPE_CHECKING:
    from placement.planning.plan import Target

LEAST_REQUESTS, MOST_REQUESTS = 50, 1_000_000
AS_A_CLUSTER = Dynamics(balance=True)
"""What a cluster does of itself unless its config says otherwise."""


class Objective(str, Enum):
    GOODPUT = "goodput"
    """Most requests a second that the whole fleet can serve."""
    PER_ACCELERATOR = "goodput-per-accelerator"
    """Most for each accelerator in use; the rest of the fleet may stay idle."""
    ACCELERATORS = "accelerators"
    """Fewest accelerators for a given rate."""
    COST = "cost"
    POWER = "power"

    @property
    def needs_rate(self) -> bool:
        return self in (Objective.ACCELERATORS, Objective.COST, Objective.POWER)


@dataclass(frozen=True, slots=True)
class Question:
    target: Target
    objective: Objective = Objective.GOODPUT
    rate_rps: float | None = None
    """What must be served; the goodputs can do without."""
    power_cap_w: float | None = None
    requests: int = 600
    """Simulated of each candidate."""
    most_requests: int = 4800
    """Of one that serves many, whose batches take longer to fill."""
    seed: int = 0
    token_budgets: tuple[int, ...] = (512, 2048)
    overheads: Overheads = field(default_factory=Overheads)
    dynamics: Dynamics = AS_A_CLUSTER
    processes: int = 1

    def __post_init__(self) -> None:
        if self.objective.needs_rate and self.rate_rps is None:
            raise BadConfig("rate", None, f"needed to plan for least {self.objective.value}")
        for name, value in (("rate", self.rate_rps), ("power-cap", self.power_cap_w)):
            if value is not None and not 0 < value < inf:
                raise BadConfig(name, value, "must be positive and finite")
        if not LEAST_REQUESTS <= self.requests <= MOST_REQUESTS:
            rule = f"must be from {LEAST_REQUESTS}, which percentiles need, to {MOST_REQUESTS}"
            raise BadConfig("requests", self.requests, rule)
