"""What the instances of a pool look like, from the config."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from cluster.roster import InstanceSpec
from engine.messages import Role

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.config import Config, PoolShape

LOCAL_WORKER_CPU = 0.01
"""On a Ray of our own CPUs are not rationed between Ray jobs: there is only this one."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What instances stand on."""

    device: str
    """cpu or cuda."""
    owned: bool
    """Whether this Ray is ours alone."""


def pool_spec(config: Config, ground: Ground, role: Role, name: str) -> InstanceSpec:
    """Of one more instance in this role."""
    return _spec(config, ground, role, config.pools.of(role), name)


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
    return tuple(
        _spec(config, ground, role, shape, f"{role.value}-{number}")
        for role in Role
        for number, shape in enumerate(_shapes(config, role))
    )


def _shapes(config: Config, role: Role) -> Iterator[PoolShape]:
    """Of each instance in the role."""
    for shape in config.pools.of(role).shapes:
        yield from repeat(shape, shape.instances)
