"""A plan file as a config: which pools it deploys, and what places them on its devices."""

from __future__ import annotations

from typing import Any

from engine.errors import BadConfig
from engine.messages import Role
from placement.latency.catalog import accelerator_of, catalog_name, hardware_from
from placement.planning.co_location import co_location_from
from placement.planning.plan_keys import PLAN_KEYS

RAY_TYPES = {
    "a10g": "A10G",
    "a100": "A100",
    "b200": "B200",
    "h100": "H100",
    "h200": "H200",
    "l4": "L4",
    "l40s": "L40S",
    "mi300x": "AMD-Instinct-MI300X-OAM",
}
"""Ray's names of what it finds on a node, by the catalog's."""
A_LITTLE = 0.001
"""Of a node or of its accelerator type, which Ray counts as one each: any number of workers may
ask for it."""


def plan_values(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan's deployment as config values; the live page shows what it predicted."""
    shapes: dict[str, list[dict[str, Any]]] = {role.value: [] for role in Role}
    kinds = _kinds(plan["pools"])
    devices = {"cpu" if kind.startswith("cpu") else "cuda" for kind in kinds}
    if len(devices) > 1:
        raise BadConfig("pools", ", ".join(sorted(kinds)), "CPUs and GPUs cannot serve together")
    gpus = {one for one in kinds | _fleet_kinds(plan) if one and not one.startswith("cpu")}
    for number, pool in enumerate(plan["pools"]):
        role = pool.get("role") if isinstance(pool, dict) else None
        if not isinstance(role, str) or role not in shapes:
            raise BadConfig(f"pools[{number}].role", role, "must be prefill, decode or mixed")
        shapes[role].append(_shape(f"pools[{number}]", pool, gpus))
    pools: dict[str, Any] = {role: _pool_of(found) for role, found in shapes.items()}
    values = {**values_beside_pools(plan), "pools": pools}
    if plan.get("co_located") is not None:
        pools["units"] = co_location_from(plan["co_located"]).units
    if devices:
        values.setdefault("device", devices.pop())
    return values


def values_beside_pools(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of a config besides its pools."""
    values = {key: plan[key] for key in plan if key not in PLAN_KEYS}
    values |= {"model": plan.get("model", "demo"), "predicted": plan.get("predicted")}
    if plan.get("co_located") is not None:
        together = co_location_from(plan["co_located"])
        routing = _section(_section(values, "gateway"), "routing")
        routing.setdefault("crossing_token_s", together.crossing_token_s)
    if plan.get("slo"):
        values["slo"] = plan["slo"]
    return values


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise BadConfig(name, section, "must be a mapping")
    return section


def _shape(where: str, pool: dict[str, Any], gpus: set[str]) -> dict[str, Any]:
    """Of one pool's instances, on its own kind of these GPUs."""
    kept = ("instances", "tensor_parallel", "pipeline_parallel", "resources")
    shape = {key: pool[key] for key in kept if pool.get(key) is not None}
    kind = _kind(pool)
    if len(gpus) > 1 and kind in gpus and "resources" not in shape:
        shape["resources"] = _resources_of(where, kind, gpus)
    if pool.get("nodes"):
        node = _only_node(f"{where}.nodes", pool["nodes"])
        shape["resources"] = {**shape.get("resources", {}), f"node:{node}": A_LITTLE}
    return shape


def _pool_of(shapes: list[dict[str, Any]]) -> dict[str, Any]:
    if not shapes:
        return {"instances": 0}
    first, *more = shapes
    return {**first, "more": more} if more else first


def _kinds(pools: list[object]) -> set[str]:
    """Of the devices that pools have."""
    return {_kind(pool) for pool in pools if isinstance(pool, dict)}


def _kind(pool: dict[str, Any]) -> str:
    return accelerator_of(str(pool.get("device", "")).lower())


def _fleet_kinds(plan: dict[str, Any]) -> set[str]:
    """Of the nodes that the plan was made for; those it leaves idle are there, too."""
    hardware = plan.get("hardware")
    nodes = hardware.get("nodes") if isinstance(hardware, dict) else None
    if not nodes:
        return set()
    groups = hardware_from({"nodes": nodes}).groups
    return {accelerator_of(group.device.name.lower()) for group in groups}


def _only_node(where: str, nodes: object) -> str:
    if not isinstance(nodes, list) or len(nodes) != 1:
        rule = "must be a list of one node's address; say by resources which of several will do"
        raise BadConfig(where, nodes, rule)
    return str(nodes[0])


def _resources_of(where: str, kind: str, gpus: set[str]) -> dict[str, float]:
    """What makes Ray place a pool on its kind of device, where a plan or its fleet has several."""
    type_of = {one: RAY_TYPES.get(catalog_name(one).partition("-")[0]) for one in gpus}
    if type_of[kind] is None or list(type_of.values()).count(type_of[kind]) > 1:
        rule = "Ray cannot tell it from the plan's other devices: say by which resource it can"
        raise BadConfig(f"{where}.resources", kind, rule)
    return {f"accelerator_type:{type_of[kind]}": A_LITTLE}
