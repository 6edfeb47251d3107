"""Devices, links and models by name, and the fleet a plan may use: data read from YAML."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from math import inf, log2, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from engine.errors import BadConfig, check_names, unknown_name
from placement.latency.model_shape import ModelShape, read_shape, shape_from_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; `compute`, `memory` and `attention` are shares of peak that are reached."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops: float
    power_w: float
    idle_w: float
    price_per_hour: float
    compute: float
    memory: float
    attention: float
    layer_overhead_s: float
    step_overhead_s: float
    devices_per_node: int
    link: str
    source: str
    fp8_flops: float | None = None

    def capped(self, power_cap_w: float | None) -> Device:
        """Under a power cap clocks follow the cube root of the power left above idle."""
        if power_cap_w is None or power_cap_w >= self.power_w:
            return self
        if power_cap_w <= self.idle_w:
            raise BadConfig("power_cap_w", power_cap_w, f"{self.name} idles at {self.idle_w} W")
        clock = ((power_cap_w - self.idle_w) / (self.power_w - self.idle_w)) ** (1 / 3)
        return replace(
            self,
            power_w=power_cap_w,
            compute=self.compute * clock,
            attention=self.attention * clock,
        )


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two devices; the square root is the ramp to full bandwidth."""

    name: str
    bytes_per_s: float
    latency_s: float
    latency_per_doubling_s: float = 0.0
    ramp_s_per_sqrt_byte: float = 0.0
    source: str = ""

    def transfer_s(self, size_bytes: float) -> float:
        wire_s = self.ramp_s_per_sqrt_byte * sqrt(size_bytes) + size_bytes / self.bytes_per_s
        return self.latency_s + wire_s

    def all_reduce_s(self, size_bytes: float, devices: int) -> float:
        if devices == 1:
            return 0.0
        wire_bytes = 2 * (devices - 1) / devices * size_bytes
        return self.transfer_s(wire_bytes) + self.latency_per_doubling_s * log2(devices)


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes of one kind of device."""

    device: Device
    nodes: int
    devices_per_node: int
    link: Link
    """Between devices of a node."""

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a plan may use, and the network between its nodes."""

    groups: tuple[NodeGroup, ...]
    """Each of a kind of its own, by its device's name."""
    network: Link

    def __post_init__(self) -> None:
        for name, groups in Counter(group.device.name for group in self.groups).items():
            if groups > 1:
                rule = "entries of one kind of nodes must be one entry with their count"
                raise BadConfig("hardware.nodes", name, rule)

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)

    @property
    def nodes(self) -> int:
        return sum(group.nodes for group in self.groups)

    def group(self, device: str) -> NodeGroup:
        for group in self.groups:
            if group.device.name == device:
                return group
        raise unknown_name("device", device, [g.device.name for g in self.groups])


def entry_of(group: NodeGroup) -> dict[str, Any]:
    """What a fleet file would say of it, to be read back."""
    device, usual = group.device, find_device(catalog_name(group.device.name))
    entry: dict[str, Any] = {
        "device": usual.name,
        "count": group.nodes,
        "devices": group.devices_per_node,
        "link": group.link.name,
    }
    own = (
        ("power_cap_w", device.power_w, usual.power_w),
        ("price_per_hour", device.price_per_hour, usual.price_per_hour),
        ("memory_bytes", device.memory_bytes, usual.memory_bytes),
    )
    return entry | {key: value for key, value, default in own if value != default}


def catalog_name(kind: str) -> str:
    """Of the device of a kind of nodes."""
    return accelerator_of(kind).partition("@")[0]


def find_device(name: str) -> Device:
    return _find("device", name, _devices())


def find_link(name: str) -> Link:
    return _find("link", name, _links())


def find_model(name_or_directory: str) -> ModelShape:
    """A checkpoint directory's shape, or that of a model the catalog knows."""
    if Path(name_or_directory).is_dir():
        return read_shape(Path(name_or_directory))
    known = {key.lower(): key for key in _models()}
    short = name_or_directory.rpartition("/")[2].lower()
    if short not in known:
        raise unknown_name("model", short, _models())
    return shape_from_config(known[short], _models()[known[short]])


def device_names() -> tuple[str, ...]:
    return tuple(_devices())


def model_names() -> tuple[str, ...]:
    return tuple(_models())


def read_hardware(path: Path) -> Hardware:
    """A fleet file: `nodes` (device, count, devices, link, power_cap_w, ...) and `network`."""
    return hardware_from(_load(path), str(path))


def hardware_from(raw: object, where: str = "hardware") -> Hardware:
    """What a fleet file holds, or the `hardware` of a plan."""
    content = _mapping(where, raw)
    check_names("hardware", content, {"nodes", "network"})
    nodes = content.get("nodes")
    if not isinstance(nodes, list) or not nodes:
        raise BadConfig("hardware.nodes", nodes, "a list with at least one entry")
    entries = [_group(f"hardware.nodes[{i}]", entry) for i, entry in enumerate(nodes)]
    groups = _told_apart(_merged(entries))
    default = "shared-memory" if len(groups) == 1 and groups[0].nodes == 1 else "infiniband-ndr"
    return Hardware(groups, find_link(str(content.get("network", default))))


def _merged(groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """Equal nodes are one group, however many entries they have."""
    nodes: Counter[NodeGroup] = Counter()
    for group in groups:
        nodes[replace(group, nodes=1)] += group.nodes
    return [replace(group, nodes=count) for group, count in nodes.items()]


def _told_apart(groups: Sequence[NodeGroup]) -> tuple[NodeGroup, ...]:
    """Where several kinds of nodes have one device, it is named after what these differ in."""
    marks = [(group.device.name, *_marks(group)) for group in groups]
    told = []
    for group, mine in zip(groups, marks, strict=True):
        alike = [other for other in marks if other[0] == mine[0]]
        differing = [
            one
            for one, all_of in zip(mine, zip(*alike, strict=True), strict=True)
            if len(set(all_of)) > 1
        ]
        name = "".join((mine[0], *differing))
        told.append(replace(group, device=replace(group.device, name=name)))
    return tuple(told)


def _marks(group: NodeGroup) -> tuple[str, ...]:
    """What it has unlike the catalog; nothing where it has the same."""
    device, usual = group.device, find_device(group.device.name)
    marks = (
        (f"@{device.power_w:g}W", device.power_w == usual.power_w),
        (f"/devices={group.devices_per_node}", group.devices_per_node == usual.devices_per_node),
        (f"/memory={device.memory_bytes}", device.memory_bytes == usual.memory_bytes),
        (f"/price={device.price_per_hour}", device.price_per_hour == usual.price_per_hour),
        (f"/link={group.link.name}", group.link.name == usual.link),
    )
    return tuple("" if same else mark for mark, same in marks)


def accelerator_of(kind: str) -> str:
    """What a kind of nodes computes with; kinds may also differ in how its nodes are made up."""
    return kind.partition("/")[0]


def cores_of_worker(kind: str, threads: int) -> int:
    """A worker takes a core for each of its threads, or one accelerator whatever they are."""
    return threads if accelerator_of(kind).startswith("cpu") else 1


def one_kind(device: str, nodes: int = 1, devices_per_node: int | None = None) -> Hardware:
    """A fleet of equal nodes, without a file."""
    known = find_device(device)
    group = NodeGroup(
        known, nodes, devices_per_node or known.devices_per_node, find_link(known.link)
    )
    return Hardware((group,), find_link("infiniband-ndr"))


def _group(field: str, entry: object) -> NodeGroup:
    raw = _mapping(field, entry)
    known = {"device", "count", "devices", "link", "power_cap_w", "price_per_hour", "memory_bytes"}
    check_names(field, raw, known)
    if "device" not in raw:
        raise BadConfig(f"{field}.device", None, "is required")
    device = find_device(str(raw["device"]))
    if "memory_bytes" in raw:
        device = replace(device, memory_bytes=_positive(field, raw, "memory_bytes", 0))
    if "price_per_hour" in raw:
        device = replace(device, price_per_hour=_amount(field, raw, "price_per_hour"))
    if "power_cap_w" in raw:
        device = device.capped(_amount(field, raw, "power_cap_w"))
    return NodeGroup(
        device,
        _positive(field, raw, "count", 1),
        _positive(field, raw, "devices", device.devices_per_node),
        find_link(str(raw.get("link", device.link))),
    )


def _positive(field: str, raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadConfig(f"{field}.{key}", value, "must be a whole number of at least 1")
    return value


def _amount(field: str, raw: Mapping[str, Any], key: str) -> float:
    value = raw[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < inf:
        raise BadConfig(f"{field}.{key}", value, "must be a finite number of at least 0")
    return float(value)


def _mapping(field: str, content: object) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise BadConfig(field, content, "must be a mapping")
    return content


def _load(path: Path) -> object:
    if not path.is_file():
        raise BadConfig("hardware", str(path), "no such file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadConfig("hardware", str(path), f"not YAML: {error}") from error


def _find(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise unknown_name(kind, name, known)
    return known[name]


def _packaged(name: str) -> dict[str, dict[str, Any]]:
    path = resources.files("placement") / "catalog" / f"{name}.yaml"
    content: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


@cache
def _devices() -> dict[str, Device]:
    names = {field.name for field in fields(Device)}
    entries = _packaged("devices")
    assert all(set(entry) < names for entry in entries.values()), "a device has unknown fields"
    return {name: Device(name=name, **entry) for name, entry in entries.items()}


@cache
def _links() -> dict[str, Link]:
    return {name: Link(name=name, **entry) for name, entry in _packaged("links").items()}


@cache
def _models() -> dict[str, dict[str, Any]]:
    return _packaged("models")
