import asyncio

import pytest
import zmq

from cluster.zmq_link import ClusterKey, LinkLimits, ZmqLink, ipc_address
from engine import wire
from engine.errors import InstanceLost
from engine.messages import Abort, Token, Tokens
from tests.cluster.serving import PATIENCE_S


@pytest.fixture
def network(tmp_path):
    links = []

    def join(name, *, key=None, bind=None, limits=None):
        link = ZmqLink(name, bind or ipc_address(tmp_path, name), key, limits)
        links.append(link)
        return link

    yield join
    for link in links:
        link.close()


async def next_of(link):
    return await asyncio.wait_for(link.receive(), PATIENCE_S)


async def test_messages_arrive_in_order_with_their_sender(network):
    gateway, instance = network("gateway-0"), network("prefill-0")
    instance.connect("gateway-0", gateway.address)
    for index in range(500):
        instance.send("gateway-0", Tokens((Token("r", 1, index, 7),)))
    for index in range(500):
        sender, message = await next_of(gateway)
        assert (sender, message.tokens[0].index) == ("prefill-0", index)


async def test_a_message_sent_before_the_peer_is_up_arrives_later(network, tmp_path):
    gateway = network("gateway-0")
    gateway.connect("prefill-0", ipc_address(tmp_path, "prefill-0"))
    gateway.send("prefill-0", Abort("r", 1))
    assert await next_of(network("prefill-0")) == ("gateway-0", Abort("r", 1))


async def test_an_unknown_or_disconnected_peer_is_lost(network):
    gateway, instance = network("gateway-0"), network("prefill-0")
    with pytest.raises(InstanceLost, match="knows no prefill-0"):
        gateway.send("prefill-0", Abort("r", 1))
    gateway.connect("prefill-0", instance.address)
    gateway.disconnect("prefill-0")
    with pytest.raises(InstanceLost):
        gateway.send("prefill-0", Abort("r", 1))


async def test_an_overflowing_queue_is_seen_by_the_sender(network, tmp_path):
    gateway = network("gateway-0", limits=LinkLimits(queue_messages=4))
    gateway.connect("prefill-0", ipc_address(tmp_path, "prefill-0"))
    for _ in range(4):
        gateway.send("prefill-0", Abort("r", 1))
    with pytest.raises(InstanceLost, match="does not read"):
        gateway.send("prefill-0", Abort("r", 1))


async def test_a_peer_can_move_to_a_new_address(network, tmp_path):
    gateway = network("gateway-0")
    first = network("prefill-0")
    gateway.connect("prefill-0", first.address)
    first.close()
    second = network("prefill-0", bind=ipc_address(tmp_path, "prefill-0-again"))
    gateway.connect("prefill-0", second.address)
    gateway.send("prefill-0", Abort("r", 2))
    assert await next_of(second) == ("gateway-0", Abort("r", 2))


async def test_tcp_links_talk_only_to_holders_of_the_key(network):
    key = ClusterKey.generate()
    instance = network("prefill-0", key=key, bind="tcp://127.0.0.1:*")
    friend = network("gateway-0", key=key, bind="tcp://127.0.0.1:*")
    stranger = zmq.Context.instance().socket(zmq.PUSH)
    stranger.linger = 0
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.curve_serverkey = key.public
    stranger.connect(instance.address)
    stranger.send(b"gateway-0\0" + wire.encode(Abort("evil", 1)))
    friend.connect("prefill-0", instance.address)
    friend.send("prefill-0", Abort("good", 1))
    assert await next_of(instance) == ("gateway-0", Abort("good", 1))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(instance.receive(), 0.3)
    stranger.close()


async def test_tcp_without_a_key_is_refused(network):
    with pytest.raises(AssertionError, match="encrypted"):
        network("prefill-0", bind="tcp://127.0.0.1:*")


async def test_noise_from_a_peer_is_logged_and_skipped(network, caplog):
    instance = network("prefill-0")
    peer = zmq.Context.instance().socket(zmq.PUSH)
    peer.connect(instance.address)
    for frame in (b"x", b"gateway-0\0\xc1", b"\xff\xfe\0x"):
        peer.send(frame)
    peer.send(b"gateway-0\0" + wire.encode(Abort("good", 1)))
    assert await next_of(instance) == ("gateway-0", Abort("good", 1))
    assert caplog.text.count("message refused") == 3
    peer.close()
