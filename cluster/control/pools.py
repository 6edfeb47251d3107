"""What the instances of a pool look like, from the config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.roster import InstanceSpec, Place
from engine.messages import Role

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from cluster.config import Config, PoolShape

RESOURCE_DIGITS = 4
"""Ray counts in steps of a ten-thousandth."""
LOCAL_WORKER_CPU = 0.01
"""On a Ray of our own CPUs are not rationed between Ray jobs: there is only this one."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What instances stand on."""

    device: str
    """cpu or cuda."""
    owned: bool
    """Whether this Ray is ours alone."""


def pool_spec(
    config: Config, ground: Ground, role: Role, name: str, others: Iterable[InstanceSpec]
) -> InstanceSpec:
    """Of one more instance in this role, where a unit has a place for such a one beside the
    others: there."""
    spec = _spec(config, ground, role, config.pools.of(role), name)
    taken = [one.place for one in others]
    return replace(spec, place=next(_free_places(config, ground, spec, taken), None))


def _free_places(
    config: Config, ground: Ground, spec: InstanceSpec, taken: Collection[Place | None]
) -> Iterator[Place]:
    for one in initial_specs(config, ground):
        alike = replace(spec, name=one.name, role=one.role, place=one.place)
        if one.place is not None and one == alike and one.place not in taken:
            yield one.place


def _spec(config: Config, ground: Ground, role: Role, pool: PoolShape, name: str) -> InstanceSpec:
    resources = dict(pool.resources)
    if ground.device == "cuda":
        resources.setdefault("GPU", 1.0)
    cpus = LOCAL_WORKER_CPU if ground.owned else float(config.engine.threads)
    resources.setdefault("CPU", cpus)
    return InstanceSpec(
        name,
        role,
        ground.device,
        pool.tensor_parallel,
        pool.pipeline_parallel,
        tuple(sorted(resources.items())),
        pool.sm_share,
    )


def initial_specs(config: Config, ground: Ground) -> tuple[InstanceSpec, ...]:
    """Those in units with their places there: in each as many of every pool."""
    units: dict[int, list[InstanceSpec]] = {}
    for role in Role:
        for number, (unit, shape) in enumerate(_shapes(config, role)):
            spec = _spec(config, ground, role, shape, f"{role.value}-{number}")
            units.setdefault(unit, []).append(spec)
    if config.pools.units is None:
        return tuple(units.get(0, ()))
    return tuple(one for unit, specs in units.items() for one in _together(f"unit-{unit}", specs))


def _together(unit: str, specs: list[InstanceSpec]) -> Iterator[InstanceSpec]:
    stage: dict[str, float] = {}
    for spec in specs:
        for name, amount in spec.stage_resources.items():
            stage[name] = round(stage.get(name, 0.0) + amount, RESOURCE_DIGITS)
    resources = tuple(sorted(stage.items()))
    for number, spec in enumerate(specs):
        yield replace(spec, place=Place(unit, number, resources))


def _shapes(config: Config, role: Role) -> Iterator[tuple[int, PoolShape]]:
    """Of each instance in the role, with the number of its unit."""
    units = config.pools.units or 1
    for shape in config.pools.of(role).shapes:
        for number in range(shape.instances):
            yield number * units // shape.instances, shape
