"""How many instances each role gets within the budget, and the steps from here to there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.scaling.signals import Phase, Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from engine.messages import Role


@dataclass(frozen=True, slots=True)
class Wish:
    """A role's count now and as wanted, before the budget."""

    role: Role
    accelerators: int
    """Of one instance."""
    standing: int
    wanted: int
    least: int
    spare: int = 0
    """Instances that another role may have at once, though it is too early to stop them."""
    blocked: bool = False
    """Starts have failed lately: no new ones for now."""


@dataclass(frozen=True, slots=True)
class Start:
    role: Role

    def __str__(self) -> str:
        return f"start one more {self.role.value}"


@dataclass(frozen=True, slots=True)
class Stop:
    instance: str
    role: Role

    def __str__(self) -> str:
        return f"stop {self.instance}"


@dataclass(frozen=True, slots=True)
class Switch:
    instance: str
    source: Role
    target: Role

    def __str__(self) -> str:
        return f"switch {self.instance} from {self.source.value} to {self.target.value}"


Action = Start | Stop | Switch


def allot(wishes: Iterable[Wish], budget: int) -> dict[Role, int]:
    """Everyone keeps what it has and wants; minimums come next, then whoever lacks most.

    Over a budget that has shrunk, the role with most above its minimum gives first.
    """
    by_role = {wish.role: wish for wish in wishes}
    counts = {role: min(wish.standing, wish.wanted) for role, wish in by_role.items()}
    for role, wish in by_role.items():
        counts[role] = max(counts[role], wish.least)
    while _cost(counts, by_role) > budget:
        giving = [role for role, count in counts.items() if count]
        if not giving:
            return counts
        role = max(giving, key=lambda role: (counts[role] - by_role[role].least, counts[role]))
        counts[role] -= 1
    while True:
        left = budget - _cost(counts, by_role)
        lacking = [
            role
            for role, wish in by_role.items()
            if counts[role] < wish.wanted and wish.accelerators <= left
        ]
        if not lacking:
            return counts
        counts[min(lacking, key=lambda role: _served(by_role[role], counts[role]))] += 1


def _served(wish: Wish, count: int) -> tuple[bool, float]:
    """Who cannot start now does not keep others from it."""
    return wish.blocked, count / wish.wanted


def _cost(counts: Mapping[Role, int], wishes: Mapping[Role, Wish]) -> int:
    return sum(count * wishes[role].accelerators for role, count in counts.items())


def steps(
    wishes: Iterable[Wish], units: Iterable[Unit], budget: int, *, switch: bool
) -> tuple[Action, ...]:
    """Switches first, then stops, then as many starts as what is in use leaves room for.

    What drains still counts, so a start that has no room yet comes with a later decision.
    """
    by_role = {wish.role: wish for wish in wishes}
    pool = list(units)
    in_use = sum(unit.accelerators for unit in pool)
    counts = allot(by_role.values(), budget)
    surplus = {role: by_role[role].standing - count for role, count in counts.items()}
    actions: list[Action] = []
    if switch:
        actions += _switches(by_role, pool, surplus)
    for role, extra in surplus.items():
        for unit in expendable(pool, role)[: max(extra, 0)]:
            actions.append(Stop(unit.name, role))
    for role, extra in surplus.items():
        for _ in range(0 if by_role[role].blocked else max(-extra, 0)):
            if in_use + by_role[role].accelerators <= budget:
                in_use += by_role[role].accelerators
                actions.append(Start(role))
    return tuple(actions)


def _switches(
    wishes: Mapping[Role, Wish], pool: list[Unit], surplus: dict[Role, int]
) -> list[Switch]:
    """Takes what it turns out of the pool, and counts it in `surplus`.

    First what would be stopped; then, one at a time, what a role lends early.
    """
    switches: list[Switch] = []
    for target in wishes:
        for source in wishes:
            while surplus[source] > 0 > surplus[target]:
                unit = _switchable(wishes, pool, source, target)
                if unit is None:
                    break
                switches.append(Switch(unit.name, source, target))
                pool.remove(unit)
                surplus[source] -= 1
                surplus[target] += 1
    for target, wish in wishes.items():
        lacks = surplus[target] < 0 or (surplus[target] == 0 and wish.wanted > wish.standing)
        lenders = [r for r, w in wishes.items() if lacks and w.spare > 0 and surplus[r] == 0]
        units = [_switchable(wishes, pool, lender, target) for lender in lenders]
        unit = next((unit for unit in units if unit is not None), None)
        if unit is not None and not switches:
            switches.append(Switch(unit.name, unit.role, target))
            pool.remove(unit)
            surplus[target] = min(surplus[target] + 1, 0)
    return switches


def _switchable(
    wishes: Mapping[Role, Wish], pool: list[Unit], source: Role, target: Role
) -> Unit | None:
    """The unit of `source` that is turned most easily, if it fits the other role."""
    if source is target or wishes[source].accelerators != wishes[target].accelerators:
        return None
    ready = [unit for unit in expendable(pool, source) if unit.phase is Phase.READY]
    return ready[0] if ready else None


def expendable(units: Iterable[Unit], role: Role) -> list[Unit]:
    """Those that have not started yet first, then those with the least to move away."""
    candidates = [u for u in units if u.role is role and u.phase is not Phase.DRAINING]
    return sorted(candidates, key=lambda u: (u.phase is Phase.READY, u.running, u.name))
