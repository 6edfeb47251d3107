"""Where instances stand: Ray's placement groups, one for each instance or for a whole unit.

A unit's instances lie side by side: its group has a bundle for every pipeline stage, which Ray
keeps on one node, big enough for what all of them run of that stage. Each of them comes and goes by
itself; the group stays until none is left.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray.util import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from engine.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray.util.placement_group import PlacementGroup

    from cluster.control.balancing import Note
    from cluster.roster import InstanceSpec

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""Between two looks at what is in a group's way."""
GROUP_PREFIX = "tandem-"
GONE_POLL_S = 0.05
GONE_S = 120.0
OBSTACLES = {
    "NO_RESOURCES": "others use what it wants",
    "INFEASIBLE": "no node has what it wants",
}
"""What Ray finds in the way of a placement group, at its first attempt."""


@dataclass(slots=True)
class _Standing:
    group: PlacementGroup
    instances: set[str] = field(default_factory=set)
    """On it, or about to be."""


class Groups:
    """The placement groups that there are, and who stands on them."""

    def __init__(self) -> None:
        self._standing: dict[str, _Standing] = {}

    def hold(self, spec: InstanceSpec) -> PlacementGroup | None:
        """The instance's group, or its unit's, made if need be; None where it asks for nothing."""
        bundles = stage_bundles(spec)
        if not bundles:
            return None
        name = group_name(spec)
        if name not in self._standing:
            strategy = "STRICT_PACK" if len(bundles) == 1 else "PACK"
            group = placement_group(bundles, strategy=strategy, name=name, lifetime="detached")
            self._standing[name] = _Standing(group)
        return self._on(name, spec)

    def adopt(self, spec: InstanceSpec) -> PlacementGroup | None:
        """That of an instance which another controller has brought up."""
        if not stage_bundles(spec):
            return None
        name = group_name(spec)
        if name not in self._standing:
            self._standing[name] = _Standing(get_placement_group(name))
        return self._on(name, spec)

    def release(self, spec: InstanceSpec) -> None:
        """The last to leave removes the group."""
        standing = self._standing.get(group_name(spec))
        if standing is None or spec.name not in standing.instances:
            return
        standing.instances.remove(spec.name)
        if not standing.instances:
            del self._standing[group_name(spec)]
            remove_placement_group(standing.group)

    def _on(self, name: str, spec: InstanceSpec) -> PlacementGroup:
        standing = self._standing[name]
        standing.instances.add(spec.name)
        return standing.group


def group_name(spec: InstanceSpec) -> str:
    return f"{GROUP_PREFIX}{spec.name if spec.place is None else spec.place.unit}"


def stage_bundles(spec: InstanceSpec) -> list[dict[str, float]]:
    """A bundle per pipeline stage: Ray keeps a bundle on one node, and stages may part."""
    stage = spec.stage_resources if spec.place is None else dict(spec.place.stage)
    return [stage] * spec.pipeline_parallel if stage else []


def largest_first(specs: Iterable[InstanceSpec]) -> list[InstanceSpec]:
    """Small ones might leave a little room on every node, and no node to a large one."""

    def size(spec: InstanceSpec) -> float:
        return max((sum(stage.values()) for stage in stage_bundles(spec)), default=0.0)

    return sorted(specs, key=size, reverse=True)


def wants_of(spec: InstanceSpec) -> str:
    """What a place for it must have, in words."""
    if spec.place is None:
        return _listed(spec.resources)
    return f"{_listed(spec.place.stage)} on one node for each stage of {spec.place.unit}"


def _listed(resources: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name}={amount:g}" for name, amount in resources)


async def placed(group: PlacementGroup, spec: InstanceSpec, note: Note) -> None:
    """Returns once the group has its place. What is in the way is told as soon as it is known, and
    waited for: others may end, or a node may join."""
    ready = asyncio.ensure_future(group.ready())
    told = ""
    try:
        while not ready.done():
            found = await asyncio.to_thread(placement_group_table, group)
            obstacle = OBSTACLES.get(found["stats"]["scheduling_state"], told)
            if obstacle != told:
                told = obstacle
                note("instance", spec.name, "has no place", reason=told, wants=wants_of(spec))
            await asyncio.wait([ready], timeout=LOOK_S)
        await ready
    finally:
        ready.cancel()


async def remove_groups_but(kept: Iterable[InstanceSpec]) -> None:
    """Frees what a dead controller reserved for instances that it did not bring up."""
    names = {group["name"] for group in placement_group_table().values()}
    left = {name for name in names if name.startswith(GROUP_PREFIX)}
    for name in sorted(left - {group_name(spec) for spec in kept}):
        await _remove_group(name)


async def _remove_group(name: str) -> None:
    """Returns when the name can be given again; Ray also lists groups that are long gone."""
    removed = False
    for _ in range(int(GONE_S / GONE_POLL_S)):
        try:
            group = get_placement_group(name)
        except ValueError:
            return
        if not removed:
            log.warning("leftover removed placement_group=%s", name)
            remove_placement_group(group)
            removed = True
        await asyncio.sleep(GONE_POLL_S)
    raise DeadlineExceeded(f"placement group {name} is not removed")
