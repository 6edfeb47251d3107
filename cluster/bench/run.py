"""A whole bench: warm up, take turns between the servers, and put the figures together."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.bench.figures import attainment_over_scale, figures, share_interval
from cluster.bench.goodput import Search, find_goodput
from cluster.bench.load import Conversation, Silent, closed_loop, open_loop
from cluster.bench.server import Server, Settings, Turn, connect
from engine.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.bench.arrange import Arrangement
    from cluster.bench.http import Target
    from cluster.bench.load import Progress
    from cluster.bench.sample import Sample

WARM_UP_NUMBER = 10_000_000
"""Warm-up prompts are numbered from here, so that none of them is met again."""
WARM_UP_USERS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run against every server."""

    arrangement: Arrangement
    concurrency: int | None = None
    """Closed loop with this many users; open loop where None."""
    search: Search | None = None
    rounds: int = 1
    warm_up: int = 4
    settings: Settings = field(default_factory=Settings)


@dataclass(slots=True)
class Measured:
    """One server's run."""

    url: str
    model: str
    notes: list[str]
    samples: list[Sample] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    """Attainment over rate, where goodput was searched for."""
    goodput_rps: float | None = None
    began_s: float = 0.0
    """When all was warm, by the clock on the wall."""

    def document(self) -> dict[str, Any]:
        """What `--json` prints for it."""
        found = figures(self.samples)
        if self.probes:
            found["goodput_rps"] = self.goodput_rps or 0.0
            found["probes"] = self.probes
        scales = [{"scale": s, "attainment": a} for s, a in attainment_over_scale(self.samples)]
        return {
            **found,
            "attainment_over_scale": scales,
            "url": self.url,
            "model": self.model,
            "notes": self.notes,
        }


class Bench:
    """Runs a plan; `watch` makes the progress that a stage of so many requests reports to."""

    def __init__(self, plan: Plan, watch: Callable[[str, int], Progress] | None = None) -> None:
        self._plan = plan
        self._watch = watch or (lambda _stage, _requests: Silent())

    async def run(self, targets: Sequence[Target]) -> list[Measured]:
        """Measures the first server and those it is compared with, in one run."""
        settings = replace(self._plan.settings, text=self._plan.arrangement.text)
        servers = [await connect(target, settings) for target in targets]
        seeded = f"prompt seed {settings.prompt_seed}"
        measured = [
            Measured(one.url, one.dialect.model, [*one.dialect.notes, seeded]) for one in servers
        ]
        try:
            for server in servers:
                await self._warm_up(server)
            for server, one in zip(servers, measured, strict=True):
                one.began_s = time.time()
                await self._search(server, one)
            if self._plan.search is None:
                await self._take_turns(servers, measured)
        finally:
            for server in servers:
                server.close()
        return measured

    async def _warm_up(self, server: Server) -> None:
        shapes = [one.turns[0] for one in self._plan.arrangement.conversations()]
        turns = [
            Turn(WARM_UP_NUMBER + place, shape.prompt_tokens, shape.output_tokens)
            for place, shape in enumerate(shapes[: self._plan.warm_up])
        ]
        load = [Conversation(0.0, (turn,)) for turn in turns]
        progress = self._watch(f"warm-up {server.url}", len(load))
        samples = await closed_loop(server, load, WARM_UP_USERS, progress)
        if samples and not any(one.finished for one in samples):
            raise TransportError(f"{server.url}: every warm-up request failed: {samples[0].error}")

    async def _take_turns(self, servers: Sequence[Server], measured: Sequence[Measured]) -> None:
        """Each round's slice goes to every server; who is first alternates."""
        conversations = self._plan.arrangement.conversations()
        rounds = min(self._plan.rounds, len(conversations))
        pairs = list(zip(servers, measured, strict=True))
        for number in range(rounds):
            part = _slice(conversations, number, rounds)
            for server, one in pairs if number % 2 == 0 else pairs[::-1]:
                stage = f"round {number + 1}/{rounds} {server.url}"
                one.samples += await self._once(server, part, stage, number)

    async def _once(
        self, server: Server, part: Sequence[Conversation], stage: str, number: int = 0
    ) -> list[Sample]:
        progress = self._watch(stage, sum(len(one.turns) for one in part))
        if self._plan.concurrency is not None:
            return await closed_loop(server, part, self._plan.concurrency, progress, number)
        return await open_loop(server, part, progress, number)

    async def _search(self, server: Server, one: Measured) -> None:
        """The samples of the best rate that held are the ones that are reported."""
        search = self._plan.search
        if search is None:
            return
        best_rps, probes = 0.0, count(1)

        async def attainment_at(rate_rps: float) -> float:
            nonlocal best_rps
            server.renew_prompts(next(probes))
            load = self._plan.arrangement.at_rate(rate_rps, search.probe_s)
            samples = await self._once(
                server, load.conversations(), f"{rate_rps:.3g}/s {server.url}"
            )
            share = sum(sample.met() for sample in samples) / len(samples)
            one.probes.append(_probe(rate_rps, share, samples))
            if not one.samples or (share >= search.attainment and rate_rps > best_rps):
                one.samples = samples
            if share >= search.attainment:
                best_rps = max(best_rps, rate_rps)
            return share

        one.goodput_rps = await find_goodput(search, attainment_at)
        one.probes.sort(key=lambda probe: float(probe["rate_rps"]))


def _probe(rate_rps: float, share: float, samples: Sequence[Sample]) -> dict[str, Any]:
    interval = share_interval(samples)
    return {"rate_rps": rate_rps, "attainment": share, "confidence": interval}


def _slice(conversations: Sequence[Conversation], number: int, rounds: int) -> list[Conversation]:
    """A contiguous share of the load, due from its own start."""
    start = len(conversations) * number // rounds
    end = len(conversations) * (number + 1) // rounds
    part = conversations[start:end]
    return [replace(one, due_s=one.due_s - part[0].due_s) for one in part]


def whole_document(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first server's figures, and those it was compared with under `vs`."""
    first, *others = documents
    return {**first, "vs": others} if others else first
