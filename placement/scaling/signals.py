"""What a policy's signals say over its look-back window."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from math import ceil
from typing import TYPE_CHECKING

from placement.scaling.policy import LATENCIES, SignalName

if TYPE_CHECKING:
    from engine.messages import Load, Role
    from placement.scaling.policy import RolePolicy, Signal


class Phase(str, Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Unit:
    """An instance that takes accelerators, in whatever state; no load until it has told one."""

    name: str
    role: Role
    accelerators: int
    phase: Phase
    load: Load | None = None

    @property
    def running(self) -> int:
        return 0 if self.load is None else self.load.running_sequences


@dataclass(frozen=True, slots=True)
class Observation:
    """The fleet at one moment, and what happened since the observation before."""

    now_s: float
    units: tuple[Unit, ...]
    waiting_requests: int = 0
    """At the gateways, not yet sent to an instance."""
    ttft_shares: tuple[float, ...] = ()
    """Of requests that ended: TTFT over its target."""
    tpot_shares: tuple[float, ...] = ()
    prompt_tokens: int = 0
    """Of requests that arrived."""
    output_tokens: int = 0
    """That were drawn."""

    @property
    def accelerators(self) -> int:
        return sum(unit.accelerators for unit in self.units)

    def serving(self, role: Role) -> tuple[Unit, ...]:
        """Instances that take work."""
        return tuple(u for u in self.units if u.role is role and u.phase is Phase.READY)

    def standing(self, role: Role) -> tuple[Unit, ...]:
        """Those, and those that will."""
        return tuple(u for u in self.units if u.role is role and u.phase is not Phase.DRAINING)

    @property
    def idle(self) -> bool:
        loads = [unit.load for unit in self.units if unit.load is not None]
        busy = any(load.queue_requests or load.running_sequences for load in loads)
        return not busy and not self.waiting_requests


@dataclass(slots=True)
class Window:
    """The observations of the look-back period."""

    look_back_s: float
    seen: deque[Observation] = field(default_factory=deque)
    _means: deque[dict[tuple[Role, SignalName], float | None]] = field(default_factory=deque)
    """What has been worked out of each observation."""

    def add(self, observation: Observation) -> None:
        self.seen.append(observation)
        self._means.append({})
        while observation.now_s - self.seen[0].now_s > self.look_back_s:
            self.seen.popleft()
            self._means.popleft()

    def value(self, signal: Signal, role: Role, policy: RolePolicy) -> float | None:
        """None where nothing in the window tells."""
        if signal.signal in LATENCIES:
            return self.latency(signal.signal, signal.percentile)
        return self._mean(signal.signal, role, policy)

    def latency(self, name: SignalName, percentile: float) -> float | None:
        """The percentile over its target."""
        if name is SignalName.TTFT_ATTAINMENT:
            return self._attainment([o.ttft_shares for o in self.seen], percentile)
        return self._attainment([o.tpot_shares for o in self.seen], percentile)

    def _attainment(self, shares: list[tuple[float, ...]], percentile: float) -> float | None:
        ordered = sorted(share for some in shares for share in some)
        if ordered:
            return ordered[ceil(percentile / 100.0 * len(ordered)) - 1]
        return 0.0 if all(observation.idle for observation in self.seen) else None

    def _mean(self, signal: SignalName, role: Role, policy: RolePolicy) -> float | None:
        key, values = (role, signal), []
        for observation, means in zip(self.seen, self._means, strict=True):
            if key not in means:
                loads = [u.load for u in observation.serving(role) if u.load is not None]
                each = [_of(signal, load, policy) for load in loads]
                means[key] = sum(each) / len(each) if each else None
            if (mean := means[key]) is not None:
                values.append(mean)
        return sum(values) / len(values) if values else None


def _of(signal: SignalName, load: Load, policy: RolePolicy) -> float:
    match signal:
        case SignalName.QUEUED_PROMPT_TOKENS:
            return load.queued_tokens
        case SignalName.PREDICTED_WAIT_S:
            assert policy.capacity_tokens_s is not None, "checked with the policy"
            return load.queued_tokens / policy.capacity_tokens_s
        case SignalName.KV_USE:
            return 1.0 - load.free_blocks / max(load.total_blocks, 1)
        case SignalName.BATCH:
            return load.running_sequences
        case SignalName.ONGOING_REQUESTS:
            return load.queue_requests + load.running_sequences
        case _:
            raise AssertionError(signal)
