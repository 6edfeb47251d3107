"""How much a live migration slows the other sequences of both hosts down while KV moves.

Fresh sequences move one way and then the other. On each host steps during a copy are compared
with steps just before and after, with the same batch: a baseline is drawn through the quiet
spells between which the copy lies, so that neither growing contexts nor a drift of the machine
count. What is reported is the median over the copies, with the interval that holds it in 95 of
100 resamples.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.routing.router import Route

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.request import Request
    from scripts.bench.two_hosts import Gateway, HostProcess, Stream

QUIET_TOKENS = 24
"""A spell without a copy, in steps."""
JOINING_TOKENS = 3
"""Steps after a change of the batch that count for nothing."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Spell:
    """A time in which a host's batch did not change."""

    since_s: float
    until_s: float

    @property
    def middle_s(self) -> float:
        return (self.since_s + self.until_s) / 2

    def step_s(self, tokens_at: list[float]) -> float:
        """The lower quartile of the steps that lay wholly within: what else runs on a machine only
        ever makes steps longer, while a copy is in every one of them."""
        whole = [at for at in tokens_at if self.since_s <= at <= self.until_s]
        return float(np.quantile([b - a for a, b in pairwise(whole)], 0.25))


@dataclass
class Record:
    """Spells of one host, by whether the sequence that moves was in its batch."""

    quiet: dict[bool, list[Spell]] = field(default_factory=lambda: defaultdict(list))
    copying: dict[bool, list[Spell]] = field(default_factory=lambda: defaultdict(list))


async def slow_down(
    gateway: Gateway, hosts: list[HostProcess], ask: Callable[[str], Request], laps: int
) -> dict[str, Any]:
    """Over so many moves each way; the hosts are decoding other sequences meanwhile."""
    records = {host.plan.name: Record() for host in hosts}
    for number in range(2 * laps):
        source, target = hosts if number % 2 == 0 else reversed(hosts)
        await _move(gateway, source, target, ask(f"passing-{number}"), records)
    found: dict[str, Any] = {}
    for side, there in (("source", True), ("target", False)):
        ratios = [
            ratio
            for name, record in records.items()
            for ratio in _ratios(record, gateway.steps_s[name], there=there)
        ]
        found[side] = _interval(ratios)
    return found


async def _move(
    gateway: Gateway,
    source: HostProcess,
    target: HostProcess,
    request: Request,
    records: dict[str, Record],
) -> None:
    here, there = records[source.plan.name], records[target.plan.name]
    source.know(request.prompt)
    stream = gateway.open(request, Route(source.plan.name))
    before = await _quiet(gateway, stream)
    here.quiet[True].append(before)
    there.quiet[False].append(before)
    asked_s = time.monotonic()
    gateway.migrate(request.id, source.plan.name, target.plan.name)
    await gateway.until(lambda: request.id in gateway.ended)
    assert gateway.ended[request.id].outcome == "committed", gateway.ended[request.id]
    first = stream.senders.index(target.plan.name)
    here.copying[True].append(Spell(asked_s, stream.arrived_s[first - 1]))
    there.copying[False].append(Spell(asked_s, stream.arrived_s[first]))
    after = await _quiet(gateway, stream)
    here.quiet[False].append(after)
    there.quiet[True].append(after)
    gateway.abort(request.id)


async def _quiet(gateway: Gateway, stream: Stream) -> Spell:
    await gateway.tokens(stream, JOINING_TOKENS)
    since_s = time.monotonic()
    await gateway.tokens(stream, QUIET_TOKENS)
    return Spell(since_s, time.monotonic())


def _ratios(record: Record, tokens_at: list[float], *, there: bool) -> list[float]:
    """Of each copy's steps to the baseline's at its middle."""
    middles = [spell.middle_s for spell in record.quiet[there]]
    steps = [spell.step_s(tokens_at) for spell in record.quiet[there]]
    return [
        spell.step_s(tokens_at) / float(np.interp(spell.middle_s, middles, steps)) - 1.0
        for spell in record.copying[there]
    ]


def _interval(ratios: list[float]) -> dict[str, float]:
    generator = random.Random(0)
    medians = [
        statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(medians, (0.025, 0.975))
    median = statistics.median(ratios)
    return {"median": median, "low": float(low), "high": float(high), "copies": len(ratios)}
