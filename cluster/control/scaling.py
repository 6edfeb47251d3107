"""The controller's loop that keeps the fleet as a policy asks: look, decide, carry out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cluster.control.replanning import Replanning
from cluster.policy_file import parse_policy
from engine.errors import BadConfig, TandemError
from engine.messages import Role
from placement.scaling.allotment import Start, Stop, Switch
from placement.scaling.autoscaler import Autoscaler
from placement.scaling.policy import ReplanMode
from placement.scaling.signals import Observation, Phase
from placement.scaling.sm_shares import ShareSteering

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.control.balancing import Note
    from cluster.control.policy_source import PolicyText
    from cluster.control.replanning import Planned, Planner
    from engine.clock import Clock
    from placement.scaling.allotment import Action
    from placement.scaling.drift import Shape
    from placement.scaling.policy import Policy
    from placement.scaling.signals import Unit

log = logging.getLogger(__name__)

SHARING = {Role.PREFILL, Role.DECODE}
MOST_SHARES = 10_000
"""Latencies kept between two looks."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a gateway saw since it last told, and the policy that it knows of."""

    waiting_requests: int = 0
    ttft_shares: tuple[float, ...] = ()
    tpot_shares: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    policy: PolicyText | None = None
    ended: tuple[Shape, ...] = ()
    """Requests that were answered."""


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """As `status --json` shows it."""

    name: str
    version: str
    dry_run: bool
    replan: str
    """advise, apply, or empty where nobody plans again."""


class Fleet(Protocol):
    """What the loop may do; each returns at once."""

    def units(self) -> tuple[Unit, ...]: ...

    def grow(self, role: Role) -> str:
        """The name of what starts."""
        ...

    def retire(self, name: str) -> None: ...

    def turn(self, name: str, role: Role) -> None: ...

    def sm_shares(self) -> dict[Role, float]:
        """Of GPUs' multiprocessors, of the roles all of whose instances are kept to one."""
        ...

    def reshare(self, shares: Mapping[Role, float]) -> None:
        """Restarts the roles' instances with these, one after another in this order."""
        ...


@dataclass(slots=True)
class _InForce:
    policy: Policy
    version: str
    applied_s: float
    scaler: Autoscaler
    replanning: Replanning | None
    steering: ShareSteering | None
    told: tuple[Action, ...] = ()


@dataclass(slots=True)
class _Tally:
    """Usage summed until the next look."""

    waiting: dict[str, int] = field(default_factory=dict)
    ttft_shares: list[float] = field(default_factory=list)
    tpot_shares: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    ended: list[Shape] = field(default_factory=list)

    def add(self, gateway: str, usage: Usage) -> None:
        self.waiting[gateway] = usage.waiting_requests
        self.ttft_shares += usage.ttft_shares[: MOST_SHARES - len(self.ttft_shares)]
        self.tpot_shares += usage.tpot_shares[: MOST_SHARES - len(self.tpot_shares)]
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.output_tokens
        self.ended += usage.ended[: MOST_SHARES - len(self.ended)]


class Scaling:
    def __init__(
        self,
        fleet: Fleet,
        accelerators: Mapping[Role, int],
        note: Note,
        clock: Clock,
        planner: Planner | None = None,
    ) -> None:
        """Without a planner a policy that asks for re-planning is refused."""
        self._fleet, self._accelerators, self._note = fleet, accelerators, note
        self._clock, self._planner = clock, planner
        self._tally = _Tally()
        self._planning: asyncio.Task[None] | None = None
        self._in_force: _InForce | None = None
        self._applied = asyncio.Event()
        self._closed = False
        self._starting: dict[str, Role] = {}
        """What this loop has started and is not up yet."""

    @property
    def version(self) -> str | None:
        return None if self._in_force is None else self._in_force.version

    @property
    def status(self) -> PolicyStatus | None:
        if self._in_force is None:
            return None
        policy = self._in_force.policy
        replan = "" if policy.replan is None else policy.replan.mode.value
        return PolicyStatus(policy.name, self._in_force.version, policy.dry_run, replan)

    def apply(self, given: PolicyText) -> list[str]:
        """Puts a policy in force; a bad one is refused and the running one stays."""
        policy = parse_policy(given.text)
        version = hashlib.sha256(given.text.encode()).hexdigest()[:12]
        before = self._in_force
        lines = changes(None if before is None else before.policy, policy)
        if policy.replan is not None and self._planner is None:
            raise BadConfig("replan", policy.replan.mode.value, "there is no planner here")
        replanning = None if policy.replan is None else Replanning(policy.replan, self._note)
        scaler, steering = Autoscaler(policy, self._accelerators), self._steering(policy)
        self._in_force = _InForce(policy, version, given.applied_s, scaler, replanning, steering)
        self._applied.set()
        self._note("policy", policy.name, "applied", version=version, dry_run=policy.dry_run)
        return [f"version: {version}", *lines]

    def _steering(self, policy: Policy) -> ShareSteering | None:
        if policy.sm_shares is None:
            return None
        if self._shares() is None:
            rule = "needs pools.prefill.sm_share and pools.decode.sm_share, in every shape"
            raise BadConfig("sm_shares", policy.sm_shares.model_dump(), rule)
        return ShareSteering(policy.sm_shares, policy.look_back_period_s, policy.hysteresis)

    def told(self, gateway: str, usage: Usage) -> None:
        """A gateway's report; after its own restart a controller learns the policy from it.

        Of two gateways' the one that was applied last holds.
        """
        self._tally.add(gateway, usage)
        given, in_force = usage.policy, self._in_force
        if given is not None and (in_force is None or given.applied_s > in_force.applied_s):
            self.apply(given)

    def gateway_lost(self, name: str) -> None:
        """What waited there waits no more: its clients are gone with it."""
        self._tally.waiting.pop(name, None)

    def up(self, name: str) -> None:
        role = self._starting.pop(name, None)
        if role is not None and self._in_force is not None:
            self._in_force.scaler.placed(role)

    def failed(self, name: str) -> bool:
        """An instance did not come up; whether it was this loop's, which then decides anew."""
        role = self._starting.pop(name, None)
        if role is None:
            return False
        if self._in_force is not None and self._in_force.scaler.failed(role, self._clock.now()):
            pause_s = self._in_force.policy.placement_retry_s
            self._note("scale", role.value, "no more starts for a while", pause_s=pause_s)
        return True

    def close(self) -> None:
        """The cluster shuts down: nothing is decided any more."""
        self._closed = True

    async def run(self) -> None:
        while not self._closed:
            await self._applied.wait()
            await self.look()
            assert self._in_force is not None
            await asyncio.sleep(self._in_force.policy.metrics_interval_s)

    async def look(self) -> None:
        """One decision; it is dropped if the fleet has changed while it was made."""
        in_force = self._in_force
        assert in_force is not None
        ended = tuple(self._tally.ended)
        seen = self._observe()
        self._plan_again(in_force, ended)
        # Off the event loop: a seasonal forecast takes a while.
        decision = await asyncio.to_thread(in_force.scaler.decide, seen)
        changed = _gist(self._fleet.units()) != _gist(seen.units)
        if self._closed or changed or in_force is not self._in_force:
            return
        if not decision.actions:
            self._steer(in_force, seen)
        if in_force.policy.dry_run:
            self._tell(in_force, decision.actions)
            return
        why = {want.role: want.why for want in decision.wants}
        for action in decision.actions:
            self._carry_out(action, why)

    def _shares(self) -> dict[Role, float] | None:
        """Of multiprocessors, where both roles have one."""
        shares = self._fleet.sm_shares()
        return shares if shares.keys() >= SHARING else None

    def _steer(self, in_force: _InForce, seen: Observation) -> None:
        if in_force.steering is None or (shares := self._shares()) is None:
            return
        shift = in_force.steering.decide(seen, shares)
        if shift is None:
            return
        text = "would move shares" if in_force.policy.dry_run else "move shares"
        self._note("scale", in_force.policy.name, text, shares=str(shift), why=shift.why)
        if not in_force.policy.dry_run:
            self._fleet.reshare(dict(shift.shares))

    def _plan_again(self, in_force: _InForce, ended: tuple[Shape, ...]) -> None:
        """Starts a plan when one is due; while it is made, the loop goes on."""
        replanning = in_force.replanning
        planning = self._planning is not None and not self._planning.done()
        if replanning and replanning.wants_plan(ended, self._clock.now(), planning=planning):
            self._planning = asyncio.create_task(self._plan(in_force, replanning))

    async def _plan(self, in_force: _InForce, replanning: Replanning) -> None:
        assert self._planner is not None, "checked when the policy came"
        seen = replanning.profiler.window(self._clock.now())
        try:
            planned = await self._planner.plan(seen, in_force.policy)
        except (TandemError, OSError, TimeoutError) as error:
            self._note("plan", "workload", "no plan", reason=str(error) or "took too long")
            return
        if in_force is self._in_force and not self._closed:
            replanning.profiler.settle(seen)
            self._follow(in_force, planned, replanning.settings.mode)

    def _follow(self, in_force: _InForce, planned: Planned, mode: ReplanMode) -> None:
        """The plan's counts become the minimums, or are only told."""
        why_not = self._obstacle(in_force.policy, planned)
        fields = {"instances": str(planned), "reason": planned.reason}
        if mode is ReplanMode.ADVISE or in_force.policy.dry_run or why_not is not None:
            self._note("plan", in_force.policy.name, "advised", **fields, why_not=why_not or "")
            return
        policy = in_force.policy.at_least(planned.instances)
        in_force.scaler = Autoscaler(policy, self._accelerators)
        self._note("plan", in_force.policy.name, "applied", **fields)

    def _obstacle(self, policy: Policy, planned: Planned) -> str | None:
        """What keeps a plan from being reached by starts, stops and switches alone."""
        for role, count in planned.instances.items():
            if count and policy.roles.of(role) is None:
                return f"the policy leaves {role.value} alone"
            size = planned.accelerators.get(role)
            if count and size != self._accelerators[role]:
                return f"a {role.value} instance would take {size} accelerators"
        return None

    def _observe(self) -> Observation:
        tally, self._tally = self._tally, _Tally(dict(self._tally.waiting))
        return Observation(
            self._clock.now(),
            self._fleet.units(),
            sum(tally.waiting.values()),
            tuple(tally.ttft_shares),
            tuple(tally.tpot_shares),
            tally.prompt_tokens,
            tally.output_tokens,
        )

    def _carry_out(self, action: Action, why: Mapping[Role, str]) -> None:
        match action:
            case Start(role):
                name = self._fleet.grow(role)
                self._starting[name] = role
                self._note("scale", name, "start", role=role.value, why=why[role])
            case Stop(name, role):
                self._starting.pop(name, None)
                self._fleet.retire(name)
                self._note("scale", name, "stop", role=role.value, why=why[role])
            case Switch(name, source, target):
                self._fleet.turn(name, target)
                roles = f"{source.value} to {target.value}"
                self._note("scale", name, "switch", roles=roles, why=why[target])

    def _tell(self, in_force: _InForce, actions: tuple[Action, ...]) -> None:
        """A dry run says the same thing once."""
        if actions == in_force.told:
            return
        in_force.told = actions
        for action in actions:
            self._note("scale", in_force.policy.name, "would act", action=str(action))


def changes(before: Policy | None, after: Policy) -> list[str]:
    """A line for each top-level field that differs."""
    if before is None:
        return [f"name: {after.name}"]
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    lines = []
    for name, value in new.items():
        if old[name] == value:
            continue
        shown = "changed" if isinstance(value, dict) else f"{old[name]} -> {value}"
        lines.append(f"{name}: {shown}")
    return lines


def _gist(units: tuple[Unit, ...]) -> list[tuple[str, Role, Phase]]:
    return [(unit.name, unit.role, unit.phase) for unit in units]
