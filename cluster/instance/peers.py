"""Calls from one rank to the ranks of other instances, which are Ray actors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.actors import answer, find_worker
from engine.errors import DeadlineExceeded, InstanceLost, PeerLost, TransportError

if TYPE_CHECKING:
    from cluster.instance.coded import Staged, StageRequest
    from cluster.instance.comparing import CompareRequest
    from cluster.instance.serving import ServeRequest


class RayPeers:
    def __init__(self, me: str, answer_s: float) -> None:
        self.me = me
        self._answer_s = answer_s

    async def metadata(self, peer: str) -> bytes:
        found: bytes = await self._call(peer, "metadata", self.me)
        return found

    async def serve(self, peer: str, request: ServeRequest) -> None:
        await self._call(peer, "serve", request)

    async def stage(self, peer: str, request: StageRequest) -> Staged:
        staged: Staged = await self._call(peer, "stage", request)
        return staged

    async def unstage(self, peer: str, ticket: int) -> None:
        await self._call(peer, "unstage", ticket)

    async def checksum(self, peer: str, request: CompareRequest) -> int:
        found: int = await self._call(peer, "checksum", request)
        return found

    async def _call(self, peer: str, method: str, argument: object) -> Any:
        instance, _, rank = peer.rpartition("/")
        try:
            call = getattr(find_worker(instance, int(rank)), method).remote(argument)
            return await answer(call, self._answer_s)
        except InstanceLost as lost:
            raise PeerLost(f"{peer}: {lost}") from lost
        except DeadlineExceeded as late:
            raise TransportError(f"{peer}: {late}") from late
