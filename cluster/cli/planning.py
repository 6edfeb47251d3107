"""What the planner's commands read: a model's shape, a fleet, a profile of it, and plans."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import parse_config
from cluster.plan_file import values_beside_pools
from cluster.settings import instance_settings
from cluster.yaml_file import read_yaml
from engine.errors import BadConfig, NoFeasiblePlan
from placement.latency.catalog import accelerator_of, find_model, hardware_from
from placement.latency.measured import fit_link
from placement.latency.model_shape import read_shape
from placement.latency.profile_file import read_profile
from placement.planning.costbook import CostBook
from placement.planning.packing import holds
from placement.planning.plan import plan_from
from placement.planning.plan_keys import CONFIG_KEYS
from placement.simulation.dynamics import Dynamics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.config import Config, EngineConfig
    from placement.latency.catalog import Hardware
    from placement.latency.model_shape import ModelShape
    from placement.latency.profile import Profile
    from placement.planning.plan import Plan
    from placement.simulation.deployment import Deployment
    from placement.workload import Workload

DEMO = "demo"
SIMULATED = {
    "engine": (
        *("dtype", "kv_dtype", "block_tokens", "cache_prefixes", "host_slots"),
        *("threads", "prefill", "decode", "tpot_share"),
    ),
    "transfer": ("layer_groups", "piece_bytes", "pause_budget_s", "max_rounds"),
    "migration": ("enabled", "interval_s", "balancer"),
    "gateway": ("routing", "admission"),
}
"""What `tandem simulate` heeds of a plan's config."""


def find_shape(model: str) -> ModelShape:
    """The built-in model, a checkpoint directory, or a model of the catalog."""
    if model == DEMO:
        with resources.as_file(resources.files("engine") / DEMO) as directory:
            return read_shape(directory)
    path = Path(model).expanduser()
    return find_model(str(path.resolve()) if path.is_dir() else model)


def fleet_with(hardware: Path, profile: Path | None) -> dict[str, Any]:
    """What a plan says of its hardware: the fleet file, and the profile it was planned with."""
    fleet = read_yaml(hardware)
    return fleet if profile is None else {**fleet, "profile": str(profile)}


def cost_book(model: str, fleet: Mapping[str, Any], engine: EngineConfig | None = None) -> CostBook:
    """Costs by the roofline, and by the profile on the device that it measured; of instances that
    are set so, or else as they were measured."""
    nodes = {key: value for key, value in fleet.items() if key != "profile"}
    shape, hardware = find_shape(model), hardware_from(nodes)
    weights, kv = (None, None) if engine is None else (_said(engine.dtype), _said(engine.kv_dtype))
    if "profile" not in fleet:
        return CostBook(shape.stored_as(weights, kv), hardware)
    profile = read_profile(Path(str(fleet["profile"])))
    if engine is not None:
        _check_measured(profile, engine)
    kinds = _measured_kinds(profile, hardware)
    return CostBook(
        shape.stored_as(profile.dtype or weights, profile.kv_dtype or kv),
        _with_measured_links(hardware, profile, kinds),
        {kind: replace(profile, device=kind) for kind in kinds},
    )


def _said(dtype: str) -> str | None:
    return None if dtype == "auto" else dtype


def _check_measured(profile: Profile, engine: EngineConfig) -> None:
    """A profile tells only of instances that are set as those it measured."""
    known = profile.engine if profile.kv_dtype is None else {"kv_dtype": "auto", **profile.engine}
    for name, measured in known.items():
        deployed = getattr(engine, name)
        if deployed != measured and (name, deployed) != ("dtype", "auto"):
            raise BadConfig(f"engine.{name}", deployed, f"the profile is of {measured}")


def _measured_kinds(profile: Profile, hardware: Hardware) -> list[str]:
    """Of nodes, however many of the devices they hold."""
    kinds = [group.device.name for group in hardware.groups]
    measured = [kind for kind in kinds if accelerator_of(kind) == profile.device]
    if not measured:
        raise BadConfig("profile.device", profile.device, f"the fleet has {', '.join(kinds)}")
    return measured


def _with_measured_links(hardware: Hardware, profile: Profile, kinds: Sequence[str]) -> Hardware:
    if not profile.transfers:
        return hardware
    groups = tuple(
        replace(group, link=fit_link(profile.transfers, group.link.name))
        if group.device.name in kinds
        else group
        for group in hardware.groups
    )
    return replace(hardware, groups=groups)


def read_plan_file(path: Path) -> Plan:
    return plan_from(read_yaml(path))


def config_of(path: Path) -> Config:
    """The sections of a config that a plan is served with, checked as `tandem serve` does."""
    return parse_config(values_beside_pools(read_yaml(path)))


def as_configured(deployment: Deployment, config: Config) -> Deployment:
    """With the settings that its plan's file is served with."""
    role, engine, transfer = instance_settings(config).role, config.engine, config.transfer
    return replace(
        deployment,
        instances=tuple(replace(one, settings=role) for one in deployment.instances),
        block_tokens=engine.block_tokens,
        cache_prefixes=engine.cache_prefixes,
        router=config.gateway.routing,
        overheads=replace(
            deployment.overheads,
            layer_groups=transfer.layer_groups,
            piece_bytes=transfer.piece_bytes,
        ),
    )


def not_simulated(path: Path) -> list[str]:
    """What a plan's file sets that only `tandem serve` heeds."""
    content = read_yaml(path)
    return [
        f"{section}.{key}"
        for section in CONFIG_KEYS
        if isinstance(content.get(section), dict)
        for key in content[section]
        if key not in SIMULATED.get(section, ())
    ]


def dynamics_of(config: Config, *, admission: bool = False) -> Dynamics:
    """What a cluster does of itself: its balancer moves requests, and where it is asked for its
    gateway refuses some."""
    migration, transfer = config.migration, config.transfer
    return Dynamics(
        balance=migration.enabled,
        balancer=migration.balancer,
        look_s=migration.interval_s,
        pause_budget_s=transfer.pause_budget_s,
        most_rounds=transfer.max_rounds,
        admission=config.gateway.admission if admission else None,
    )


def planned_fleet(plan: Plan, profile: Path | None) -> dict[str, Any]:
    """The hardware that a plan was made for; another profile may take its profile's place."""
    if not plan.hardware:
        raise BadConfig("plan.hardware", None, "is required to simulate it")
    return plan.hardware if profile is None else {**plan.hardware, "profile": str(profile)}


def check_room(plan: Plan, hardware: Hardware) -> None:
    """The fleet must hold the pools, as it must those of a candidate."""
    taken: Counter[str] = Counter()
    for number, pool in enumerate(plan.pools):
        group = hardware.group(pool.cut.device)
        if pool.cut.of_a_stage > group.devices_per_node:
            rule = f"a stage lies on one node, which has {group.devices_per_node} accelerators"
            raise NoFeasiblePlan(f"pools[{number}]", str(pool), rule)
        taken[pool.cut.device] += pool.accelerators
    for device, count in taken.items():
        most = hardware.group(device).devices
        if count > most:
            raise NoFeasiblePlan("pools", plan.deployed, f"take {count} of {device}, of {most}")
    if not holds(hardware, plan):
        groups = [hardware.group(device) for device in taken]
        nodes = [f"{one.nodes} of {one.devices_per_node} {one.device.name}" for one in groups]
        rule = f"what has to lie on one node finds no room on these nodes: {', '.join(nodes)}"
        raise NoFeasiblePlan("pools", plan.deployed, rule)


def check_memory(plan: Plan, book: CostBook, workload: Workload) -> None:
    """Every instance must hold its weights and the longest request."""
    longest = workload.longest_context
    for number, pool in enumerate(plan.pools):
        room = book.kv_tokens(pool.cut)
        if room < longest:
            rule = f"the longest request has {longest} tokens, memory is left for {max(room, 0)}"
            raise NoFeasiblePlan(f"pools[{number}]", str(pool), rule)
