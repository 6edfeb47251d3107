"""A fleet that carries out an autoscaler's decisions badly: starts fail, instances are slow to
come and go, some are lost, and the load does what it wants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

from engine.messages import InstanceState, Load, Role
from placement.scaling.allotment import Start, Stop, Switch
from placement.scaling.autoscaler import Autoscaler, Decision
from placement.scaling.policy import Policy
from placement.scaling.signals import Observation, Phase, Unit

CAPACITY = {Role.PREFILL: 1000.0, Role.DECODE: 500.0, Role.MIXED: 600.0}
STEP_S = 2.0


def load_of(name: str, role: Role, use: float) -> Load:
    return Load(
        instance=name, role=role, state=InstanceState.READY, queue_requests=round(use * 4),
        queued_tokens=round(use * 2000), running_sequences=round(use * 32), running_tokens=0,
        free_blocks=max(1000 - round(use * 800), 0), total_blocks=1000, block_tokens=16,
        pinned_blocks=0, cached_blocks=0, step_s=0.02, sequences=(),
    )  # fmt: skip


def busy(unit: Unit, use: float) -> Unit:
    """A unit at this share of its capacity; beyond 1 its work piles up."""
    load = load_of(unit.name, unit.role, use)
    return Unit(unit.name, unit.role, unit.accelerators, unit.phase, load)


@dataclass
class Figures:
    decisions: int = 0
    starts: int = 0
    failed_starts: int = 0
    stops: int = 0
    switches: int = 0
    losses: int = 0
    most_in_use: int = 0
    turns: dict[Role, int] = field(default_factory=dict)
    """Changes of direction a role."""


class Fleet:
    def __init__(self, rng: Random, policy: Policy, accelerators: dict[Role, int]) -> None:
        self.rng, self.policy, self.accelerators = rng, policy, accelerators
        self.scaler = Autoscaler(policy, accelerators)
        self.units: dict[str, Unit] = {}
        self.due: dict[str, float] = {}
        """When a unit that starts is ready or fails, and one that drains is gone."""
        self.now, self.demand = 0.0, dict.fromkeys(Role, 0.0)
        self.fail_share = self.loss_share = 0.0
        self.figures, self._last, self._number = Figures(), {}, 0

    def step(self) -> Decision:
        self.now += STEP_S
        self._age()
        self._lose()
        seen = self._observe()
        decision = self.scaler.decide(seen)
        self.figures.decisions += 1
        for action in decision.actions:
            self._carry_out(action)
            in_use = sum(unit.accelerators for unit in self.units.values())
            self.figures.most_in_use = max(self.figures.most_in_use, in_use)
            assert in_use <= self.policy.budget_accelerators, (self.now, decision)
        return decision

    def standing(self, role: Role) -> int:
        return sum(u.role is role and u.phase is not Phase.DRAINING for u in self.units.values())

    def _observe(self) -> Observation:
        units = []
        serving = Counter(u.role for u in self.units.values() if u.phase is Phase.READY)
        for unit in self.units.values():
            use = self.demand[unit.role] / (CAPACITY[unit.role] * max(serving[unit.role], 1))
            noise = self.rng.uniform(0.9, 1.1)
            units.append(busy(unit, use * noise) if unit.phase is Phase.READY else unit)
        prompt = self.demand[Role.PREFILL] + self.demand[Role.MIXED]
        waiting = int(any(self.demand.values()))
        tokens = round(prompt * STEP_S), round(self.demand[Role.DECODE] * STEP_S)
        return Observation(self.now, tuple(units), waiting, (), (), *tokens)

    def _carry_out(self, action) -> None:
        match action:
            case Start(role):
                self._number += 1
                name = f"{role.value}-{self._number}"
                self.units[name] = Unit(name, role, self.accelerators[role], Phase.STARTING)
                self.due[name] = self.now + self.rng.uniform(0.0, 40.0)
                self.figures.starts += 1
                self._turn(role, 1)
            case Stop(name, role):
                self.units[name] = replace(self.units[name], phase=Phase.DRAINING)
                self.due[name] = self.now + self.rng.uniform(0.0, 30.0)
                self.figures.stops += 1
                self._turn(role, -1)
            case Switch(name, source, target):
                assert self.units[name].role is source
                self.units[name] = replace(self.units[name], role=target)
                self.figures.switches += 1
                self._turn(source, -1)
                self._turn(target, 1)

    def _turn(self, role: Role, direction: int) -> None:
        if self._last.get(role, direction) != direction:
            self.figures.turns[role] = self.figures.turns.get(role, 0) + 1
        self._last[role] = direction

    def _age(self) -> None:
        for name, due in list(self.due.items()):
            if due > self.now:
                continue
            unit = self.units[name]
            del self.due[name]
            if unit.phase is Phase.DRAINING:
                del self.units[name]
            elif self.rng.random() < self.fail_share:
                del self.units[name]
                self.figures.failed_starts += 1
                self.scaler.failed(unit.role, self.now)
            else:
                self.units[name] = replace(unit, phase=Phase.READY)
                self.scaler.placed(unit.role)

    def _lose(self) -> None:
        for name in list(self.units):
            if self.rng.random() < self.loss_share:
                del self.units[name]
                self.due.pop(name, None)
                self.figures.losses += 1


def random_policy(rng: Random) -> tuple[Policy, dict[Role, int]]:
    size = rng.choice((1, 1, 1, 2))
    accelerators = {Role.PREFILL: size, Role.DECODE: rng.choice((size, 1)), Role.MIXED: 1}
    budget = rng.randint(2 * size + 1, 32)
    signal = {
        Role.PREFILL: [{"signal": "queued_prompt_tokens", "target": 1600.0}],
        Role.DECODE: [{"signal": "kv_use", "target": 0.6}, {"signal": "batch", "target": 26.0}],
    }
    roles = {
        role.value: {
            "min_replicas": rng.choice((0, 1, 1)),
            "max_replicas": rng.randint(1, 24),
            "signals": signals,
            "max_step_up": rng.randint(1, 6),
            "max_step_down": rng.randint(1, 3),
            "capacity_tokens_s": rng.choice((None, CAPACITY[role])),
        }
        for role, signals in signal.items()
    }
    up_s = rng.choice((0.0, 4.0, 10.0))
    values = {
        "budget_accelerators": budget,
        "upscale_delay_s": up_s,
        "downscale_delay_s": up_s + rng.choice((0.0, 10.0, 60.0)),
        "cooldown_s": rng.choice((0.0, 20.0, 60.0)),
        "look_back_period_s": rng.choice((2.0, 10.0, 30.0)),
        "role_switch": rng.random() < 0.7,
        "placement_retry_s": 20.0,
        "roles": roles,
        "forecast": {"predictor": rng.choice(("constant", "linear", "kalman"))},
    }
    return Policy.model_validate(values, strict=False), accelerators


def random_history(seed: int, steps: int = 80) -> tuple[Fleet, float]:
    """A fleet after a random history; asserts that the budget held and direction changes were
    bounded, and returns how long it had been running."""
    rng = Random(seed)
    policy, accelerators = random_policy(rng)
    fleet = Fleet(rng, policy, accelerators)
    fleet.fail_share, fleet.loss_share = rng.choice((0.0, 0.3, 0.9)), rng.choice((0.0, 0.005))
    for _ in range(steps):
        if rng.random() < 0.1:
            for role in (Role.PREFILL, Role.DECODE):
                fleet.demand[role] = CAPACITY[role] * rng.uniform(0.0, 20.0) * (rng.random() < 0.8)
        fleet.step()
    elapsed_s = fleet.now
    if policy.cooldown_s:
        most = 1 + elapsed_s / policy.cooldown_s + fleet.figures.losses
        assert all(turns <= most for turns in fleet.figures.turns.values()), fleet.figures
    return fleet, elapsed_s


def settle(fleet: Fleet, steps: int = 240) -> None:
    """Faults end and the load stays: whatever still is asked for must be there, or the budget is
    in use to the last instance that fits, by roles that have long been asking for all of it."""
    fleet.fail_share = fleet.loss_share = 0.0
    decisions = [fleet.step() for _ in range(steps)]
    decision = decisions[-1]
    asked = {
        want.role: max(w.asked for d in decisions[-45:] for w in d.wants if w.role is want.role)
        for want in decision.wants
    }
    left = fleet.policy.budget_accelerators - sum(u.accelerators for u in fleet.units.values())
    for want in decision.wants:
        fits = fleet.accelerators[want.role] <= left
        lacks = fleet.standing(want.role) < want.wanted
        hoards = [role for role, most in asked.items() if fleet.standing(role) > max(most, 1)]
        assert not (lacks and (fits or hoards)), (fleet.now, decision)
        least, _ = fleet.policy.roles.of(want.role).limits(fleet.now)
        assert fleet.standing(want.role) >= least, (fleet.now, decision)
