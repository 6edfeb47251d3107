import asyncio

import pytest

from cluster.links import LocalNetwork
from engine.errors import InstanceLost
from engine.messages import Abort, Lost


async def test_messages_arrive_in_order_with_their_sender():
    network = LocalNetwork()
    gateway, instance = network.join("gateway-0"), network.join("prefill-0")
    gateway.send("prefill-0", Abort("r1", 1))
    gateway.send("prefill-0", Lost("decode-0"))
    assert await instance.receive() == ("gateway-0", Abort("r1", 1))
    assert await instance.receive() == ("gateway-0", Lost("decode-0"))


async def test_a_dead_peer_is_lost_not_ignored():
    network = LocalNetwork()
    gateway, _ = network.join("gateway-0"), network.join("prefill-0")
    network.kill("prefill-0")
    with pytest.raises(InstanceLost, match="cannot reach prefill-0"):
        gateway.send("prefill-0", Abort("r1", 1))
    with pytest.raises(InstanceLost):
        gateway.send("nobody", Abort("r1", 1))


async def test_a_peer_that_does_not_read_is_lost_at_the_bound():
    network = LocalNetwork(queue_messages=2)
    gateway, _ = network.join("gateway-0"), network.join("prefill-0")
    gateway.send("prefill-0", Abort("r1", 1))
    gateway.send("prefill-0", Abort("r2", 1))
    with pytest.raises(InstanceLost, match="does not read"):
        gateway.send("prefill-0", Abort("r3", 1))


async def test_receive_waits_for_a_message():
    network = LocalNetwork()
    gateway, instance = network.join("gateway-0"), network.join("prefill-0")
    waiting = asyncio.ensure_future(instance.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    gateway.send("prefill-0", Abort("r1", 1))
    assert await waiting == ("gateway-0", Abort("r1", 1))
