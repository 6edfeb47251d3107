"""The fleet in virtual time: the real autoscaler looks, decides, and instances come and go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.messages import InstanceState
from placement.scaling.allotment import Start, Stop, Switch
from placement.scaling.autoscaler import Autoscaler
from placement.scaling.signals import Observation, Phase, Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.messages import Role
    from placement.scaling.allotment import Action
    from placement.scaling.policy import Policy
    from placement.simulation.deployment import Deployment, InstanceModel
    from placement.simulation.dynamics import Dynamics, FleetRecord
    from placement.simulation.instance import SimulatedInstance

PHASES = {
    InstanceState.STARTING: Phase.STARTING,
    InstanceState.READY: Phase.READY,
    InstanceState.DRAINING: Phase.DRAINING,
}


class World(Protocol):
    instances: dict[str, SimulatedInstance]
    record: FleetRecord

    @property
    def waiting_requests(self) -> int: ...
    @property
    def unfinished(self) -> bool: ...
    def at(self, time_s: float, action: Callable[[Any, float], None], subject: Any) -> None: ...
    def bring_up(self, name: str, model: InstanceModel, now: float) -> None: ...
    def take_down(self, name: str) -> None: ...
    def ready(self, now: float) -> None: ...


@dataclass(slots=True)
class Tally:
    """What happened since the autoscaler last looked."""

    ttft_shares: list[float] = field(default_factory=list)
    tpot_shares: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0


class SimulatedFleet:
    def __init__(self, world: World, deployment: Deployment, dynamics: Dynamics) -> None:
        self._world, self._dynamics = world, dynamics
        self._generator = np.random.default_rng(dynamics.seed)
        self._models = _models(deployment, dynamics.policy)
        standing = Counter(model.role for model in deployment.instances)
        self._numbers = {role: standing[role] for role in self._models}
        self._starting: dict[str, Role] = {}
        self._directions: dict[Role, int] = {}
        self._held: dict[str, int] = {}
        self._held_since_s = 0.0
        self._ended = False
        accelerators = {role: model.accelerators for role, model in self._models.items()}
        policy = dynamics.policy
        self._scaler = None if policy is None else Autoscaler(policy, accelerators)
        self._interval_s = dynamics.look_s if policy is None else policy.metrics_interval_s
        self.tally = Tally()

    def begin(self) -> None:
        self._note(0.0)
        if self._scaler is not None:
            for role, samples in self._dynamics.history.items():
                self._scaler.learn(role, samples)
            self._world.at(0.0, self._look, None)

    def end(self, now: float) -> None:
        """The last request has ended: nothing is accounted for any more."""
        if self._ended:
            return
        self._account(now)
        self._world.record.lasted_s = now
        self._ended = True

    def lost(self, instance: SimulatedInstance, now: float) -> None:
        """An instance has failed; a policy's autoscaler sees for itself, else it starts again."""
        self._world.record.losses += 1
        if self._scaler is None and self._dynamics.restart:
            self._start(instance.role, now)
        self._note(now)

    def _sweep(self, now: float) -> None:
        """What has drained goes."""
        for name, instance in list(self._world.instances.items()):
            drains = instance.state is InstanceState.DRAINING
            if drains and instance.is_empty and not self._is_awaited(instance):
                self._world.take_down(name)
                self._note(now)

    def _is_awaited(self, instance: SimulatedInstance) -> bool:
        return any(one.hands_to(instance) for one in self._world.instances.values())

    def _look(self, _: None, now: float) -> None:
        assert self._scaler is not None
        self._sweep(now)
        decision = self._scaler.decide(self._observe(now))
        if not self._scaler.policy.dry_run:
            for action in decision.actions:
                self._carry_out(action, now)
                self._note(now)
        if self._world.unfinished:
            self._world.at(now + self._interval_s, self._look, None)

    def _observe(self, now: float) -> Observation:
        units = self._units(now)
        tally, self.tally = self.tally, Tally()
        return Observation(
            now,
            units,
            self._world.waiting_requests,
            tuple(tally.ttft_shares),
            tuple(tally.tpot_shares),
            tally.prompt_tokens,
            tally.output_tokens,
        )

    def _units(self, now: float) -> tuple[Unit, ...]:
        units = [
            Unit(one.name, one.role, one.model.accelerators, PHASES[one.state], one.load(now))
            for one in self._world.instances.values()
        ]
        for name, role in self._starting.items():
            units.append(Unit(name, role, self._models[role].accelerators, Phase.STARTING))
        return tuple(units)

    def _carry_out(self, action: Action, now: float) -> None:
        record = self._world.record
        match action:
            case Start(role):
                self._start(role, now)
                self._turn(role, 1)
            case Stop(name, role):
                record.stops += 1
                self._turn(role, -1)
                if self._starting.pop(name, None) is None:
                    self._world.instances[name].become(InstanceState.DRAINING)
            case Switch(name, source, target):
                record.switches += 1
                self._turn(source, -1)
                self._turn(target, 1)
                self._world.instances[name].turn(target)
                self._world.instances[name].become(InstanceState.STARTING)
                self._world.at(now + self._dynamics.switch_s, self._switched, name)

    def _start(self, role: Role, now: float) -> None:
        number = self._numbers[role]
        self._numbers[role] += 1
        name = f"{role.value}-{number}"
        self._starting[name] = role
        self._world.record.starts += 1
        self._world.at(now + self._dynamics.start_s, self._started, name)

    def _started(self, name: str, now: float) -> None:
        role = self._starting.pop(name, None)
        if role is None:
            return
        unplaced = bool(self._generator.random() < self._dynamics.unplaced_share)
        if unplaced:
            self._world.record.failed_starts += 1
        else:
            self._world.bring_up(name, self._models[role], now)
        if self._scaler is not None and unplaced:
            self._scaler.failed(role, now)
        elif self._scaler is not None:
            self._scaler.placed(role)
        elif unplaced:
            self._start(role, now)
        self._note(now)

    def _switched(self, name: str, now: float) -> None:
        instance = self._world.instances.get(name)
        if instance is not None and instance.state is InstanceState.STARTING:
            instance.become(InstanceState.READY)
            self._world.ready(now)

    def _turn(self, role: Role, direction: int) -> None:
        if self._directions.get(role, direction) != direction:
            turns = self._world.record.turns
            turns[role.value] = turns.get(role.value, 0) + 1
        self._directions[role] = direction

    def _note(self, now: float) -> None:
        """The fleet has changed."""
        if self._ended:
            return
        self._account(now)
        counts: dict[str, int] = {}
        self._held = {}
        for unit in self._units(now):
            role = unit.role.value
            counts[role] = counts.get(role, 0) + 1
            self._held[role] = self._held.get(role, 0) + unit.accelerators
        record = self._world.record
        record.most_accelerators = max(record.most_accelerators, sum(self._held.values()))
        timeline = record.timeline
        if not timeline or timeline[-1][1] != counts:
            timeline.append((now, counts))

    def _account(self, now: float) -> None:
        seconds = self._world.record.accelerator_s
        for role, count in self._held.items():
            seconds[role] = seconds.get(role, 0.0) + count * (now - self._held_since_s)
        self._held_since_s = now


def _models(deployment: Deployment, policy: Policy | None) -> dict[Role, InstanceModel]:
    """What an instance of each role is like: the first of it, or of any if there is none."""
    models: dict[Role, InstanceModel] = {}
    for model in deployment.instances:
        models.setdefault(model.role, model)
    for role, _ in policy.roles.named if policy is not None else ():
        models.setdefault(role, replace(deployment.instances[0], role=role))
    return models
