"""What is simulated: instances with their costs and memory, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.slo import Slo
from kvtransfer.transfer import TransferSettings
from placement.role import RoleSettings
from placement.routing.router import RouterSettings

if TYPE_CHECKING:
    from engine.messages import Role
    from placement.latency.catalog import Link
    from placement.latency.machine import Machine
    from placement.latency.model import LatencyModel

GPU_RESERVE = 0.1
"""Part of an accelerator's memory that is neither weights nor KV."""


@dataclass(frozen=True, slots=True)
class InstanceModel:
    """One instance: how fast it is, how much KV it holds, and how its batches are made."""

    role: Role
    latency: LatencyModel
    kv_tokens: int
    link: Link
    """From device to device within a node."""
    node: str = "node-0"
    device: str = "cpu-core"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    pipelined: bool = False
    """Whether stages work on different batches at once; else they take turns on one."""
    settings: RoleSettings = field(default_factory=RoleSettings)
    crowded: LatencyModel | None = None
    """Its passes while `neighbours` others compute on its node; None where none slows it down."""
    neighbours: int = 1
    machine: Machine | None = None
    """What those on its node share with what serves their tokens; None where each has its own."""

    @property
    def accelerators(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True)
class Overheads:
    """What requests wait for besides batches and copies."""

    arrival_s: float = 0.0
    """From the client to the instance, and the first token's way back."""
    handoff_s: float = 0.0
    """Messages of a hand-off before its copy starts and after it ends."""
    layer_groups: int = 4
    """A hand-off's copy starts once the first of so many groups of layers is computed."""
    piece_bytes: int = TransferSettings().piece_bytes
    """Or with the first token, where a group's KV is less."""


@dataclass(frozen=True, slots=True)
class Deployment:
    instances: tuple[InstanceModel, ...]
    kv_bytes_per_token: int
    network: Link
    """Between nodes."""
    slo: Slo = field(default_factory=Slo)
    block_tokens: int = 16
    """As a cluster has it where its config says nothing else."""
    cache_prefixes: bool = True
    router: RouterSettings = field(default_factory=RouterSettings)
    overheads: Overheads = field(default_factory=Overheads)

    @property
    def accelerators(self) -> int:
        return sum(instance.accelerators for instance in self.instances)

    @property
    def names(self) -> list[str]:
        """role-number, as the cluster names its instances."""
        counts: dict[str, int] = {}
        names = []
        for model in self.instances:
            role = model.role.value
            names.append(f"{role}-{counts.get(role, 0)}")
            counts[role] = counts.get(role, 0) + 1
        return names

    def blocks(self, instance: InstanceModel) -> int:
        return instance.kv_tokens // self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        return blocks_for(tokens, self.block_tokens)

    def copy_s(self, source: InstanceModel, target: InstanceModel, tokens: int) -> float:
        """KV of so many tokens, each rank of the smaller side over its own link."""
        lanes = min(source.accelerators, target.accelerators)
        link = source.link if source.node == target.node else self.network
        return link.transfer_s(tokens * self.kv_bytes_per_token / lanes)
