"""Who is in the cluster: the list that the controller keeps and every member follows.

A member that vanishes from the list, or comes back as another incarnation, is lost to all who
knew it; so one list tells of arrivals and of deaths, in one order, also after the controller itself
has been replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from engine.messages import Role

CONTROLLER = "controller"
MOST_INSTANCES = 4096
"""In one role, however they are asked for."""


class Kind(str, Enum):
    CONTROLLER = "controller"
    GATEWAY = "gateway"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Place:
    """In a unit, whose instances lie side by side: those of every stage on one node."""

    unit: str
    number: int
    stage: tuple[tuple[str, float], ...]
    """What Ray reserves for all that the unit runs of a stage."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """What the controller wants to exist."""

    name: str
    role: Role
    device: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    resources: tuple[tuple[str, float], ...] = ()
    """What Ray reserves for each worker."""
    sm_share: float | None = None
    """The part of a GPU's multiprocessors that each worker is kept to."""
    place: Place | None = None
    """Where it is to stand beside others; it keeps it when it is started anew or changes roles."""

    @property
    def stage_resources(self) -> dict[str, float]:
        """Of all workers of a stage."""
        each = ((name, amount) for name, amount in self.resources if amount > 0)
        return {name: amount * self.tensor_parallel for name, amount in each}

    @property
    def workers(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def gpu_share(self) -> float:
        """The part of a GPU that each worker has: below 1, others are on it, too."""
        return min(dict(self.resources).get("GPU", 1.0), 1.0)


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one worker of an instance runs."""

    rank: int
    pid: int
    node: str
    device: str


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    kind: Kind
    incarnation: str
    """Another one after every restart."""
    address: str
    """Of its link."""
    spec: InstanceSpec | None = None
    seats: tuple[Seat, ...] = ()

    @property
    def stage_nodes(self) -> str:
        """Where its stages lie, one after another: alike for instances that lie side by side."""
        if self.spec is None:
            return ""
        return " ".join(seat.node for seat in self.seats[:: self.spec.tensor_parallel])


@dataclass(frozen=True, slots=True)
class Roster:
    version: int
    members: tuple[Member, ...] = ()
    desired: tuple[InstanceSpec, ...] = ()
    settled: tuple[str, ...] = ()
    """Members that everyone knows: only these are given requests."""

    def find(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def of_kind(self, kind: Kind) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.kind is kind)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a newer roster means for someone who knew an older one."""

    lost: tuple[Member, ...]
    joined: tuple[Member, ...]


def changes(older: Roster, newer: Roster) -> Changes:
    before = {member.name: member for member in older.members}
    after = {member.name: member for member in newer.members}
    lost = [m for m in older.members if _incarnation(after, m.name) != m.incarnation]
    joined = [m for m in newer.members if _incarnation(before, m.name) != m.incarnation]
    return Changes(tuple(lost), tuple(joined))


def _incarnation(members: Mapping[str, Member], name: str) -> str | None:
    return members[name].incarnation if name in members else None


@dataclass(slots=True)
class RosterBook:
    """The controller's copy: every change is a new version, and who knows which is counted."""

    roster: Roster
    known: dict[str, int] = field(default_factory=dict)
    _arrived: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Members not yet settled: the version and the moment at which they joined."""
    settle_s: float = 5.0
    """A member that has not caught up by then is not waited for."""

    def join(self, member: Member, now: float) -> bool:
        """Whether this was news."""
        old = self.roster.find(member.name)
        if old == member:
            return False
        others = [m for m in self.roster.members if m.name != member.name]
        members = tuple(sorted([*others, member], key=lambda m: m.name))
        same = old is not None and old.incarnation == member.incarnation
        settled = self.roster.settled if same else self._without(member.name)
        self._change(members=members, settled=settled)
        if not same:
            self._arrived[member.name] = (self.roster.version, now)
        return True

    def leave(self, name: str) -> bool:
        if self.roster.find(name) is None:
            return False
        self._change(
            members=tuple(m for m in self.roster.members if m.name != name),
            settled=self._without(name),
        )
        self.known.pop(name, None)
        self._arrived.pop(name, None)
        return True

    def desire(self, specs: Iterable[InstanceSpec]) -> None:
        self._change(desired=tuple(sorted(specs, key=lambda spec: spec.name)))

    def heard(self, name: str, version: int) -> None:
        """A member has carried out everything up to `version`."""
        if self.roster.find(name) is not None:
            self.known[name] = version

    def settle(self, now: float) -> bool:
        """Counts newcomers in that everybody knows by now; whether there were any."""
        ready = [name for name in sorted(self._arrived) if self._everyone_knows(name, now)]
        for name in ready:
            del self._arrived[name]
        if ready:
            self._change(settled=tuple(sorted({*self.roster.settled, *ready})))
        return bool(ready)

    def _everyone_knows(self, name: str, now: float) -> bool:
        version, joined_s = self._arrived[name]
        listening = [m.name for m in self.roster.members if m.kind is not Kind.CONTROLLER]
        caught_up = all(self.known.get(other, 0) >= version for other in listening)
        return caught_up or now - joined_s > self.settle_s

    def _without(self, name: str) -> tuple[str, ...]:
        return tuple(other for other in self.roster.settled if other != name)

    def _change(
        self,
        *,
        members: tuple[Member, ...] | None = None,
        desired: tuple[InstanceSpec, ...] | None = None,
        settled: tuple[str, ...] | None = None,
    ) -> None:
        old = self.roster
        self.roster = replace(
            old,
            version=old.version + 1,
            members=old.members if members is None else members,
            desired=old.desired if desired is None else desired,
            settled=old.settled if settled is None else settled,
        )


def next_name(role: Role, taken: Iterable[str]) -> str:
    """The first free of role-0, role-1, ..."""
    names = set(taken)
    return next(name for n in range(len(names) + 1) if (name := f"{role.value}-{n}") not in names)
