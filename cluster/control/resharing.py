"""Gives instances other shares of their GPU's multiprocessors: anew, one after another."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.actors import answer
from cluster.instance.draining import is_awaited
from engine.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.control.balancing import Note
    from cluster.control.keeper import Keeper
    from cluster.control.launch import Launched
    from cluster.roster import InstanceSpec
    from engine.messages import Role

log = logging.getLogger(__name__)


async def move_away(keeper: Keeper, launched: Launched, limit_s: float, why: str) -> None:
    """Has an instance's requests move or end, for so long at most, and stops it."""
    try:
        await answer(_empty(keeper, launched), limit_s)
    except TandemError as error:
        log.warning("drain incomplete instance=%s error=%s", launched.spec.name, error)
    launched.dismiss(why)


async def _empty(keeper: Keeper, launched: Launched) -> None:
    """Returns once nothing is there any more, and nobody is to hand anything to it."""
    await launched.workers[0].drain.remote()
    while is_awaited(launched.spec.name, keeper.loads.values()):
        await launched.workers[0].drain.remote()


@dataclass(frozen=True, slots=True)
class Resharing:
    keeper: Keeper
    note: Note
    drain_s: float
    start_s: float

    @property
    def shares(self) -> dict[Role, float]:
        """Of roles whose instances all have one; the first's, where not all have been given the
        same yet."""
        found: dict[Role, list[float | None]] = {}
        for spec in self.keeper.roster.desired:
            found.setdefault(spec.role, []).append(spec.sm_share)
        return {
            role: shares[0]
            for role, shares in found.items()
            if shares[0] is not None and None not in shares
        }

    def of_newcomer(self, spec: InstanceSpec) -> InstanceSpec:
        """With the share that its role has by now."""
        return replace(spec, sm_share=self.shares.get(spec.role, spec.sm_share))

    async def carry_out(self, shares: Mapping[Role, float]) -> None:
        for role, share in shares.items():
            for spec in self.keeper.roster.desired:
                if spec.role is role and spec.sm_share != share:
                    await self._renew(replace(spec, sm_share=share))

    async def _renew(self, spec: InstanceSpec) -> None:
        if not self.keeper.change(spec):
            return
        launched = self.keeper.instances.get(spec.name)
        if launched is not None and launched.stage == "up":
            self.note("instance", spec.name, "takes another share", sm_share=spec.sm_share)
            await move_away(self.keeper, launched, self.drain_s, "takes another share of its GPU")
        await self.keeper.until_up(spec, self.start_s)
