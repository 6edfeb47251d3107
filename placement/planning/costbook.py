"""What an instance of each device and parallelism costs: time, memory, money and power."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.errors import BadConfig
from engine.messages import Role
from placement.latency.catalog import cores_of_worker
from placement.latency.roofline import Roofline, power_w
from placement.role import RoleSettings
from placement.simulation.deployment import GPU_RESERVE, InstanceModel, Overheads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from placement.latency.catalog import Hardware, NodeGroup
    from placement.latency.machine import Machine
    from placement.latency.model import LatencyModel
    from placement.latency.model_shape import ModelShape
    from placement.latency.profile import Profile

DECODE_POWER_SHARE = 0.15
"""Arithmetic of a decode step, as a share of peak, beside its memory traffic."""


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """A model cut over accelerators of one kind."""

    device: str
    tensor: int = 1
    pipeline: int = 1
    threads: int = 1
    """Of each worker, where it takes a core for each."""

    @property
    def workers(self) -> int:
        return self.tensor * self.pipeline

    @property
    def of_a_stage(self) -> int:
        """Accelerators."""
        return self.tensor * self.threads

    @property
    def accelerators(self) -> int:
        return self.workers * self.threads

    def __str__(self) -> str:
        cut = f"TP{self.tensor}" + (f"xPP{self.pipeline}" if self.pipeline > 1 else "")
        threads = f" of {self.threads} threads" if self.threads > 1 else ""
        return f"{cut}{threads} on {self.device}"


@dataclass(frozen=True)
class CostBook:
    shape: ModelShape
    hardware: Hardware
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    """By device, where there are measurements."""
    pipelined: bool = False

    def __post_init__(self) -> None:
        for device, profile in self.profiles.items():
            profile.check_fits(self.shape.name, device)

    def group(self, cut: Cut) -> NodeGroup:
        return self.hardware.group(cut.device)

    def latency(self, cut: Cut, role: Role = Role.MIXED) -> LatencyModel:
        known = self._latencies.get((cut, role))
        if known is None:
            known = self._latencies[cut, role] = self._find_latency(cut, role)
        return known

    def kv_tokens(self, cut: Cut) -> int:
        """What memory is left for KV, in tokens; negative where the weights do not fit."""
        profile = self.profiles.get(cut.device)
        run = None if profile is None else profile.run(cut.tensor, cut.pipeline)
        if run is not None and run.kv_capacity_tokens is not None:
            return run.kv_capacity_tokens
        free = self.free_bytes(cut)
        copies = max(1, cut.tensor // self.shape.kv_heads)
        per_token = self.shape.kv_bytes_per_token * copies
        return int(free // per_token)

    def free_bytes(self, cut: Cut) -> float:
        memory = self.group(cut).device.memory_bytes * (1 - GPU_RESERVE) * cut.accelerators
        return memory - self.shape.weight_bytes

    def instance(
        self, cut: Cut, role: Role, settings: RoleSettings | None = None, node: str = "node-0"
    ) -> InstanceModel:
        return InstanceModel(
            role=role,
            latency=self.latency(cut, role),
            kv_tokens=self.kv_tokens(cut),
            link=self.group(cut).link,
            node=node,
            device=cut.device,
            tensor_parallel=cut.tensor,
            pipeline_parallel=cut.pipeline,
            pipelined=self.pipelined,
            settings=settings or RoleSettings(),
            crowded=self._crowded(cut, role),
            neighbours=self._neighbours(cut),
            machine=self._machine(cut, role),
        )

    def threads(self, device: str) -> int:
        """Of a worker there, that take a core each."""
        profile = self.profiles.get(device)
        measured = None if profile is None else profile.threads
        return cores_of_worker(device, measured or 1)

    def knows_in_service(self, cut: Cut) -> bool:
        profile = self.profiles.get(cut.device)
        return profile is None or profile.tells_of_service(cut.tensor, cut.pipeline)

    @property
    def crowded(self) -> bool:
        """Whether what instances cost depends on what else their machine holds, as was measured."""
        profiles = self.profiles.values()
        return self.hardware.nodes == 1 and any(one.tells_of_neighbours for one in profiles)

    @property
    def overheads(self) -> Overheads:
        """What profiles say of them; several devices' clients wait for the slowest."""
        known = [(one.arrival_s, one.handoff_s) for one in self.profiles.values()]
        return Overheads(*map(max, zip(*known, strict=True)))

    @property
    def engine(self) -> dict[str, Any]:
        """How instances must be set for these costs; all are set alike."""
        settings = [profile.engine for profile in self.profiles.values()] or [{}]
        if any(one != settings[0] for one in settings):
            rule = "profiles of one fleet must be of one dtype, kv_dtype and number of threads"
            raise BadConfig("profile", settings, rule)
        return settings[0]

    def cost_per_hour(self, cut: Cut) -> float:
        return self.group(cut).device.price_per_hour * cut.accelerators

    def crossing_token_s(self, prefill: Cut, decode: Cut) -> float:
        """How much longer a prompt token's KV takes over the network than within a node."""
        lanes = min(prefill.workers, decode.workers)
        within, across = self.group(prefill).link, self.hardware.network
        longer = max(1 / across.bytes_per_s - 1 / within.bytes_per_s, 0.0)
        return longer * self.shape.kv_bytes_per_token / lanes

    def power_w(self, cut: Cut, busy: float, *, prefills: bool, decodes: bool) -> float:
        """Drawn while busy for this share of the time; a mixed instance is at both by halves."""
        device = self.group(cut).device
        prompt_w = power_w(device, 1.0, 0.3)
        decode_w = power_w(device, DECODE_POWER_SHARE, 1.0)
        active_w = (prompt_w + decode_w) / 2 if prefills and decodes else prompt_w
        if not prefills:
            active_w = decode_w
        return (device.idle_w + (active_w - device.idle_w) * min(busy, 1.0)) * cut.accelerators

    def without_pipelining(self) -> CostBook:
        return replace(self, pipelined=False)

    @cached_property
    def _latencies(self) -> dict[tuple[Cut, Role], LatencyModel]:
        return {}

    def _profile(self, cut: Cut, role: Role) -> Profile | None:
        profile = self.profiles.get(cut.device)
        return None if profile is None else profile.of_role(role)

    def _crowded(self, cut: Cut, role: Role) -> LatencyModel | None:
        profile = self._profile(cut, role)
        return None if profile is None else profile.crowded(cut.tensor, cut.pipeline)

    def _neighbours(self, cut: Cut) -> int:
        profile = self.profiles.get(cut.device)
        run = None if profile is None else profile.run(cut.tensor, cut.pipeline)
        return 1 if run is None else max(run.neighbours, 1)

    def _machine(self, cut: Cut, role: Role) -> Machine | None:
        profile = self._profile(cut, role)
        return None if profile is None else profile.machine(cut.tensor, cut.pipeline)

    def _find_latency(self, cut: Cut, role: Role) -> LatencyModel:
        group = self.group(cut)
        spread = cut.accelerators > group.devices_per_node
        roofline = Roofline(
            self.shape,
            group.device,
            group.link,
            cut.tensor,
            cut.pipeline,
            self.hardware.network if spread else group.link,
        )
        profile = self._profile(cut, role)
        if profile is None:
            return roofline
        return profile.latency(roofline, cut.tensor, cut.pipeline)[0]
