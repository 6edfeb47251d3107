"""What serving costs beyond passes: real servers of this model on this machine, under load.

Requests come as they do in service, while every instance logs its steps: passes take longer there
than one after another, and there is more to do between them.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.bench.arrange import Arrangement, Synthetic, draw
from cluster.bench.http import parse_target
from cluster.bench.run import Bench, Plan
from cluster.profiling.others import Others, least_disturbed
from cluster.profiling.speed import SpeedProbe, lengthened, speed_of
from cluster.profiling.steps import prompt_passes, steps_at_work
from engine.errors import InstanceLost
from engine.messages import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cluster.bench.run import Measured
    from cluster.bench.sample import Sample
    from cluster.profiling.one_rank import RankSettings
    from cluster.profiling.speed import Reading, Speed

STOP_S = 60.0
LOAD = Synthetic(prompt_tokens=96, output_tokens=24, spread=0.7)
LOAD_SHARES = (0.2, 0.4)
"""Of what an instance would serve that took its requests one by one."""
FEWEST_REQUESTS = 24
UNDISTURBED = 0.7
"""About so many of the requests at the lower rate find nobody before them."""


@dataclass(frozen=True, slots=True)
class Serving:
    rank: RankSettings
    instances: tuple[int, ...]
    """Servers of so many mixed instances are measured one after another."""
    max_length: int
    request_s: float
    """How long one of the load's median requests would take by itself."""
    copies: tuple[tuple[float, float], ...] = ()
    """(bytes, seconds) of KV that is handed off."""
    kv_bytes_per_token: int = 0
    load_s: float = 15.0
    """How long requests come at each rate."""
    rounds: int = 1
    """Servers take turns so often: a machine's pace goes up and down over minutes."""
    seed: int = 0
    """Of the requests in the first round; each has its own."""
    most_tries: int = 3
    """At a server beside which others took much of the machine."""

    def copy_s(self, tokens: int) -> float:
        if not self.copies:
            return 0.0
        sizes, seconds = zip(*self.copies, strict=True)
        return float(np.interp(tokens * self.kv_bytes_per_token, sizes, seconds))


@dataclass(frozen=True, slots=True)
class _Pools:
    """A server to be measured."""

    pools: Mapping[str, int]
    taking: int
    """Instances that take requests in."""
    handed_off: bool = False


def _servers(instances: Sequence[int]) -> tuple[_Pools, ...]:
    """Where several fit, a pair that hands KV off does so, too."""
    mixed = [_Pools({"mixed": count}, count) for count in instances]
    if max(instances, default=1) == 1:
        return tuple(mixed)
    return (*mixed, _Pools({"prefill": 1, "decode": 1}, 1, handed_off=True))


def loads_of(instances: Sequence[int], rounds: int) -> int:
    """How often it is told of what is done."""
    return rounds * len(_servers(instances)) * len(LOAD_SHARES)


def measure_serving(settings: Serving, progress: Callable[[int], None]) -> dict[str, Any]:
    """As a profile has it; `progress` is told under how many loads servers have been."""
    turns = product(range(settings.rounds), _servers(settings.instances))
    measured: list[_Measured] = []
    with SpeedProbe(settings.rank) as probe:
        for turn, pools in turns:
            done = len(measured) * len(LOAD_SHARES)
            loaded = partial(_go_on, progress, done)
            work = partial(_measure, pools, turn, probe, settings, loaded)
            measured.append(least_disturbed(work, settings.most_tries))
    speed = speed_of([reading for one in measured for reading in one.readings])
    at_work = [one.told(speed, settings) for one in measured]
    return {"at_work": at_work, "speed": speed.described()}


def _go_on(progress: Callable[[int], None], done: int, more: int) -> None:
    progress(done + more)


def _measure(
    pools: _Pools, turn: int, probe: SpeedProbe, settings: Serving, loaded: Callable[[int], None]
) -> _Measured:
    """One server, under one load after the other; `loaded` is told under how many it has been."""
    one, spans = _Measured(pools), []
    with tempfile.TemporaryDirectory() as logs:
        with _server(settings, pools, logs) as url:
            probe.readings()
            others, began_s = Others(), time.time()
            for place, share in enumerate(LOAD_SHARES, 1):
                rate_rps = share * pools.taking / settings.request_s
                load = _load(url, rate_rps, turn, settings)
                one.samples.append(load.samples)
                spans.append((load.began_s, time.time()))
                loaded(place)
            one.readings, one.others = probe.readings(), others.cores
        one.steps = steps_at_work(Path(logs), began_s)
        one.prompt_passes = prompt_passes(Path(logs), *spans[0])
    return one


@dataclass(slots=True)
class _Measured:
    """One server, told as if the machine had been as fast as in the mean over all of them."""

    pools: _Pools
    samples: list[list[Sample]] = field(default_factory=list)
    """At each rate."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    prompt_passes: tuple[int, float] = (0, 0.0)
    """In how many the first rate's prompts were, and how long in all."""
    readings: list[Reading] = field(default_factory=list)
    others: float = 0.0
    """Cores that other processes, and other guests of the host, took."""

    def told(self, mean: Speed, settings: Serving) -> dict[str, Any]:
        told: dict[str, Any] = {
            "handed_off": self.pools.handed_off,
            "other_cores": self.others,
            "steps": self.steps,
        }
        if self.pools.handed_off:
            told["handoff_s"] = _handoff_s([one for load in self.samples for one in load], settings)
        if self.pools.taking == 1:
            passes, passes_s = self.prompt_passes
            requests = len(self.samples[0])
            told["way_s"] = _way_s(self.samples[0], passes_s / requests)
            told["way_steps"] = passes / requests
        here: dict[str, Any] = lengthened(told, mean.slower_than(speed_of(self.readings)))
        return here


def _load(url: str, rate_rps: float, turn: int, settings: Serving) -> Measured:
    """Requests come at this rate, as in service; others in each turn."""
    room = settings.max_length // 2
    recipe = replace(
        LOAD,
        requests=max(ceil(rate_rps * settings.load_s), FEWEST_REQUESTS),
        rate_rps=rate_rps,
        longest_prompt=room,
        longest_output=room,
        seed=settings.seed + turn,
    )
    bench = Bench(Plan(Arrangement(draw(recipe))))
    (measured,) = asyncio.run(bench.run([parse_target(url)]))
    if not all(one.finished for one in measured.samples):
        raise InstanceLost("the server to be measured failed some requests")
    return measured


def _way_s(samples: list[Sample], passes_s: float) -> float:
    """What requests wait for besides passes with their prompt. A server's prefill is from the
    first of these until a gateway has the token; before it, the median of those counts that find
    nobody before them."""
    prefills_s = [(one.parts_s or {}).get("prefill") or 0.0 for one in samples]
    before_s = sorted(
        one.ttft_s - prefill_s
        for one, prefill_s in zip(samples, prefills_s, strict=True)
        if one.ttft_s is not None
    )
    return before_s[int(UNDISTURBED / 2 * len(before_s))] + max(fmean(prefills_s) - passes_s, 0.0)


def _handoff_s(samples: list[Sample], settings: Serving) -> float:
    """What a hand-off takes besides its copy."""
    longer_s = [
        transfer_s - settings.copy_s(one.prompt_tokens)
        for one in samples
        if (transfer_s := (one.parts_s or {}).get("transfer")) is not None
    ]
    return max(fmean(longer_s), 0.0) if longer_s else 0.0


@contextmanager
def _server(settings: Serving, served: _Pools, logs: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        rank = settings.rank
        counts = [(role.value, served.pools.get(role.value, 0)) for role in Role]
        named = ", ".join(f"{role}: {{instances: {count}}}" for role, count in counts)
        config.write(
            f"model: {rank.model}\ndevice: cpu\n"
            f"engine: {{dtype: {rank.dtype}, threads: {rank.threads}, "
            f"cache_prefixes: false, step_log: {logs}}}\n"
            f"pools: {{{named}}}\n"
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
