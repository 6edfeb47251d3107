"""The snapshot that router, balancer, autoscaler and optimizer read; none of them sees more."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import InstanceState, Load, Role


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance: its latest load, and where it stands."""

    load: Load
    node: str = ""
    """Of each of its stages, one after another."""
    device: str = "cpu"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def id(self) -> str:
        return self.load.instance

    @property
    def role(self) -> Role:
        return self.load.role

    @property
    def accelerators(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def takes_requests(self) -> bool:
        return self.load.state is InstanceState.READY


@dataclass(frozen=True, slots=True)
class View:
    """The cluster at one moment, instances in order of id."""

    now_s: float
    instances: tuple[InstanceView, ...]

    def of_role(self, *roles: Role) -> tuple[InstanceView, ...]:
        """Instances in these roles that take requests."""
        return tuple(i for i in self.instances if i.role in roles and i.takes_requests)

    def find(self, instance: str) -> InstanceView | None:
        return next((i for i in self.instances if i.id == instance), None)
