"""What serving costs beyond passes: closed loops against a real server of this model, here."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.bench.arrange import Arrangement, Synthetic, draw
from cluster.bench.http import parse_target
from cluster.bench.run import Bench, Plan
from cluster.bench.server import Settings
from cluster.profiling.passes import undisturbed
from engine.errors import InstanceLost
from placement.latency.serving_costs import Served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.bench.sample import Sample

USERS = (1, 4, 8, 16)
"""Of each instance, all of whom ask at once."""
TURNS = 4
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Serving:
    model: str
    threads: int
    instances: tuple[int, ...]
    """Servers of so many mixed instances are measured one after another."""

    @property
    def loops(self) -> int:
        return len(self.instances) * len(USERS)


def measure_serving(settings: Serving, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """As a profile lists them; `progress` is told how many loops are done."""
    entries: list[dict[str, Any]] = []
    for instances in settings.instances:
        with _server(settings, instances) as url:
            for users in USERS:
                samples = asyncio.run(_loop(url, instances * users, len(entries)))
                entries.append(_entry(instances, users, samples)._asdict())
                progress(len(entries))
    return entries


@contextmanager
def _server(settings: Serving, instances: int) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(
            f"model: {settings.model}\ndevice: cpu\n"
            f"engine: {{threads: {settings.threads}, cache_prefixes: false}}\n"
            f"pools: {{mixed: {{instances: {instances}}}}}\n"
        )
        config.flush()
        command = [sys.executable, "-m", "cluster", "serve", config.name]
        ports = ["--http-port", "0", "--grpc-port", "0"]
        server = subprocess.Popen(  # noqa: S603 - our own command
            [*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            yield _url_of(server)
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


async def _loop(url: str, users: int, number: int) -> list[Sample]:
    recipe = Synthetic(
        requests=users * TURNS, prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS
    )
    plan = Plan(Arrangement(draw(recipe)), concurrency=users, settings=Settings(prompt_seed=number))
    (measured,) = await Bench(plan).run([parse_target(url)])
    return measured.samples


def _entry(instances: int, users: int, samples: list[Sample]) -> Served:
    ttft_s = [one.ttft_s for one in samples if one.ttft_s is not None]
    tpot_s = [one.tpot_s for one in samples if one.tpot_s is not None]
    if len(tpot_s) < len(samples):
        raise InstanceLost("the server to be measured failed some requests")
    return Served(
        instances,
        users,
        PROMPT_TOKENS,
        OUTPUT_TOKENS,
        undisturbed(ttft_s),
        undisturbed(tpot_s),
    )
