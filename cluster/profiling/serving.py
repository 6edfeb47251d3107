"""What serving costs beyond passes: closed loops against a real server of this model, here."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.bench.arrange import Arrangement, Synthetic, draw
from cluster.bench.http import parse_target
from cluster.bench.load import Silent
from cluster.bench.run import Bench, Plan
from cluster.bench.server import Settings
from cluster.profiling.processor_time import Thread, family_times, spent_between
from engine.errors import InstanceLost
from engine.messages import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.bench.load import Progress
    from cluster.bench.sample import Sample
    from cluster.profiling.processor_time import Spent

STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Loop:
    """Users of each instance who all ask at once, again and again."""

    users: int
    prompt_tokens: int
    output_tokens: int
    turns: int
    """At least."""


LOOPS = (
    Loop(1, 64, 4, 24),
    Loop(1, 256, 4, 12),
    Loop(8, 64, 4, 6),
    Loop(1, 16, 48, 3),
    Loop(4, 16, 48, 3),
    Loop(16, 16, 48, 3),
)
"""Short answers tell what a request costs, short prompts what a token does."""
HANDED_OFF = (Loop(1, 64, 4, 24), Loop(1, 16, 48, 3))
"""Like those of a server that hands nothing off, to be compared with them."""


@dataclass(frozen=True, slots=True)
class Serving:
    model: str
    threads: int
    instances: tuple[int, ...]
    """Servers of so many mixed instances are measured one after another."""
    max_length: int
    lasting_s: float = 2.0
    """A loop takes more turns until it takes about so long."""

    @property
    def hands_off(self) -> bool:
        """Whether a prefill instance beside a decode instance is measured, too."""
        return max(self.instances) > 1

    @property
    def fitting(self) -> list[Loop]:
        return [one for one in LOOPS if one.prompt_tokens + one.output_tokens <= self.max_length]

    @property
    def loops(self) -> int:
        return len(self.instances) * len(self.fitting) + self.hands_off * len(HANDED_OFF)


def measure_serving(settings: Serving, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """As a profile lists them; `progress` is told how many loops are done."""
    entries: list[dict[str, Any]] = []
    for instances in settings.instances:
        with _server(settings, {"mixed": instances}) as server:
            for loop in settings.fitting:
                entries.append(server.measure(loop, instances, len(entries)))
                progress(len(entries))
    if settings.hands_off:
        with _server(settings, {"prefill": 1, "decode": 1}) as server:
            for loop in HANDED_OFF:
                entry = server.measure(loop, 1, len(entries))
                entries.append({**entry, "handed_off": True})
                progress(len(entries))
    return entries


class _Span(Silent):
    """From the first request on: what is prepared before it counts for nothing."""

    def __init__(self) -> None:
        self.began_s: float | None = None
        self.client_s = 0.0

    def sent(self) -> None:
        if self.began_s is None:
            self.began_s, self.client_s = time.perf_counter(), time.process_time()


class _Run(NamedTuple):
    samples: list[Sample]
    lasted_s: float
    spent: Spent


@dataclass(frozen=True, slots=True)
class _Server:
    url: str
    process: int
    threads: int
    """Of each instance, of which passes keep each busy."""
    lasting_s: float

    def measure(self, loop: Loop, instances: int, number: int) -> dict[str, Any]:
        users = instances * loop.users
        run = asyncio.run(self._run(loop, users, loop.turns, number))
        if run.lasted_s < self.lasting_s:
            turns = ceil(loop.turns * self.lasting_s / run.lasted_s)
            run = asyncio.run(self._run(loop, users, turns, number))
        ttft_s = [one.ttft_s for one in run.samples if one.ttft_s is not None]
        tpot_s = [one.tpot_s for one in run.samples if one.tpot_s is not None]
        told_s = [(one.parts_s or {}).get("prefill") for one in run.samples]
        prefill_s = [one for one in told_s if one is not None]
        if len(tpot_s) < len(run.samples) or not prefill_s:
            raise InstanceLost("the server to be measured failed some requests")
        return {
            "instances": instances,
            "users": loop.users,
            "prompt_tokens": loop.prompt_tokens,
            "output_tokens": loop.output_tokens,
            "ttft_s": median(ttft_s),
            "tpot_s": median(tpot_s),
            "prefill_s": median(prefill_s),
            "requests": len(run.samples),
            "passes_s": run.spent.passes_s / self.threads,
            "loops_s": run.spent.loops_s,
            "doors_s": run.spent.doors_s,
        }

    async def _run(self, loop: Loop, users: int, turns: int, number: int) -> _Run:
        """What the clients saw, and what processor time went where."""
        recipe = Synthetic(
            requests=users * turns,
            prompt_tokens=loop.prompt_tokens,
            output_tokens=loop.output_tokens,
        )
        settings = Settings(prompt_seed=number)
        plan = Plan(Arrangement(draw(recipe)), concurrency=users, settings=settings)
        span = _Span()
        before: dict[Thread, float] = {}

        def begins(_stage: str, _requests: int) -> Progress:
            """The last stage is the one that counts: those before it warm up."""
            nonlocal span, before
            span, before = _Span(), family_times(self.process)
            return span

        (measured,) = await Bench(plan, begins).run([parse_target(self.url)])
        client = Thread(os.getpid(), 0, "client")
        assert span.began_s is not None
        lasted_s = time.perf_counter() - span.began_s
        after = {client: time.process_time(), **family_times(self.process)}
        spent = spent_between({**before, client: span.client_s}, after)
        return _Run(measured.samples, lasted_s, spent)


@contextmanager
def _server(settings: Serving, pools: dict[str, int]) -> Iterator[_Server]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        counts = [(role.value, pools.get(role.value, 0)) for role in Role]
        named = ", ".join(f"{role}: {{instances: {count}}}" for role, count in counts)
        config.write(
            f"model: {settings.model}\ndevice: cpu\n"
            f"engine: {{threads: {settings.threads}, cache_prefixes: false}}\n"
            f"pools: {{{named}}}\n"
        )
        config.flush()
        command = [sys.executable, "-m", "cluster", "serve", config.name]
        ports = ["--http-port", "0", "--grpc-port", "0"]
        server = subprocess.Popen(  # noqa: S603 - our own command
            [*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            yield _Server(_url_of(server), server.pid, settings.threads, settings.lasting_s)
        finally:
            server.terminate()
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _url_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        found = re.match(r"ready http=(\S+)", line)
        if found:
            return found[1]
    raise InstanceLost(f"the server to be measured ended with status {server.wait()}")
