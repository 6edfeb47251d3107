"""The live page's one document: what all gateways contribute, put together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.watching.history import WholeHistory
from cluster.watching.live import SHOWN_ENDED, SHOWN_HANDOFFS, SHOWN_MOVES, SHOWN_REQUESTS
from cluster.watching.others import MOST_LIVES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cluster.gateway.gateway import Gateway
    from cluster.watching.live import Live

ABOUT = "live"
KEPT_S = 0.25
"""How old a document may be: others are asked no more often, however many watch."""
SUMMED = ("requests", "failed", "migrations", "failovers")


@dataclass(frozen=True, slots=True)
class _Shown:
    at_s: float
    document: dict[str, Any]


class WholeCluster:
    """Asks the other gateways only while somebody looks. `about` is what never changes."""

    def __init__(
        self, live: Live, gateway: Gateway, about: Mapping[str, Any], kept_s: float = KEPT_S
    ) -> None:
        self._live, self._gateway, self._about = live, gateway, dict(about)
        self._kept_s = kept_s
        self._shares: dict[str, dict[str, Any]] = {}
        """The latest of each life of each gateway: what a dead one did is not forgotten."""
        self._history = WholeHistory()
        self._shown: _Shown | None = None
        self._turn = asyncio.Lock()
        gateway.peers.answer(ABOUT, self._share)

    async def document(self) -> dict[str, Any]:
        """Numbers, names and moments; the same object for all who ask at once."""
        async with self._turn:
            now = self._gateway.clock.now()
            if self._shown is None or now - self._shown.at_s >= self._kept_s:
                self._shown = _Shown(now, await self._put_together())
            return self._shown.document

    def _share(self, since_s: Mapping[str, float]) -> dict[str, Any]:
        """`since_s` tells by life up to where the one who asks knows the history."""
        now, live = self._gateway.clock.now(), self._live
        return live.share(now, since_s.get(live.life, 0.0), self._gateway.waiting())

    async def _put_together(self) -> dict[str, Any]:
        me, peers = self._gateway.link.name, self._gateway.peers
        names = sorted({me, *peers.names})
        since_s = {life: self._history.since(life) for life in (self._live.life, *self._shares)}
        answers = {**await peers.ask(ABOUT, since_s), me: self._share(since_s)}
        for share in answers.values():
            self._heard(share)
        gateways = [{"id": name, "answers": name in answers} for name in names]
        return self._document(gateways, {share["life"] for share in answers.values()})

    def _heard(self, share: dict[str, Any]) -> None:
        """Those that have been silent longest come first, and are forgotten first."""
        life = share["life"]
        self._shares.pop(life, None)
        self._shares[life] = share
        self._history.heard(life, share["steps"])
        if len(self._shares) > MOST_LIVES:
            del self._shares[next(iter(self._shares))]

    def _document(self, gateways: list[dict[str, Any]], alive: set[str]) -> dict[str, Any]:
        now = self._gateway.clock.now()
        shares = list(self._shares.values())
        living = [share for share in shares if share["life"] in alive]
        return {
            "now_s": now,
            **self._about,
            "gateways": gateways,
            "instances": self._live.instances(),
            "totals": self._totals(shares, living),
            "observed": self._history.observed(now),
            "history": self._history.points(now),
            "requests": _latest(living, "requests", "arrived_s", SHOWN_REQUESTS)[::-1],
            "ended": _latest(shares, "ended", "ended_s", SHOWN_ENDED)[::-1],
            "moves": self._moves(shares),
        }

    def _moves(self, shares: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The latest hand-offs among the rarer moves, which stay longer."""
        rare = _latest(shares, "moves", "at_s", SHOWN_MOVES)
        usual = _latest(shares, "handoffs", "at_s", SHOWN_HANDOFFS)
        return sorted((*rare, *usual), key=lambda move: float(move["at_s"]))

    def _totals(
        self, shares: Iterable[dict[str, Any]], living: Iterable[dict[str, Any]]
    ) -> dict[str, int]:
        """`waiting` counts those at the gateways' doors and those in the instances' queues."""
        queued = sum(one["queue_requests"] for one in self._live.instances())
        return {
            **{name: sum(share["totals"][name] for share in shares) for name in SUMMED},
            "running": sum(share["totals"]["running"] for share in living),
            "waiting": queued + sum(share["totals"]["waiting"] for share in living),
        }


def _latest(
    shares: Iterable[dict[str, Any]], what: str, moment: str, most: int
) -> list[dict[str, Any]]:
    """In order of time."""
    found = [one for share in shares for one in share[what]]
    found.sort(key=lambda one: float(one[moment]))
    return found[-most:]
