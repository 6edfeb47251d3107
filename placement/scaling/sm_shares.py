"""Who gets more of the multiprocessors that prefill and decode instances share.

A share is fixed when a process starts, so that every move restarts instances: it is made late,
seldom, and only where the role that gives can spare it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.messages import Role
from placement.scaling.policy import SignalName
from placement.scaling.signals import Phase, Window

if TYPE_CHECKING:
    from collections.abc import Mapping

    from placement.scaling.share_policy import SmShares
    from placement.scaling.signals import Observation

LATENCY_OF = {
    Role.PREFILL: SignalName.TTFT_ATTAINMENT,
    Role.DECODE: SignalName.TPOT_ATTAINMENT,
}
OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


@dataclass(frozen=True, slots=True)
class Shift:
    """The shares from now on, and why."""

    target: Role
    shares: tuple[tuple[Role, float], ...]
    """Whoever gives comes first, so that both together never have more than before."""
    why: str

    def __str__(self) -> str:
        return ", ".join(f"{role.value} {share:g}" for role, share in self.shares)


@dataclass(slots=True)
class ShareSteering:
    settings: SmShares
    look_back_s: float
    hysteresis: float
    _window: Window = field(init=False)
    _lacking: Role | None = None
    _since_s: float = 0.0
    """From when on that role has lacked."""
    _moved_s: float = float("-inf")

    def __post_init__(self) -> None:
        self._window = Window(self.look_back_s)

    def decide(self, seen: Observation, shares: Mapping[Role, float]) -> Shift | None:
        """`shares` are those of the instances' processes as they run."""
        self._window.add(seen)
        now, lacking = seen.now_s, self._who_lacks(shares)
        if any(unit.phase is not Phase.READY for unit in seen.units):
            lacking = None  # its latencies are those of a start, or of a drain
        if lacking is not self._lacking:
            self._lacking, self._since_s = lacking, now
        if lacking is None or now - self._since_s < self.settings.delay_s:
            return None
        if now - self._moved_s < self.settings.interval_s:
            return None
        self._lacking, self._moved_s = None, now
        return self._shift(lacking, shares)

    def _who_lacks(self, shares: Mapping[Role, float]) -> Role | None:
        """A role that misses its target while the other would still meet its own with less."""
        for role, giver in OTHER.items():
            late, given = self._latency(role), self._latency(giver)
            left = round(shares[giver] - self.settings.step, 6)
            if late <= 1.0 + self.hysteresis or left < self.settings.least:
                continue
            if given * shares[giver] / left <= 1.0 - self.hysteresis:
                return role
        return None

    def _shift(self, role: Role, shares: Mapping[Role, float]) -> Shift:
        giver, step = OTHER[role], self.settings.step
        why = f"{LATENCY_OF[role].value} {self._latency(role):.3g} of 1"
        moved = {giver: round(shares[giver] - step, 6), role: round(shares[role] + step, 6)}
        return Shift(role, tuple(moved.items()), why)

    def _latency(self, role: Role) -> float:
        """The percentile over its target; 0 where nothing tells."""
        found = self._window.latency(LATENCY_OF[role], self.settings.percentile)
        return 0.0 if found is None else found
