"""How many instances the nodes of a fleet hold: what a node's links connect lies on one node."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from placement.latency.catalog import Hardware, NodeGroup
    from placement.planning.costbook import Cut
    from placement.planning.plan import Plan, PoolPlan


def copies_that_fit(hardware: Hardware, pools: Iterable[PoolPlan]) -> int:
    """Of all these pools."""
    by_device: dict[str, list[PoolPlan]] = {}
    for pool in pools:
        by_device.setdefault(pool.cut.device, []).append(pool)
    return min(_copies(hardware.group(name), found) for name, found in by_device.items())


def units_that_fit(hardware: Hardware, pools: Sequence[PoolPlan]) -> int:
    """Of these pools side by side: each stage of a unit takes a part of one node, and what is left
    of a node may be too little for another."""
    cut = pools[0].cut
    group = hardware.group(cut.device)
    of_a_stage = sum(pool.accelerators for pool in pools) // cut.pipeline
    return group.devices_per_node // of_a_stage * group.nodes // cut.pipeline


def holds(hardware: Hardware, plan: Plan) -> bool:
    """Whether there is room for all that a plan deploys."""
    together = plan.co_located
    if together is None:
        return copies_that_fit(hardware, plan.pools) > 0
    shares = (pool.instances // together.units for pool in plan.pools)
    unit = [replace(pool, instances=n) for pool, n in zip(plan.pools, shares, strict=True)]
    return units_that_fit(hardware, unit) >= together.units


def room_of(hardware: Hardware) -> dict[str, int]:
    """For pieces at least so wide, by device and width: what any set that fits stays within."""
    return {
        _resource(group, width): group.nodes * (group.devices_per_node // width)
        for group in hardware.groups
        for width in range(1, group.devices_per_node + 1)
    }


def taken_of_room(hardware: Hardware, pools: Iterable[PoolPlan]) -> Counter[str]:
    """By the same names; a wide piece takes as much as the narrower ones that would lie in it."""
    taken: Counter[str] = Counter()
    for pool in pools:
        group = hardware.group(pool.cut.device)
        wide, pieces = _pieces(group, pool.cut)
        for width in range(1, wide + 1):
            taken[_resource(group, width)] += pool.instances * pieces * (wide // width)
    return taken


def _resource(group: NodeGroup, width: int) -> str:
    return f"{width} of {group.device.name}"


def _copies(group: NodeGroup, pools: list[PoolPlan]) -> int:
    """By bisection: what fits in more copies fits in fewer."""
    low, high = 0, group.devices // sum(pool.accelerators for pool in pools)
    while low < high:
        middle = (low + high + 1) // 2
        if _fit(group, pools, middle):
            low = middle
        else:
            high = middle - 1
    return low


def _fit(group: NodeGroup, pools: Iterable[PoolPlan], copies: int) -> bool:
    """The widest pieces are placed first."""
    wanted: Counter[int] = Counter()
    for pool in pools:
        width, pieces = _pieces(group, pool.cut)
        wanted[width] += copies * pool.instances * pieces
    nodes = Counter({group.devices_per_node: group.nodes})
    return all(_place(nodes, width, wanted[width]) for width in sorted(wanted, reverse=True))


def _pieces(group: NodeGroup, cut: Cut) -> tuple[int, int]:
    """How wide a part is that lies on one node, and how many: an instance that a node holds, or
    its stages."""
    if cut.accelerators <= group.devices_per_node:
        return cut.accelerators, 1
    return cut.of_a_stage, cut.pipeline


def _place(nodes: Counter[int], width: int, pieces: int) -> bool:
    """Into the fullest of the nodes, counted by their free devices, that have room."""
    for free in sorted(nodes):
        held = free // width
        if held == 0:
            continue
        filled = min(nodes[free], pieces // held)
        nodes[free] -= filled
        nodes[free - held * width] += filled
        pieces -= filled * held
        if nodes[free] and pieces:
            nodes[free] -= 1
            nodes[free - pieces * width] += 1
            pieces = 0
    return pieces == 0
