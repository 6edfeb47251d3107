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
from statistics import median
from typing import TYPE_CHECKING, Any

from cluster.bench.arrange import Arrangement, Synthetic, draw
from cluster.bench.http import parse_target
from cluster.bench.load import Silent
from cluster.bench.run import Bench, Plan
from cluster.bench.server import Settings
from cluster.profiling.processor_time import family_times, spent_between
from engine.errors import InstanceLost
from engine.messages import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.bench.load import Progress
    from cluster.bench.sample import Sample
    from cluster.profiling.processor_time import Thread

STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Loop:
    """Users of each instance who all ask at once, again and again."""

    users: int
    prompt_tokens: int
    output_tokens: int
    turns: int


LOOPS = (
    Loop(1, 64, 4, 24),
    Loop(8, 64, 4, 6),
    Loop(1, 16, 48, 3),
    Loop(4, 16, 48, 3),
    Loop(16, 16, 48, 3),
)
"""Short answers tell what a request costs, short prompts what a token does."""
HANDED_OFF = (Loop(1, 64, 4, 24),)


@dataclass(frozen=True, slots=True)
class Serving:
    model: str
    threads: int
    instances: tuple[int, ...]
    """Servers of so many mixed instances are measured one after another."""

    @property
    def hands_off(self) -> bool:
        """Whether a prefill instance beside a decode instance is measured, too."""
        return max(self.instances) > 1

    @property
    def loops(self) -> int:
        return len(self.instances) * len(LOOPS) + self.hands_off * len(HANDED_OFF)


def measure_serving(settings: Serving, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """As a profile lists them; `progress` is told how many loops are done."""
    entries: list[dict[str, Any]] = []
    for instances in settings.instances:
        with _server(settings, {"mixed": instances}) as server:
            for loop in LOOPS:
                entries.append(server.measure(loop, instances, len(entries)))
                progress(len(entries))
    if settings.hands_off:
        with _server(settings, {"prefill": 1, "decode": 1}) as server:
            for loop in HANDED_OFF:
                entry = server.measure(loop, 1, len(entries))
                entries.append({**entry, "handed_off": True})
                progress(len(entries))
    return entries


@dataclass(frozen=True, slots=True)
class _Server:
    url: str
    process: int
    computing: int
    """Threads of its instances, of which passes keep each busy."""

    def measure(self, loop: Loop, instances: int, number: int) -> dict[str, Any]:
        samples, doors_s = asyncio.run(self._run(loop, instances * loop.users, number))
        ttft_s = [one.ttft_s for one in samples if one.ttft_s is not None]
        tpot_s = [one.tpot_s for one in samples if one.tpot_s is not None]
        if len(tpot_s) < len(samples):
            raise InstanceLost("the server to be measured failed some requests")
        return {
            "instances": instances,
            "users": loop.users,
            "prompt_tokens": loop.prompt_tokens,
            "output_tokens": loop.output_tokens,
            "ttft_s": median(ttft_s),
            "tpot_s": median(tpot_s),
            "requests": len(samples),
            "doors_s": doors_s,
        }

    async def _run(self, loop: Loop, users: int, number: int) -> tuple[list[Sample], float]:
        """What the clients saw, and the processor time that went to all but engines."""
        recipe = Synthetic(
            requests=users * loop.turns,
            prompt_tokens=loop.prompt_tokens,
            output_tokens=loop.output_tokens,
        )
        settings = Settings(prompt_seed=number)
        plan = Plan(Arrangement(draw(recipe)), concurrency=users, settings=settings)
        before: dict[Thread, float] = {}

        def begins(_stage: str, _requests: int) -> Progress:
            """The last stage is the one that counts: those before it warm up."""
            before.clear()
            before.update(self._times())
            return Silent()

        (measured,) = await Bench(plan, begins).run([parse_target(self.url)])
        return measured.samples, spent_between(
            before, self._times(), without_busiest=self.computing
        )

    def _times(self) -> dict[Thread, float]:
        """Of the server and of its clients, which are here."""
        own = {(os.getpid(), 0): time.process_time()}
        return {**own, **family_times(self.process)}


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
            yield _Server(_url_of(server), server.pid, sum(pools.values()) * settings.threads)
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
