"""The client against a server that fails as told."""

from pathlib import Path

import grpc
import pytest

from cluster.access import Access, ClientSettings
from cluster.client import AsyncClient, Client
from cluster.rpc import tandem_pb2 as pb
from cluster.rpc import tandem_pb2_grpc as rpc
from engine.errors import BadRequest, InstanceLost, NotFound, Overloaded

QUICK = ClientSettings(attempts=3, first_pause_s=0.001, most_pause_s=0.001)
CHUNKS = [
    pb.GenerateChunk(request_id="r", text="one ", token_ids=[1]),
    pb.GenerateChunk(request_id="r", text="two", token_ids=[2], finish_reason="stop"),
]


class Script(rpc.InferenceServicer, rpc.ClusterServicer):
    """Each call takes the next entry: what to abort with, or None to succeed."""

    def __init__(self):
        self.entries, self.calls, self.chunks_first = [], 0, 0

    async def _next(self, context):
        self.calls += 1
        entry = self.entries.pop(0) if self.entries else None
        if entry is not None:
            await context.abort(*entry)

    async def Generate(self, request, context):  # noqa: N802
        for chunk in CHUNKS[: self.chunks_first]:
            await context.write(chunk)
        await self._next(context)
        for chunk in CHUNKS[self.chunks_first :]:
            await context.write(chunk)

    async def Status(self, request, context):  # noqa: N802
        await self._next(context)
        return pb.StatusReply(model="demo")


@pytest.fixture
async def served():
    server, script = grpc.aio.server(), Script()
    rpc.add_InferenceServicer_to_server(script, server)
    rpc.add_ClusterServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(Access(f"127.0.0.1:{port}"), QUICK) as client:
        yield client, script
    await server.stop(None)


UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "no instance")
BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")


async def test_a_call_is_repeated_until_it_succeeds(served):
    client, script = served
    script.entries = [UNAVAILABLE, BUSY]
    assert (await client.status()).model == "demo"
    assert script.calls == 3


async def test_repetition_ends_with_the_servers_error(served):
    client, script = served
    script.entries = [BUSY] * 5
    with pytest.raises(Overloaded, match="queue is full"):
        await client.status()
    assert script.calls == 3


async def test_bad_input_is_not_repeated_and_keeps_its_field(served):
    client, script = served
    script.entries = [(grpc.StatusCode.INVALID_ARGUMENT, "n: 99: at most 64")]
    with pytest.raises(BadRequest) as caught:
        await client.status()
    assert (caught.value.field, caught.value.rule) == ("n", "at most 64")
    assert script.calls == 1


async def test_a_generation_is_repeated_only_while_nothing_has_arrived(served):
    client, script = served
    script.entries = [UNAVAILABLE]
    generation = await client.generate("x", max_tokens=2)
    assert (generation.text, generation.token_ids) == ("one two", [1, 2])
    assert script.calls == 2
    script.entries, script.chunks_first = [UNAVAILABLE], 1
    with pytest.raises(InstanceLost):
        await client.generate("x")
    assert script.calls == 3


async def test_other_failures_keep_their_kind(served):
    client, script = served
    script.entries = [(grpc.StatusCode.NOT_FOUND, "no request r")]
    with pytest.raises(NotFound, match="no request r"):
        await client.status()


def test_a_server_that_is_not_there_is_a_lost_one():
    with Client(Access("127.0.0.1:1"), QUICK) as client, pytest.raises(InstanceLost):
        client.status()


def test_the_pause_doubles_up_to_its_bound_and_heeds_the_server():
    settings = ClientSettings(first_pause_s=0.5, most_pause_s=1.5)
    lost = InstanceLost("x")
    assert [settings.pause_s(attempt, lost) for attempt in (1, 2, 3)] == [0.5, 1.0, 1.5]
    assert settings.pause_s(1, Overloaded("busy", 7.0)) == 7.0


async def test_a_server_that_asks_for_a_long_pause_has_refused(served):
    client, script = served
    script.entries = [(*BUSY, (("retry-after", "86400"),))]
    with pytest.raises(Overloaded) as caught:
        await client.status()
    assert (caught.value.retry_after_s, script.calls) == (86400.0, 1)


@pytest.mark.parametrize(
    ("access", "field"),
    [(Access(ca=Path("no.pem")), "ca"), (Access(api_key="k\xe9y"), "api_key")],
    ids=["a file that is not there", "a key that no header can hold"],
)
def test_what_a_server_cannot_be_reached_with_is_named(access, field):
    with pytest.raises(BadRequest) as caught, Client(access, QUICK) as client:
        client.status()
    assert caught.value.field == field
    assert "k\xe9y" not in str(caught.value)
