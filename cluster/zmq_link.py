"""Links between processes: one inbox each, one outgoing socket per peer, both bounded.

A PUSH socket blocks at its high-water mark where a ROUTER would drop, so an overflow is always
seen by the sender. On one host the inbox is a socket file in a private directory; between hosts it
is TCP, always encrypted and open only to holders of the cluster's key.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq
import zmq.auth.asyncio
import zmq.error

from engine import wire
from engine.errors import BadMessage, InstanceLost

if TYPE_CHECKING:
    from pathlib import Path

    from engine.messages import Message

log = logging.getLogger(__name__)

READS_BEFORE_A_YIELD = 64
HEAD_END = b"\0"
"""Between a sender's name and its message, in one frame: each frame costs a hand-over of Python's
lock, and with it a wait for the thread that computes."""


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What bounds every queue between two participants."""

    queue_messages: int = 10_000
    """Unsent messages to one peer, and unread ones from it; a peer past both is lost."""
    message_bytes: int = 64 << 20
    flush_s: float = 1.0
    """How long a closing link waits for its last messages to leave."""


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The CURVE pair that a cluster's members share: nobody else may talk or listen."""

    public: bytes
    secret: bytes

    @classmethod
    def generate(cls) -> ClusterKey:
        return cls(*zmq.curve_keypair())

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002
        """Whether a client's public key may connect; pyzmq's credentials protocol."""
        return bool(key == self.public)


class ZmqLink:
    """A Link for one event loop; must be made and used on that loop's thread."""

    def __init__(
        self, name: str, bind: str, key: ClusterKey | None, limits: LinkLimits | None = None
    ) -> None:
        """`bind` is ipc://PATH, or tcp://HOST:* which needs a key."""
        assert key is not None or not bind.startswith("tcp:"), "TCP links are encrypted"
        self.name = name
        self._head = name.encode() + HEAD_END
        self._limits = limits or LinkLimits()
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._guard = self._start_guard()
        self._inbox = self._socket(zmq.PULL)
        self._bind(bind)
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[str, str] = {}
        self._reads = 0
        self._closed = False

    def send(self, to: str, message: Message) -> None:
        peer = self._peers.get(to)
        if peer is None:
            raise InstanceLost(f"{self.name} knows no {to}")
        try:
            peer.send(self._head + wire.encode(message), zmq.NOBLOCK)
        except zmq.Again as error:
            raise InstanceLost(f"{to} does not read: the queue to it is full") from error

    async def receive(self) -> tuple[str, Message]:
        """What does not decode is logged and skipped: one bad peer must not stop the others."""
        while True:
            self._reads += 1
            if self._reads % READS_BEFORE_A_YIELD == 0:
                await asyncio.sleep(0)
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                await self._readable()
                continue
            try:
                return _decode(frame)
            except BadMessage as error:
                log.warning("message refused link=%s error=%s", self.name, error)

    def connect(self, peer: str, address: str) -> None:
        """Knows the peer by this address from now on; what waited for another one is dropped."""
        if self._addresses.get(peer) == address:
            return
        self.disconnect(peer)
        socket = self._socket(zmq.PUSH)
        socket.connect(address)
        self._peers[peer] = socket
        self._addresses[peer] = address

    def disconnect(self, peer: str) -> None:
        self._addresses.pop(peer, None)
        socket = self._peers.pop(peer, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.close(linger=0)
        for socket in self._peers.values():
            socket.close(linger=int(self._limits.flush_s * 1000))
        self._peers.clear()
        if self._guard is not None:
            self._guard.stop()
        self._context.term()

    def _start_guard(self) -> zmq.auth.asyncio.AsyncioAuthenticator | None:
        """Answers libzmq's question who may connect; without it CURVE lets everyone in."""
        if self._key is None:
            return None
        guard = zmq.auth.asyncio.AsyncioAuthenticator(context=self._context)
        guard.start()
        guard.configure_curve_callback(domain="*", credentials_provider=self._key)
        return guard

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.sndhwm = socket.rcvhwm = self._limits.queue_messages
        socket.maxmsgsize = self._limits.message_bytes
        socket.linger = 0
        if self._key is not None:
            socket.curve_publickey, socket.curve_secretkey = self._key.public, self._key.secret
            if kind == zmq.PULL:
                socket.curve_server = True
            else:
                socket.curve_serverkey = self._key.public
        return socket

    def _bind(self, bind: str) -> None:
        self._inbox.bind(bind)
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)

    async def _readable(self) -> None:
        """Waits for libzmq's signal, watched only meanwhile because it stays up until read."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        descriptor = int(self._inbox.fd)
        self._loop.add_reader(descriptor, _wake, waiter)
        try:
            await waiter
        finally:
            self._loop.remove_reader(descriptor)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _decode(frame: bytes) -> tuple[str, Message]:
    sender, _, body = frame.partition(HEAD_END)
    try:
        return sender.decode(), wire.decode(body)
    except UnicodeDecodeError as error:
        raise BadMessage(f"a peer without a name: {error}") from error


def ipc_address(directory: Path, name: str) -> str:
    path = directory / name
    assert len(str(path)) < 100, "socket paths end at 107 characters"
    return f"ipc://{path}"
