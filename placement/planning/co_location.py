"""Pools that lie side by side, so that KV stays within nodes: what a plan says of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from typing import TYPE_CHECKING

from engine.errors import BadConfig, check_names

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class CoLocation:
    """Pools in equal units: in each, the instances of all pools lie side by side, those of every
    stage on one node."""

    units: int
    crossing_token_s: float = 0.0
    """How much longer a prompt token's KV would take to another node."""


def co_location_from(raw: object) -> CoLocation:
    """What a plan file says."""
    known = [field.name for field in fields(CoLocation)]
    if not isinstance(raw, dict):
        raise BadConfig("co_located", raw, "must be a mapping")
    check_names("co_located", raw, known)
    units, crossing_s = raw.get("units"), raw.get("crossing_token_s", 0.0)
    if not isinstance(units, int) or isinstance(units, bool) or units < 1:
        raise BadConfig("co_located.units", units, "must be a whole number of at least 1")
    number = isinstance(crossing_s, int | float) and not isinstance(crossing_s, bool)
    if not number or not 0 <= crossing_s < inf:
        rule = "must be a finite number of at least 0"
        raise BadConfig("co_located.crossing_token_s", crossing_s, rule)
    return CoLocation(units, float(crossing_s))


def check_units(where: str, units: int, shapes: Iterable[tuple[int, int]]) -> None:
    """Of instances and pipeline stages of each pool."""
    depths = set()
    for instances, stages in shapes:
        if instances % units:
            rule = f"{instances} instances of a pool cannot be divided into so many equal units"
            raise BadConfig(where, units, rule)
        depths.add(stages)
    if len(depths) > 1:
        rule = "pools lie side by side only if all have the same pipeline_parallel"
        raise BadConfig(where, units, rule)
