"""The gRPC door: the same request path as HTTP, and the operator's verbs."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf import json_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.doors.both import host_in_url
from cluster.doors.grpc_calls import call_of, chunks_of
from cluster.doors.keys import EVERYONE, Metered, NotAllowed, Unauthorized
from cluster.doors.limits import GrpcLimits
from cluster.doors.tls import grpc_credentials
from cluster.events import KINDS
from cluster.roster import MOST_INSTANCES
from cluster.rpc import tandem_pb2 as pb
from cluster.rpc import tandem_pb2_grpc as rpc
from engine.errors import (
    BadConfig,
    BadInput,
    BadRequest,
    DeadlineExceeded,
    InstanceLost,
    NotFound,
    OutOfBlocks,
    Overloaded,
    PoisonRequest,
    TandemError,
    TransferError,
    Unsupported,
    check_names,
)
from engine.messages import Role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from cluster.config import TlsConfig
    from cluster.doors.keys import Caller, Keyring
    from cluster.gateway.gateway import Gateway
    from cluster.gateway.operator import Operator

    Context = grpc.aio.ServicerContext[Any, Any]

Reply = TypeVar("Reply")
MOST_CHARACTERS = 600
"""Of a refusal's words, which may quote what was sent: clients take so many as trailers."""
SERVICES = tuple(one.full_name for one in pb.DESCRIPTOR.services_by_name.values())
CODES: tuple[tuple[type[TandemError], grpc.StatusCode], ...] = (
    (BadInput, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthorized, grpc.StatusCode.UNAUTHENTICATED),
    (NotAllowed, grpc.StatusCode.PERMISSION_DENIED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (OutOfBlocks, grpc.StatusCode.OUT_OF_RANGE),
    (PoisonRequest, grpc.StatusCode.ABORTED),
    (InstanceLost, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (TransferError, grpc.StatusCode.FAILED_PRECONDITION),
    (Unsupported, grpc.StatusCode.UNIMPLEMENTED),
)


class Door:
    """Keys for both services."""

    def __init__(self, gateway: Gateway, keys: Keyring | None) -> None:
        self.gateway, self._keys = gateway, keys

    def caller(self, context: Context) -> Caller:
        if self._keys is None:
            return EVERYONE
        metadata = dict(context.invocation_metadata() or ())
        scheme, _, key = str(metadata.get("authorization", "")).partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else None
        return self._keys.caller(given, self.gateway.clock.now())

    def operator(self, context: Context) -> None:
        self.caller(context).must_operate()


class Inference(rpc.InferenceServicer):  # type: ignore[misc]
    def __init__(self, door: Door, write_s: float) -> None:
        self._door, self._gateway, self._write_s = door, door.gateway, write_s

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        try:
            await self._generate(request, context)
        except TandemError as error:
            await refuse(context, error)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortReply:  # noqa: N802
        try:
            caller = self._door.caller(context)
            tenant = None if caller.operator else caller.tenant
            await self._gateway.everywhere.abort(request.request_id, tenant)
        except TandemError as error:
            await refuse(context, error)
        return pb.AbortReply()

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        caller = self._door.caller(context)
        call = call_of(request)
        if request.model not in ("", self._gateway.model):
            raise NotFound(f"the model {request.model!r} is not served here")
        priority = caller.priority_of(request.priority if request.HasField("priority") else None)
        caller.enter(self._gateway.clock.now())
        metadata = dict(context.invocation_metadata() or ())
        trace = metadata.get("traceparent")
        trace = None if trace is None else str(trace)
        call = replace(call, priority=priority, tenant=caller.tenant, trace=trace)
        answer = await self._gateway.open(call)
        metered = Metered(answer, caller)
        try:
            while deltas := await metered.next():
                await self._write(chunks_of(answer, deltas), context)
        finally:
            # Also when the client has gone: grpc cancels this coroutine.
            self._gateway.close(answer)
            metered.charge()

    async def _write(self, chunks: list[pb.GenerateChunk], context: Context) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                for chunk in chunks:
                    await context.write(chunk)
        except TimeoutError:
            raise DeadlineExceeded("the reader stopped reading") from None


class Cluster(rpc.ClusterServicer):  # type: ignore[misc]
    def __init__(self, door: Door, operator: Operator) -> None:
        self._door, self._operator = door, operator

    async def Status(self, _: pb.StatusRequest, context: Context) -> pb.StatusReply:  # noqa: N802
        async def work() -> pb.StatusReply:
            return json_format.ParseDict(
                _without_none(await self._operator.status()), pb.StatusReply()
            )

        return await self._answer(context, work)

    async def Describe(self, _: pb.DescribeRequest, context: Context) -> pb.DescribeReply:  # noqa: N802
        async def work() -> pb.DescribeReply:
            seen, config = await self._operator.describe()
            return pb.DescribeReply(seen=json.dumps(seen), config=json.dumps(config))

        return await self._answer(context, work)

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleReply:  # noqa: N802
        async def work() -> pb.ScaleReply:
            role, instances = _role(request.role), _instances(request.instances)
            started, draining = await self._operator.scale(role, instances)
            return pb.ScaleReply(started=started, draining=draining)

        return await self._answer(context, work)

    async def SetRole(self, request: pb.SetRoleRequest, context: Context) -> pb.SetRoleReply:  # noqa: N802
        async def work() -> pb.SetRoleReply:
            await self._operator.set_role(request.instance, _role(request.role))
            return pb.SetRoleReply()

        return await self._answer(context, work)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:  # noqa: N802
        async def work() -> pb.DrainReply:
            await self._operator.drain(request.instance)
            return pb.DrainReply()

        return await self._answer(context, work)

    async def Migrate(self, request: pb.MigrateRequest, context: Context) -> pb.MigrateReply:  # noqa: N802
        async def work() -> pb.MigrateReply:
            source, target = await self._operator.migrate(
                request.request_id, request.instance, wait=request.wait
            )
            return pb.MigrateReply(source=source, target=target)

        return await self._answer(context, work)

    async def ApplyPolicy(  # noqa: N802
        self, request: pb.ApplyPolicyRequest, context: Context
    ) -> pb.ApplyPolicyReply:
        async def work() -> pb.ApplyPolicyReply:
            return pb.ApplyPolicyReply(changes=await self._operator.apply_policy(request.yaml))

        return await self._answer(context, work)

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.Event]:
        kinds = frozenset(request.kinds)
        try:
            self._door.operator(context)
            check_names("kind", request.kinds, KINDS)
            async for event in self._operator.watch():
                if not kinds or event.kind in kinds:
                    yield pb.Event(
                        at_s=event.at_s,
                        kind=event.kind,
                        subject=event.subject,
                        text=event.text,
                        fields=dict(event.fields),
                    )
        except TandemError as error:
            await refuse(context, error)

    async def _answer(
        self, context: Context, work: Callable[[], Coroutine[None, None, Reply]]
    ) -> Reply:
        try:
            self._door.operator(context)
            return await work()
        except TandemError as error:
            await refuse(context, error)


async def refuse(context: Context, error: TandemError) -> NoReturn:
    """End the call with the status that says what kind of error it is."""
    trailers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        trailers = (("retry-after", str(max(math.ceil(error.retry_after_s), 1))),)
    code = grpc.StatusCode.INTERNAL
    for kind, status in CODES:
        if isinstance(error, kind):
            code = status
            break
    await context.abort(code, str(error)[:MOST_CHARACTERS], trailers)


class GrpcDoor:
    """A server on one address; `port` is known once it is made, also for port 0."""

    def __init__(
        self,
        gateway: Gateway,
        operator: Operator,
        *,
        host: str = "127.0.0.1",
        port: int = 50051,
        keys: Keyring | None = None,
        tls: TlsConfig | None = None,
        limits: GrpcLimits | None = None,
    ) -> None:
        limits = limits or GrpcLimits()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.message_bytes),
                ("grpc.max_metadata_size", limits.head_bytes),
                ("grpc.absolute_max_metadata_size", limits.head_bytes),
                ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(limits.keepalive_s * 1000)),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=limits.concurrent_calls,
        )
        door = Door(gateway, keys)
        rpc.add_InferenceServicer_to_server(Inference(door, limits.write_s), self._server)
        rpc.add_ClusterServicer_to_server(Cluster(door, operator), self._server)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = self._listen(host, port, tls)

    def _listen(self, host: str, port: int, tls: TlsConfig | None) -> int:
        """The port that it is; BadConfig if the address cannot be had."""
        address = f"{host_in_url(host)}:{port}"
        credentials = None if tls is None else grpc_credentials(tls)
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise BadConfig("gateway.grpc_port", port, f"cannot listen on {host}") from error

    async def start(self) -> None:
        await self._server.start()

    async def set_ready(self, *, ready: bool) -> None:
        """What grpc.health.v1 tells."""
        kind = health_pb2.HealthCheckResponse
        status = kind.SERVING if ready else kind.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


def _role(name: str) -> Role:
    try:
        return Role(name)
    except ValueError:
        raise BadRequest("role", name, "must be prefill, decode or mixed") from None


def _instances(count: int) -> int:
    if count > MOST_INSTANCES:
        raise BadRequest("instances", count, f"at most {MOST_INSTANCES} in a role")
    return count


def _without_none(value: Any) -> Any:
    """Protobuf has no null: what is unknown is absent."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
