"""What gateways ask each other: each knows its own requests, and any of them may be asked."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

from engine.errors import DeadlineExceeded, InstanceLost, NotFound
from engine.messages import Query, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.gateway.gateway import Gateway
    from cluster.links import Link

    Answerer = Callable[[Any], Any]

log = logging.getLogger(__name__)

ANSWER_S = 1.0
"""A gateway that takes longer is left out."""


class Peers:
    """Must be used on the event loop of its link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._names: tuple[str, ...] = ()
        self._numbers = count(1)
        self._answerers: dict[str, Answerer] = {}
        self._awaited: dict[int, asyncio.Future[Any]] = {}

    def follow(self, names: tuple[str, ...]) -> None:
        """Who the other gateways are from now on."""
        self._names = tuple(name for name in names if name != self._link.name)

    @property
    def names(self) -> tuple[str, ...]:
        """The other gateways'."""
        return self._names

    def answer(self, about: str, answerer: Answerer) -> None:
        """Others that ask `about` get what `answerer` makes of their question."""
        self._answerers[about] = answerer

    async def ask(self, about: str, question: Any = None) -> dict[str, Any]:
        """Every other gateway's answer, by its name; without those that are gone or stuck."""
        asked: dict[str, int] = {}
        for name in self._names:
            number = next(self._numbers)
            try:
                self._link.send(name, Query(number, about, json.dumps(question).encode()))
            except InstanceLost:
                continue
            self._awaited[number] = asyncio.get_running_loop().create_future()
            asked[name] = number
        waited = {name: self._awaited[number] for name, number in asked.items()}
        try:
            if waited:
                await asyncio.wait(waited.values(), timeout=ANSWER_S)
        finally:
            for number in asked.values():
                del self._awaited[number]
        return {name: future.result() for name, future in waited.items() if future.done()}

    def asked(self, sender: str, query: Query) -> None:
        answerer = self._answerers.get(query.about)
        if answerer is None or sender not in self._names:
            return
        body = json.dumps(answerer(json.loads(query.body))).encode()
        try:
            self._link.send(sender, Reply(query.number, body))
        except InstanceLost as lost:
            # The roster has just told the link, and tells us next.
            log.info("nobody hears the answer gateway=%s reason=%s", sender, lost)

    def answered(self, reply: Reply) -> None:
        future = self._awaited.get(reply.number)
        if future is not None and not future.done():
            future.set_result(json.loads(reply.body))


class Everywhere:
    """A gateway's requests together with those of the others."""

    def __init__(self, gateway: Gateway, peers: Peers) -> None:
        self._gateway, self._peers = gateway, peers
        peers.answer("requests", lambda _: self._mine())
        peers.answer("abort", lambda question: self._aborts(*question))

    async def requests(self) -> list[dict[str, Any]]:
        """Every gateway's requests under way, this one's first."""
        others = await self._peers.ask("requests")
        return self._mine() + [one for name in sorted(others) for one in others[name]]

    async def abort(self, request_id: str, tenant: str | None = None) -> None:
        """Ends a call whose client may be at another gateway. Raises NotFound, or DeadlineExceeded
        where one that may have it is slow to answer; there it ends all the same."""
        if self._aborts(request_id, tenant):
            return
        asked = self._peers.names
        found = await self._peers.ask("abort", [request_id, tenant])
        if any(found.values()):
            return
        silent = [name for name in asked if name not in found]
        if silent:
            raise DeadlineExceeded(f"{', '.join(silent)} did not say whether it had {request_id!r}")
        raise NotFound(f"request {request_id!r} is not under way")

    def _mine(self) -> list[dict[str, Any]]:
        return [asdict(one) for one in self._gateway.requests()]

    def _aborts(self, request_id: str, tenant: str | None) -> bool:
        try:
            self._gateway.abort(request_id, tenant)
        except NotFound:
            return False
        return True
