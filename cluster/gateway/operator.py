"""What an operator can ask of a running cluster; the gRPC door speaks to this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cluster.events import Event
    from engine.messages import Role


class Operator(Protocol):
    """Raises NotFound for unknown names and BadInput for what cannot be done."""

    async def status(self) -> dict[str, Any]:
        """The document that `tandem status --json` prints."""
        ...

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The document of the live page, and the configuration in force."""
        ...

    async def scale(self, role: Role, instances: int) -> tuple[list[str], list[str]]:
        """Instances that were started, and those that are draining now."""
        ...

    async def set_role(self, instance: str, role: Role) -> None: ...

    async def drain(self, instance: str) -> None: ...

    async def migrate(self, request_id: str, instance: str, *, wait: bool) -> tuple[str, str]:
        """Source and target, once the move is asked for, or once it is over: TransferError where
        the request has not moved."""
        ...

    async def apply_policy(self, yaml: str) -> list[str]:
        """What changes, a line each."""
        ...

    def watch(self) -> AsyncIterator[Event]:
        """What happens from now on."""
        ...
