"""A member's side of the roster: join, keep up with it, and act on arrivals and losses."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from cluster.roster import Kind, Roster, changes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cluster.links import Link
    from cluster.roster import Member

    Sync = Callable[[Member, int], Awaitable[Roster]]

log = logging.getLogger(__name__)


class Follower(Protocol):
    """What a member does about the others; a gateway and an instance's leader are followers."""

    async def joined(self, member: Member) -> None:
        """A newcomer whose address the link knows; only when done is it counted as known."""
        ...

    def lost(self, member: Member) -> None:
        """Gone for good, even if another one of its name comes."""
        ...

    def updated(self, roster: Roster) -> None: ...


class Membership:
    """Runs until cancelled. `sync` is the controller's long poll, retried by whoever gives it."""

    def __init__(self, me: Member, link: Link, follower: Follower, sync: Sync) -> None:
        self.me = me
        self.roster = Roster(0)
        self._link, self._follower, self._sync = link, follower, sync

    async def run(self) -> None:
        while True:
            newer = await self._sync(self.me, self.roster.version)
            if newer.version != self.roster.version:
                await self._follow(newer)

    async def _follow(self, newer: Roster) -> None:
        diff = changes(self.roster, newer)
        self.roster = newer
        for member in diff.lost:
            if member.name != self.me.name:
                log.info("member lost me=%s member=%s", self.me.name, member.name)
                self._link.disconnect(member.name)
                self._follower.lost(member)
        arrivals = [member for member in diff.joined if member.name != self.me.name]
        for member in arrivals:
            self._link.connect(member.name, member.address)
        await asyncio.gather(*(self._follower.joined(member) for member in arrivals))
        self._follower.updated(newer)


def listeners(roster: Roster, me: str) -> tuple[str, ...]:
    """Who is to hear an instance's load: the controller, and gateways once everyone knows it."""
    names = [member.name for member in roster.of_kind(Kind.CONTROLLER)]
    if me in roster.settled:
        names += [member.name for member in roster.of_kind(Kind.GATEWAY)]
    return tuple(names)
