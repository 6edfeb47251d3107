"""What a controller finds when it starts: nothing, or the cluster its predecessor left behind."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cluster.actors import NAMESPACE, answer
from cluster.control.launch import Launched, adopt
from cluster.control.placing import remove_groups_but
from cluster.roster import CONTROLLER, Kind, Member, Roster
from engine.errors import TandemError

if TYPE_CHECKING:
    from cluster.control.placing import Groups
    from cluster.instance.worker import Description
    from cluster.roster import InstanceSpec

log = logging.getLogger(__name__)

PREFIX = "tandem-"
DESCRIBE_S = 15.0
"""How long a worker may take to describe itself to a new controller: streams go on meanwhile, and
one that is only busy must not be killed."""


@dataclass(frozen=True, slots=True)
class Recovered:
    roster: Roster
    instances: tuple[Launched, ...]


async def recover(specs: tuple[InstanceSpec, ...], groups: Groups, now: float) -> Recovered:
    """Whole instances are taken over; of others, what is left is removed.

    `specs` are wanted only where no survivor remembers what was.
    """
    found = await _descriptions()
    last = max((d.roster for d in found.values()), key=lambda r: r.version, default=Roster(0))
    version = max(last.version + 1, int(now * 1000))
    leaders = [d for d in found.values() if d.leads]
    whole = [d.spec for d in leaders if _ranks(found, d.spec) == d.spec.workers]
    names = {spec.name for spec in whole}
    for name, description in sorted(found.items()):
        if description.spec.name not in names:
            log.warning("leftover removed worker=%s", name)
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    await remove_groups_but(whole)
    members = tuple(member for member in last.members if _stays(member, names))
    settled = tuple(name for name in last.settled if any(m.name == name for m in members))
    roster = Roster(version, members, last.desired or specs, settled)
    return Recovered(roster, tuple(adopt(spec, groups) for spec in whole))


def _stays(member: Member, instances: set[str]) -> bool:
    """A gateway is given the time to show itself again; a controller has been replaced."""
    if member.name == CONTROLLER:
        return False
    return member.kind is Kind.GATEWAY or member.name in instances


def _ranks(found: dict[str, Description], spec: InstanceSpec) -> int:
    return sum(1 for other in found.values() if other.spec.name == spec.name)


async def _descriptions() -> dict[str, Description]:
    names = [n for n in ray.util.list_named_actors() if n.startswith(PREFIX)]
    workers = sorted(name for name in names if name != f"{PREFIX}{CONTROLLER}")
    answers = await asyncio.gather(*(_describe(name) for name in workers))
    return {name: found for name, found in zip(workers, answers, strict=True) if found}


async def _describe(name: str) -> Description | None:
    """None for a worker that is dead or does not answer; the latter is killed."""
    try:
        actor: Any = ray.get_actor(name, namespace=NAMESPACE)
        description: Description = await answer(actor.describe.remote(), DESCRIBE_S)
    except ValueError:
        return None
    except TandemError as error:
        log.warning("worker does not answer worker=%s error=%s", name, error)
        ray.kill(actor)
        return None
    return description
