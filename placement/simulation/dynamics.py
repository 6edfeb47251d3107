"""What a simulation lets happen to a deployment besides requests; all of it is optional."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from placement.balancing.settings import BalancerSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.messages import Role
    from placement.routing.admission import AdmissionSettings
    from placement.scaling.policy import Policy


@dataclass(frozen=True, slots=True)
class Failure:
    time_s: float
    instance: str


@dataclass(frozen=True, slots=True)
class Dynamics:
    policy: Policy | None = None
    """What the autoscaler follows; the instances deployed are those that stand at first."""
    history: Mapping[Role, tuple[float, ...]] = field(default_factory=dict)
    """Tokens per second of each role on earlier days, in samples of the policy's forecast."""
    balance: bool = False
    """Whether running requests move to even out load; those on instances that drain always do."""
    balancer: BalancerSettings = field(default_factory=BalancerSettings)
    look_s: float = 0.5
    """Between two looks of the balancer."""
    pause_budget_s: float = 0.05
    """A migration's last round begins once it takes no longer."""
    most_rounds: int = 8
    start_s: float = 60.0
    """From the decision to start an instance to its first request."""
    switch_s: float = 0.5
    """A role switch: no new requests meanwhile."""
    unplaced_share: float = 0.0
    """Of all starts, those that find no place."""
    failures: tuple[Failure, ...] = ()
    notice_s: float = 1.0
    """Until the requests of an instance that failed are answered elsewhere."""
    restart: bool = True
    """Without a policy: whether an instance that failed is started again."""
    patience_s: float = 600.0
    """A request for which no instance is found for so long fails."""
    seed: int = 0
    admission: AdmissionSettings | None = None
    """A gateway's, which refuses what would miss its TTFT target; None lets everybody in."""


@dataclass(slots=True)
class FleetRecord:
    """What became of the fleet."""

    timeline: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """How many instances of each role take accelerators, whenever that changes."""
    accelerator_s: dict[str, float] = field(default_factory=dict)
    """Held, by role, those that start and drain included."""
    turns: dict[str, int] = field(default_factory=dict)
    """Changes of direction, by role."""
    starts: int = 0
    stops: int = 0
    switches: int = 0
    failed_starts: int = 0
    losses: int = 0
    replays: int = 0
    """Requests that were answered anew after a failure."""
    migrations: int = 0
    failed_migrations: int = 0
    pauses_s: list[float] = field(default_factory=list)
    """Of migrations: from the last token at the source until the target can go on."""
    lasted_s: float = 0.0
    most_accelerators: int = 0

    @property
    def accelerator_hours(self) -> float:
        return sum(self.accelerator_s.values()) / 3600.0

    @property
    def turns_an_hour(self) -> dict[str, float]:
        hours = max(self.lasted_s, 1.0) / 3600.0
        return {role: turns / hours for role, turns in sorted(self.turns.items())}

    def cost(self, price_an_hour: Mapping[str, float]) -> float:
        """By role, the price of an accelerator."""
        return sum(
            seconds / 3600.0 * price_an_hour[role] for role, seconds in self.accelerator_s.items()
        )
