"""The host drives real instances with an executor that computes nothing."""

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.instance.host import Host, HostSettings
from cluster.instance.instance import Instance, InstanceSettings
from cluster.instance.mover import InstanceMover
from cluster.links import LocalNetwork
from engine.batch import Drawn, StepResult
from engine.blocks import BlockPool
from engine.clock import SystemClock
from engine.errors import InstanceLost, TransportError
from engine.layout import KvLayout
from engine.messages import Load, Role, Start, Tokens
from engine.request import Request, Sampling
from kvtransfer.transfer import TransferSettings
from tests.cluster.serving import PATIENCE_S, until

LAYOUT = KvLayout("m", 2, 1, 8, 4, "float32")
SETTINGS = InstanceSettings(transfer=TransferSettings(lease_s=PATIENCE_S, offer_wait_s=PATIENCE_S))
REQUEST = Request("r1", (1, 2, 3, 4, 5), Sampling(max_tokens=6))


class CountingExecutor:
    """The next token is the position it stands at."""

    launch = None

    def execute(self, batch, on_layer_group=None):
        if on_layer_group is not None:
            on_layer_group(0)
        drawn = [Drawn(c.request_id, c.end) for c in batch.chunks if c.draw is not None]
        return StepResult(tuple(drawn), 0.001)


class ListeningExecutor(CountingExecutor):
    """Remembers for which batches somebody listened while they ran."""

    def __init__(self):
        self.heard = []

    def execute(self, batch, on_layer_group=None):
        self.heard.append(on_layer_group is not None)
        return super().execute(batch, on_layer_group)


class BrokenExecutor(CountingExecutor):
    def execute(self, batch, on_layer_group=None):
        raise InstanceLost("a rank of the model failed")


class StuckExecutor(CountingExecutor):
    """A pass that does not return before the test lets it."""

    def __init__(self):
        self.let_go = threading.Event()

    def execute(self, batch, on_layer_group=None):
        assert self.let_go.wait(PATIENCE_S)
        return StepResult(())


class InstantRank:
    """Every pull succeeds at once, unless told to fail."""

    def __init__(self):
        self.pulls, self.error = 0, None

    async def pull(self, order):
        self.pulls += 1
        if self.error is not None:
            raise self.error

    async def cancel(self, transfer):
        """Nothing is under way."""


@asynccontextmanager
async def hosted(
    network, name, role, *, executor=None, rank=None, settings=SETTINGS, pass_s=PATIENCE_S
):
    pool = BlockPool(32, 4)
    instance = Instance(name, role, pool, LAYOUT, settings=settings, eos=frozenset())
    async with asyncio.TaskGroup() as tasks:
        host = Host(
            instance,
            executor=executor or CountingExecutor(),
            link=network.join(name),
            mover=InstanceMover([rank or InstantRank()], tasks),
            clock=SystemClock(),
            settings=HostSettings(heartbeat_s=0.02, change_s=0.001, pass_s=pass_s),
        )
        running = tasks.create_task(host.run())
        yield host
        running.cancel()


async def tokens_of(link, count):
    found = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            _, message = await link.receive()
            if isinstance(message, Tokens):
                found += message.tokens
    return found


async def loads_of(link, count):
    found = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            sender, message = await link.receive()
            if isinstance(message, Load):
                found.append((sender, message))
    return found


async def run_broken(network, gateway, executor, pass_s=PATIENCE_S):
    async with (
        hosted(network, "mixed-0", Role.MIXED, executor=executor, pass_s=pass_s),
        asyncio.timeout(PATIENCE_S),
    ):
        gateway.send("mixed-0", Start(REQUEST, 1))
        await asyncio.Event().wait()


def is_empty(host):
    host.instance.pool.check()
    return host.instance.pool.available == 32


async def test_a_mixed_instance_streams_every_token_and_ends_empty():
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    async with hosted(network, "mixed-0", Role.MIXED) as host:
        gateway.send("mixed-0", Start(REQUEST, 1))
        tokens = await tokens_of(gateway, 6)
        assert [token.index for token in tokens] == list(range(6))
        assert [token.token for token in tokens] == [5, 6, 7, 8, 9, 10]
        assert is_empty(host)


@pytest.mark.parametrize("least_tokens", [len(REQUEST.prompt), len(REQUEST.prompt) + 1])
async def test_only_what_is_handed_off_in_large_pieces_is_told_of_layer_by_layer(least_tokens):
    groups, token_bytes = 2, LAYOUT.instance_block_bytes // LAYOUT.block_tokens
    pieces = {"layer_groups": groups, "piece_bytes": least_tokens * token_bytes // groups}
    settings = replace(SETTINGS, transfer=replace(SETTINGS.transfer, **pieces))
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    prefill, decode, mixed = ListeningExecutor(), ListeningExecutor(), ListeningExecutor()
    async with (
        hosted(network, "prefill-0", Role.PREFILL, executor=prefill, settings=settings),
        hosted(network, "decode-0", Role.DECODE, executor=decode, settings=settings),
        hosted(network, "mixed-0", Role.MIXED, executor=mixed, settings=settings),
    ):
        gateway.send("prefill-0", Start(REQUEST, 1, (), "decode-0", 2))
        await tokens_of(gateway, 6)
        gateway.send("mixed-0", Start(replace(REQUEST, id="r2"), 1))
        await tokens_of(gateway, 6)
    assert prefill.heard[0] == (least_tokens == len(REQUEST.prompt))
    assert not any(decode.heard)
    assert not any(mixed.heard)


async def test_a_handoff_goes_on_at_the_next_token():
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    rank = InstantRank()
    async with (
        hosted(network, "prefill-0", Role.PREFILL) as prefill,
        hosted(network, "decode-0", Role.DECODE, rank=rank) as decode,
    ):
        gateway.send("prefill-0", Start(REQUEST, 1, (), "decode-0", 2))
        tokens = await tokens_of(gateway, 6)
        assert [(token.epoch, token.index) for token in tokens] == [
            (1, 0), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5),
        ]  # fmt: skip
        assert rank.pulls > 0
        assert is_empty(decode)
        del prefill


async def test_loads_are_told_as_heartbeats_and_when_something_changes():
    network = LocalNetwork()
    gateway, controller = network.join("gateway-0"), network.join("controller")
    async with hosted(network, "mixed-0", Role.MIXED) as host:
        host.tell(["gateway-0", "controller"])
        heard = await loads_of(controller, 3)
        assert {sender for sender, _ in heard} == {"mixed-0"}
        host.instance.set_role(Role.DECODE)
        host.pump()
        async with asyncio.timeout(PATIENCE_S):
            while (await loads_of(gateway, 1))[0][1].role is not Role.DECODE:
                pass


async def test_a_lost_gateways_requests_are_dropped():
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    long = Request("r2", (1, 2, 3), Sampling(max_tokens=100))
    async with hosted(network, "mixed-0", Role.MIXED) as host:
        gateway.send("mixed-0", Start(long, 1))
        await tokens_of(gateway, 2)
        network.kill("gateway-0")
        await until(lambda: is_empty(host))


async def test_a_failed_batch_ends_the_host():
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    with pytest.raises(ExceptionGroup) as caught:
        await run_broken(network, gateway, BrokenExecutor())
    assert caught.group_contains(InstanceLost)


async def test_a_pass_that_never_returns_ends_the_host():
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    stuck = StuckExecutor()
    try:
        with pytest.raises(ExceptionGroup) as caught:
            await run_broken(network, gateway, stuck, pass_s=0.01)
    finally:
        stuck.let_go.set()
    assert caught.group_contains(InstanceLost, match="a pass has not returned")


async def test_a_failed_pull_is_an_outcome_not_a_crash():
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    rank = InstantRank()
    rank.error = TransportError("the bytes did not arrive")
    async with (
        hosted(network, "prefill-0", Role.PREFILL),
        hosted(network, "decode-0", Role.DECODE, rank=rank) as decode,
    ):
        gateway.send("prefill-0", Start(REQUEST, 1, (), "decode-0", 2))
        await tokens_of(gateway, 1)
        await until(lambda: rank.pulls > 0 and is_empty(decode))
