"""The Python client, over gRPC: `Client` for scripts, `AsyncClient` for event loops.

Calls are repeated when the server cannot be reached or is busy; a generation only while nothing of
it has arrived. Every call has a deadline, and every failure is one of engine.errors.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from cluster.access import Access, ClientSettings, Generation, as_error
from cluster.rpc import tandem_pb2 as pb
from cluster.rpc import tandem_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from engine.errors import TandemError


class Client:
    """One connection; close it or use it in a `with`."""

    def __init__(self, access: Access | None = None, settings: ClientSettings | None = None):
        self._access = access or Access()
        self._settings = settings or ClientSettings()
        credentials = self._access.credentials()
        self._channel = (
            grpc.insecure_channel(self._access.server)
            if credentials is None
            else grpc.secure_channel(self._access.server, credentials)
        )
        self._inference = rpc.InferenceStub(self._channel)
        self._cluster = rpc.ClusterStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def stream(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateChunk]:
        """Chunks as they come."""
        for attempt in range(1, self._settings.attempts + 1):
            call = self._inference.Generate(
                request, timeout=self._settings.timeout_s, metadata=self._access.metadata
            )
            begun = False
            try:
                for chunk in call:
                    begun = True
                    yield chunk
            except grpc.RpcError as error:
                self._rest(attempt, as_error(error), begun=begun)
            else:
                return
            finally:
                call.cancel()

    def generate(self, prompt: str, **sampling: Any) -> Generation:
        """The whole answer to a prompt."""
        generation = Generation()
        request = pb.GenerateRequest(text=prompt, sampling=pb.Sampling(**sampling))
        for chunk in self.stream(request):
            generation.add(chunk)
        return generation

    def abort(self, request_id: str) -> None:
        self._call(self._inference.Abort, pb.AbortRequest(request_id=request_id))

    def status(self) -> pb.StatusReply:
        reply: pb.StatusReply = self._call(self._cluster.Status, pb.StatusRequest())
        return reply

    def describe(self) -> pb.DescribeReply:
        """All that the live page shows, and the configuration in force."""
        reply: pb.DescribeReply = self._call(self._cluster.Describe, pb.DescribeRequest())
        return reply

    def scale(self, role: str, instances: int) -> pb.ScaleReply:
        request = pb.ScaleRequest(role=role, instances=instances)
        reply: pb.ScaleReply = self._call(self._cluster.Scale, request)
        return reply

    def set_role(self, instance: str, role: str) -> None:
        self._call(self._cluster.SetRole, pb.SetRoleRequest(instance=instance, role=role))

    def drain(self, instance: str) -> None:
        self._call(
            self._cluster.Drain, pb.DrainRequest(instance=instance), self._settings.timeout_s
        )

    def migrate(self, request_id: str, instance: str, *, wait: bool = False) -> pb.MigrateReply:
        """With `wait`, returns once the request runs there, or raises why it does not."""
        request = pb.MigrateRequest(request_id=request_id, instance=instance, wait=wait)
        reply: pb.MigrateReply = self._call(
            self._cluster.Migrate, request, self._settings.timeout_s
        )
        return reply

    def apply_policy(self, yaml: str) -> list[str]:
        return list(self._call(self._cluster.ApplyPolicy, pb.ApplyPolicyRequest(yaml=yaml)).changes)

    def watch(self, *kinds: str) -> Iterator[pb.Event]:
        """Events from now on, until the caller stops reading."""
        call = self._cluster.Watch(pb.WatchRequest(kinds=kinds), metadata=self._access.metadata)
        return _events(call)

    def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        request: object,
        timeout_s: float | None = None,
    ) -> Any:
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return method(
                    request,
                    timeout=timeout_s or self._settings.call_s,
                    metadata=self._access.metadata,
                )
            except grpc.RpcError as error:
                self._rest(attempt, as_error(error), begun=False)
        raise AssertionError("the last attempt returns or raises")

    def _rest(self, attempt: int, error: TandemError, *, begun: bool) -> None:
        """Waits before the next attempt, or raises where there is none."""
        if begun or self._settings.is_last(attempt, error):
            raise error
        time.sleep(self._settings.pause_s(attempt, error))  # noqa: TID251  a caller's thread


def _events(call: Any) -> Iterator[pb.Event]:
    try:
        yield from call
    except grpc.RpcError as error:
        raise as_error(error) from None
    finally:
        call.cancel()


class AsyncClient:
    """The same for an event loop."""

    def __init__(self, access: Access | None = None, settings: ClientSettings | None = None):
        self._access = access or Access()
        self._settings = settings or ClientSettings()
        credentials = self._access.credentials()
        self._channel = (
            grpc.aio.insecure_channel(self._access.server)
            if credentials is None
            else grpc.aio.secure_channel(self._access.server, credentials)
        )
        self._inference = rpc.InferenceStub(self._channel)
        self._cluster = rpc.ClusterStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def stream(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateChunk]:
        """Chunks as they come."""
        for attempt in range(1, self._settings.attempts + 1):
            call = self._inference.Generate(
                request, timeout=self._settings.timeout_s, metadata=self._access.metadata
            )
            begun = False
            try:
                async for chunk in call:
                    begun = True
                    yield chunk
            except grpc.RpcError as error:
                await self._rest(attempt, as_error(error), begun=begun)
            else:
                return
            finally:
                call.cancel()

    async def generate(self, prompt: str, **sampling: Any) -> Generation:
        """The whole answer to a prompt."""
        generation = Generation()
        request = pb.GenerateRequest(text=prompt, sampling=pb.Sampling(**sampling))
        async for chunk in self.stream(request):
            generation.add(chunk)
        return generation

    async def abort(self, request_id: str) -> None:
        await self._call(self._inference.Abort, pb.AbortRequest(request_id=request_id))

    async def status(self) -> pb.StatusReply:
        reply: pb.StatusReply = await self._call(self._cluster.Status, pb.StatusRequest())
        return reply

    async def describe(self) -> pb.DescribeReply:
        """All that the live page shows, and the configuration in force."""
        reply: pb.DescribeReply = await self._call(self._cluster.Describe, pb.DescribeRequest())
        return reply

    async def scale(self, role: str, instances: int) -> pb.ScaleReply:
        request = pb.ScaleRequest(role=role, instances=instances)
        reply: pb.ScaleReply = await self._call(self._cluster.Scale, request)
        return reply

    async def set_role(self, instance: str, role: str) -> None:
        await self._call(self._cluster.SetRole, pb.SetRoleRequest(instance=instance, role=role))

    async def drain(self, instance: str) -> None:
        request = pb.DrainRequest(instance=instance)
        await self._call(self._cluster.Drain, request, self._settings.timeout_s)

    async def migrate(
        self, request_id: str, instance: str, *, wait: bool = False
    ) -> pb.MigrateReply:
        """With `wait`, returns once the request runs there, or raises why it does not."""
        request = pb.MigrateRequest(request_id=request_id, instance=instance, wait=wait)
        reply: pb.MigrateReply = await self._call(
            self._cluster.Migrate, request, self._settings.timeout_s
        )
        return reply

    async def apply_policy(self, yaml: str) -> list[str]:
        reply = await self._call(self._cluster.ApplyPolicy, pb.ApplyPolicyRequest(yaml=yaml))
        return list(reply.changes)

    async def watch(self, *kinds: str) -> AsyncIterator[pb.Event]:
        """Events until the caller stops reading."""
        call = self._cluster.Watch(pb.WatchRequest(kinds=kinds), metadata=self._access.metadata)
        try:
            async for event in call:
                yield event
        except grpc.RpcError as error:
            raise as_error(error) from None
        finally:
            call.cancel()

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        request: object,
        timeout_s: float | None = None,
    ) -> Any:
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return await method(
                    request,
                    timeout=timeout_s or self._settings.call_s,
                    metadata=self._access.metadata,
                )
            except grpc.RpcError as error:
                await self._rest(attempt, as_error(error), begun=False)
        raise AssertionError("the last attempt returns or raises")

    async def _rest(self, attempt: int, error: TandemError, *, begun: bool) -> None:
        """Waits before the next attempt, or raises where there is none."""
        if begun or self._settings.is_last(attempt, error):
            raise error
        await asyncio.sleep(self._settings.pause_s(attempt, error))
