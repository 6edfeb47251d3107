"""How gateways, instances and the controller reach each other: ordered, bounded, never blocking."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from engine.errors import InstanceLost

if TYPE_CHECKING:
    from engine.messages import Message


class Link(Protocol):
    """One participant's end: messages to a peer arrive in the order sent, or not at all."""

    name: str

    def send(self, to: str, message: Message) -> None:
        """Never blocks; InstanceLost for an unknown or dead peer or one that stopped reading."""
        ...

    async def receive(self) -> tuple[str, Message]:
        """The next message and who sent it."""
        ...

    def connect(self, peer: str, address: str) -> None: ...

    def disconnect(self, peer: str) -> None: ...

    def close(self) -> None: ...


class LocalNetwork:
    """Links inside one process: the fake that tests and simulations wire up."""

    def __init__(self, queue_messages: int = 65536) -> None:
        self._queue_messages = queue_messages
        self._inboxes: dict[str, asyncio.Queue[tuple[str, Message]]] = {}

    def join(self, name: str) -> LocalLink:
        assert name not in self._inboxes, f"{name} has joined already"
        self._inboxes[name] = asyncio.Queue(self._queue_messages)
        return LocalLink(self, name)

    def kill(self, name: str) -> None:
        """The participant is gone: its unread messages too, and sends to it fail."""
        self._inboxes.pop(name, None)

    def deliver(self, sender: str, to: str, message: Message) -> None:
        inbox = self._inboxes.get(to)
        if inbox is None or sender not in self._inboxes:
            raise InstanceLost(f"{sender} cannot reach {to}")
        try:
            inbox.put_nowait((sender, message))
        except asyncio.QueueFull as error:
            raise InstanceLost(f"{to} does not read: {self._queue_messages} unread") from error

    def inbox(self, name: str) -> asyncio.Queue[tuple[str, Message]]:
        inbox = self._inboxes.get(name)
        if inbox is None:
            raise InstanceLost(f"{name} has left")
        return inbox


class LocalLink:
    """A Link of a LocalNetwork; everyone who joined is reachable without an address."""

    def __init__(self, network: LocalNetwork, name: str) -> None:
        self._network = network
        self.name = name

    def send(self, to: str, message: Message) -> None:
        self._network.deliver(self.name, to, message)

    async def receive(self) -> tuple[str, Message]:
        return await self._network.inbox(self.name).get()

    def connect(self, peer: str, address: str) -> None:
        """Nothing to do: joining the network made every peer known."""

    def disconnect(self, peer: str) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        self._network.kill(self.name)
