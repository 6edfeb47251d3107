import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from cluster.access import Access, ClientSettings
from cluster.cli.app import run
from cluster.client import AsyncClient
from cluster.doors.both import listen
from cluster.doors.grpc_door import GrpcDoor
from cluster.doors.limits import GrpcLimits
from cluster.events import Event
from cluster.gateway.settings import GatewaySettings
from cluster.rpc import tandem_pb2 as pb
from cluster.rpc import tandem_pb2_grpc as rpc
from engine.errors import BadConfig, BadRequest, NotFound, TransferError
from engine.messages import Role
from engine.request import Request, Sampling
from placement.routing.admission import AdmissionSettings
from tests.cluster.fakes import hash_tokens
from tests.cluster.serving import PATIENCE_S, running, says, settle, tokens_of, until


class FakeOperator:
    """Remembers what it was asked to do."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.fates = {"gone": NotFound("it has ended"), "stays": TransferError("there is no room")}
        """Of requests that do not move."""

    async def status(self):
        return {
            "model": "fake",
            "endpoints": {"http": "http://127.0.0.1:1", "grpc": "127.0.0.1:2"},
            "instances": [{"id": "mixed-0", "role": "mixed", "workers": [{"rank": 0, "pid": 7}]}],
            "requests": [],
            "slo": {"ttft_s": 2.0, "tpot_s": 0.1, "attainment": None, "window_s": 60.0},
        }

    async def describe(self):
        return {"gateways": [{"id": "gateway-0", "answers": True}]}, {"model": "fake"}

    async def scale(self, role, instances):
        self.asked.append((role, instances))
        return ["decode-1"], []

    async def set_role(self, instance, role):
        self.asked.append((instance, role))

    async def drain(self, instance):
        raise NotFound(f"instance {instance!r}")

    async def migrate(self, request_id, instance, *, wait):
        if request_id in self.fates:
            raise self.fates[request_id]
        self.asked.append((request_id, instance, wait))
        return "decode-0", instance

    async def apply_policy(self, yaml):
        return [f"{len(yaml)} characters"]

    async def watch(self):
        yield Event(1, 1.0, "scale", "decode", "one more", (("instances", "2"),))
        yield Event(2, 2.0, "instance", "decode-1", "ready")


@asynccontextmanager
async def serving(*names, settings=None, keys=None, **options):
    async with running(*(names or ("prefill-0", "decode-0")), settings=settings, **options) as fake:
        operator = FakeOperator()
        door = GrpcDoor(fake.gateway, operator, port=0, keys=keys)
        await door.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
                yield SimpleNamespace(
                    fake=fake, door=door, operator=operator, channel=channel,
                    inference=rpc.InferenceStub(channel), cluster=rpc.ClusterStub(channel),
                )  # fmt: skip
        finally:
            await door.stop(0.0)


def ask(**options) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=8, seed=7, ignore_eos=True)
    return pb.GenerateRequest(**({"text": "hello", "sampling": sampling} | options))


async def read(call) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in call]


async def test_a_generation_streams_a_chunk_a_token_and_ends_with_its_summary():
    async with serving() as server:
        chunks = await read(server.inference.Generate(ask()))
        expected = hash_tokens(
            Request("x", tuple(tokens_of("hello")), Sampling(max_tokens=8, seed=7))
        )
        assert [token for chunk in chunks for token in chunk.token_ids] == expected
        assert len(chunks) == 8
        summary = chunks[-1].summary
        assert chunks[-1].finish_reason == "length"
        assert (summary.usage.prompt_tokens, summary.usage.completion_tokens) == (5, 8)
        assert (summary.route.prefill, summary.route.decode) == ("prefill-0", "decode-0")
        assert summary.ttft_s >= 0.0
        assert not any(chunk.HasField("summary") for chunk in chunks[:-1])
        await until(lambda: not server.fake.instances["prefill-0"].sequences)
        server.fake.assert_empty()


async def test_chat_stop_strings_echo_and_logprobs():
    async with serving(draw=says("one two")) as server:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        sampling = pb.Sampling(max_tokens=50, logprobs=1)
        request = pb.GenerateRequest(chat=chat, sampling=sampling, stop=["e t"])
        chunks = await read(server.inference.Generate(request))
        assert "".join(chunk.text for chunk in chunks) == "on"
        assert chunks[-1].finish_reason == "stop"
        assert len(chunks[0].logprobs[0].top) == 1


async def test_abort_ends_a_stream():
    async with serving() as server:
        server.fake.paused.add("decode-0")
        call = server.inference.Generate(ask(request_id="r"))
        await call.read()
        await server.inference.Abort(pb.AbortRequest(request_id="r"))
        assert (await call.read()).finish_reason == "abort"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.inference.Abort(pb.AbortRequest(request_id="r"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await settle()


async def test_a_client_that_cancels_frees_every_holder():
    async with serving() as server:
        server.fake.paused.add("decode-0")
        call = server.inference.Generate(ask())
        await call.read()
        call.cancel()
        await until(lambda: not server.fake.gateway.requests())
        for instance in server.fake.instances.values():
            await until(lambda one=instance: not one.sequences)
        server.fake.assert_empty()


WRONG = [
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (ask(model="other"), grpc.StatusCode.NOT_FOUND, "other"),
    (ask(n=0), grpc.StatusCode.INVALID_ARGUMENT, "n"),
    (ask(stop=[""]), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    (ask(sampling=pb.Sampling(temperature=9)), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    (ask(sampling=pb.Sampling(max_tokens=9999)), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    (ask(chat=pb.Chat(messages=[pb.ChatMessage(role="x")]), text=None),
     grpc.StatusCode.INVALID_ARGUMENT, "chat.role"),
    (ask(slo_ttft_s=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "slo_ttft_s"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "code", "words"), WRONG)
async def test_a_wrong_field_has_a_typed_status(request_, code, words):
    async with serving() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(server.inference.Generate(request_))
        assert caught.value.code() is code
        assert words in caught.value.details()
        server.fake.assert_empty()


async def test_overload_says_when_to_come_back():
    settings = GatewaySettings(admission=AdmissionSettings(queue_requests=0))
    async with serving(settings=settings) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(server.inference.Generate(ask()))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"model": "m" * 100_000}, grpc.StatusCode.NOT_FOUND),
        ({"request_id": "r" * 100_000}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_refusal_is_short_however_long_what_it_quotes(options, code):
    async with serving() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(server.inference.Generate(ask(**options)))
        assert caught.value.code() is code


async def test_the_operators_verbs_reach_the_operator():
    async with serving() as server:
        status = await server.cluster.Status(pb.StatusRequest())
        assert status.instances[0].workers[0].pid == 7
        assert not status.slo.HasField("attainment")
        described = await server.cluster.Describe(pb.DescribeRequest())
        assert json.loads(described.seen)["gateways"][0]["answers"]
        assert json.loads(described.config) == {"model": "fake"}
        scaled = await server.cluster.Scale(pb.ScaleRequest(role="decode", instances=2))
        assert list(scaled.started) == ["decode-1"]
        await server.cluster.SetRole(pb.SetRoleRequest(instance="mixed-0", role="prefill"))
        assert server.operator.asked == [(Role.DECODE, 2), ("mixed-0", Role.PREFILL)]
        moved = await server.cluster.Migrate(pb.MigrateRequest(request_id="r", instance="decode-1"))
        assert (moved.source, moved.target) == ("decode-0", "decode-1")
        policy = await server.cluster.ApplyPolicy(pb.ApplyPolicyRequest(yaml="abc"))
        assert list(policy.changes) == ["3 characters"]
        events = [event async for event in server.cluster.Watch(pb.WatchRequest(kinds=["scale"]))]
        assert [(event.kind, dict(event.fields)) for event in events] == [
            ("scale", {"instances": "2"})
        ]


async def test_the_operators_errors_are_typed():
    async with serving() as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.cluster.Drain(pb.DrainRequest(instance="x"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.cluster.Scale(pb.ScaleRequest(role="x"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError, match="at most 4096"):
            await server.cluster.Scale(pb.ScaleRequest(role="decode", instances=1_000_000))
        with pytest.raises(grpc.aio.AioRpcError, match="did you mean 'migration'"):
            await read(server.cluster.Watch(pb.WatchRequest(kinds=["migrations"])))
        assert server.operator.asked == []


@pytest.mark.parametrize(
    ("request_id", "status", "says"),
    [("r", 0, ""), ("gone", 1, "NotFound"), ("stays", 1, "TransferError")],
)
async def test_the_command_says_whether_a_request_has_moved(capsys, request_id, status, says):
    async with serving() as server:
        at = ("--server", f"127.0.0.1:{server.door.port}")
        assert await asyncio.to_thread(run, ["migrate", request_id, "decode-1", *at]) == status
        out, err = capsys.readouterr()
        assert says in err
        assert ("decode-1" in out) == (status == 0)
        assert server.operator.asked == [("r", "decode-1", True)][: status == 0]


async def test_a_message_over_the_limit_is_bad_input_and_not_sent_again():
    async with serving() as server:
        access = Access(f"127.0.0.1:{server.door.port}")
        async with AsyncClient(access, ClientSettings(first_pause_s=PATIENCE_S)) as client:
            with pytest.raises(BadRequest, match="larger than max"):
                await client.generate("x" * GrpcLimits().message_bytes)


async def test_health_follows_readiness():
    async with serving() as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        await server.door.set_ready(ready=True)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="tandem.v1.Inference"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        await server.door.set_ready(ready=False)
        reply = await stub.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_describes_the_services():
    async with serving() as server:

        def described() -> list[str]:
            with grpc.insecure_channel(f"127.0.0.1:{server.door.port}") as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                found = DescriptorPool(database).FindServiceByName("tandem.v1.Inference")
                return [method.name for method in found.methods]

        assert await asyncio.to_thread(described) == ["Generate", "Abort"]


async def test_a_port_that_is_taken_is_told_as_the_http_door_tells_it():
    taken = listen("127.0.0.1", 0, "port")
    port = taken.getsockname()[1]
    async with running("mixed-0") as cluster:
        with pytest.raises(BadConfig, match=rf"gateway.grpc_port: {port}: cannot listen on 127"):
            GrpcDoor(cluster.gateway, FakeOperator(), port=port)
    taken.close()
