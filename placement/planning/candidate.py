"""Candidates: sets of pools that could serve, and what simulating one says about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.messages import Role
from engine.slo import Slo
from placement.planning.goodput import RESOLUTION, STRIDE, find_goodput
from placement.planning.plan import in_words
from placement.role import RoleSettings
from placement.routing.router import RouterSettings
from placement.simulation.deployment import Deployment

if TYPE_CHECKING:
    from placement.planning.costbook import CostBook
    from placement.planning.goodput import Carried, Goodput
    from placement.planning.plan import Plan, PoolPlan, Target
    from placement.simulation.deployment import Overheads
    from placement.simulation.dynamics import Dynamics
    from placement.simulation.outcome import Outcome
    from placement.workload import Workload

AGGREGATED, DISAGGREGATED, HYBRID, MIX = "aggregated", "disaggregated", "hybrid", "mix"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Pools that work together; a fleet holds as many copies as fit."""

    pools: tuple[PoolPlan, ...]
    token_budget: int
    units: int | None = None
    """Equal parts, each with the pools' instances side by side, stage by stage on one node, so that
    KV stays within nodes; None where they may lie anywhere."""

    @property
    def kind(self) -> str:
        roles = {pool.role for pool in self.pools}
        if len(self.pools) > len(roles):
            return MIX
        if roles == {Role.MIXED}:
            return AGGREGATED
        return HYBRID if Role.MIXED in roles else DISAGGREGATED

    @property
    def family(self) -> tuple[str, ...]:
        """Candidates that are compared by what they serve: of one kind, on the same devices."""
        return (self.kind, *sorted(self.by_device))

    @property
    def accelerators(self) -> int:
        return sum(pool.accelerators for pool in self.pools)

    @property
    def by_device(self) -> dict[str, int]:
        used: dict[str, int] = {}
        for pool in self.pools:
            used[pool.cut.device] = used.get(pool.cut.device, 0) + pool.accelerators
        return used

    def times(self, copies: int) -> Candidate:
        pools = tuple(replace(pool, instances=pool.instances * copies) for pool in self.pools)
        units = None if self.units is None else self.units * copies
        return replace(self, pools=pools, units=units)

    def cost_per_hour(self, book: CostBook) -> float:
        return sum(pool.instances * book.cost_per_hour(pool.cut) for pool in self.pools)

    def crossing_token_s(self, book: CostBook) -> float:
        """How much longer a prompt token's KV would take over the network than within a node."""
        source = next(pool.cut for pool in self.pools if pool.role.prefills)
        target = next(pool.cut for pool in reversed(self.pools) if pool.role.decodes)
        return book.crossing_token_s(source, target)

    def __str__(self) -> str:
        return in_words(self.pools, self.units)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    candidate: Candidate
    goodput: Goodput
    copies: int
    """How many fit the fleet, or as few as carry the rate that is asked for."""
    power_w: float
    """Of one at that rate, else at its goodput."""
    most_rps: float
    """In the long run, by mean loads."""
    carried: Carried | None = None
    """Where a rate was asked for and enough copies fit."""
    rough: bool = False
    """Whether only compared with others, without what a cluster does of itself."""

    @property
    def per_accelerator(self) -> float:
        return self.goodput.rate_rps / self.candidate.accelerators

    @property
    def fleet_rps(self) -> float:
        return self.goodput.rate_rps * self.copies


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate to be scored; travels to another process."""

    book: CostBook
    candidate: Candidate
    workload: Workload
    target: Target
    overheads: Overheads
    dynamics: Dynamics | None
    guess_rps: float
    worth_rps: float
    most_rps: float
    copies: int
    resolution: float = RESOLUTION
    stride: float = STRIDE
    carried: Carried | None = None


def score(trial: Trial) -> Scored:
    deployment = deployment_of(trial.book, trial.candidate, trial.target, trial.overheads)
    found = find_goodput(
        deployment,
        trial.workload,
        trial.target.attainment,
        trial.guess_rps,
        worth_rps=trial.worth_rps,
        most_rps=trial.most_rps,
        resolution=trial.resolution,
        stride=trial.stride,
        carried=trial.carried,
        dynamics=trial.dynamics,
    )
    seen = found.outcome if trial.carried is None else trial.carried.outcome
    power_w = power_of(trial.book, trial.candidate, seen)
    return Scored(
        trial.candidate,
        found,
        trial.copies,
        power_w,
        trial.most_rps,
        trial.carried,
        rough=trial.resolution > RESOLUTION,
    )


def deployment_of(
    book: CostBook, candidate: Candidate, target: Target, overheads: Overheads
) -> Deployment:
    """Instances in order of role; apart on nodes of their own unless they are in a unit."""
    instances, units = [], 1 if book.hardware.nodes == 1 else candidate.units
    for pool in candidate.pools:
        for number in range(pool.instances):
            node = f"{pool.role.value}-{number}"
            if units is not None:
                node = f"unit-{number * units // pool.instances}"
            settings = role_settings(candidate.token_budget)
            instances.append(book.instance(pool.cut, pool.role, settings, node))
    return Deployment(
        tuple(instances),
        book.shape.kv_bytes_per_token,
        book.hardware.network,
        Slo(target.ttft_s, target.tpot_s),
        overheads=overheads,
    )


def deployment_for(plan: Plan, book: CostBook) -> Deployment:
    """What a plan deploys, to be simulated."""
    budget = plan.token_budget or RoleSettings().prefill.token_budget
    together = plan.co_located
    candidate = Candidate(plan.pools, budget, None if together is None else together.units)
    deployment = deployment_of(book, candidate, plan.target, book.overheads)
    if together is None:
        return deployment
    return replace(deployment, router=RouterSettings(crossing_token_s=together.crossing_token_s))


def role_settings(token_budget: int) -> RoleSettings:
    settings = RoleSettings()
    return replace(settings, prefill=replace(settings.prefill, token_budget=token_budget))


def power_of(book: CostBook, candidate: Candidate, outcome: Outcome | None) -> float:
    """Mean power while this was seen, from how busy each instance was; idle where nothing was."""
    total = 0.0
    numbers: dict[str, int] = {}
    for pool in candidate.pools:
        role = pool.role
        for _ in range(pool.instances):
            number = numbers.get(role.value, 0)
            numbers[role.value] = number + 1
            busy_s = 0.0 if outcome is None else outcome.busy_s[f"{role.value}-{number}"]
            lasted_s = 1.0 if outcome is None else max(outcome.duration_s, 1e-9)
            busy = busy_s / lasted_s
            total += book.power_w(pool.cut, busy, prefills=role.prefills, decodes=role.decodes)
    return total
