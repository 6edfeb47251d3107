#!/usr/bin/env python3
"""Goodput beside vLLM: the highest rate at which enough requests meet both targets.

    python scripts/bench/goodput.py run SERVER --checkpoint DIR --into DIR --rates 4,5,6
        [--ttft 1.0] [--tpot 0.04] [--seconds 40] [--rounds 1]
        [--vllm PYTHON] [--vllm-args "..."] [--name NAME] [+ SERVER --rates 2,3 ...]
    python scripts/bench/goodput.py table --into DIR [--attainment 0.9]

`run` starts one server on the same two cores as its client, puts the same requests to it at each
rate, writes one file a rate and stops it. Servers joined by + take turns, round by round, so that
a machine whose speed drifts drifts for all of them; what is not said of a later one is as for the
first. vLLM takes long to start and little while idle, so it stays up between its turns; Tandem is
started for each of its own. `table` puts all files of a folder together. SERVER is tandem or vllm,
then -mixed (one instance on two threads), -2x1 (two instances of a thread each) or -split (tandem
only: one prefill beside one decode instance). Requests are drawn as Poisson arrivals with lognormal
lengths: prompts of 256 tokens in the median and at most 1,024, outputs of 64 and at most 256.
Latencies count from the moment a request was due. No server caches prefixes. Where a hypervisor
takes processors away, a gap in which it took one is also counted without the time it took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import uvloop
import yaml

from cluster.bench.arrange import Arrangement
from cluster.bench.http import parse_target
from cluster.bench.load import Silent, closed_loop, open_loop
from cluster.bench.server import Settings, connect
from placement.workload import Workload
from scripts.bench.attainment import bounded, crossing, lognormal, quantiles
from scripts.bench.taken import watched_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.bench.load import Conversation
    from cluster.bench.sample import Sample
    from cluster.bench.server import Server
    from scripts.bench.taken import Taken

ROOT = Path(__file__).resolve().parents[2]
POOLS = {"mixed": {"mixed": 1}, "2x1": {"mixed": 2}, "split": {"prefill": 1, "decode": 1}}
CORES = {"mixed": ("0,1",), "2x1": ("0", "1")}
"""Of vLLM's processes."""
VLLM_PORT = 8100
TOGETHER = "+"
START_S, STOP_S = 150.0, 30.0
WARM_UP_REQUESTS, WARM_UP_USERS = 24, 8
MEASURED_FROM = 100_000
"""Prompts are numbered; the warm-up's are below this."""
ROUNDS_APART = 1000
"""Of their seeds, and of the prompts that warm up."""
GAP_LIMIT_S = 0.1


@dataclass(frozen=True)
class Outcome:
    ttft_s: float | None
    tpot_s: float | None
    longest_gap_s: float
    longest_own_gap_s: float
    """Without what the hypervisor took of the processor that it took most of."""
    error: str | None

    def met(self, ttft_s: float, tpot_s: float) -> bool:
        if self.ttft_s is None or self.ttft_s > ttft_s:
            return False
        return self.tpot_s is None or self.tpot_s <= tpot_s


@dataclass
class Contender:
    """One of the servers that take turns, and what its requests came to at each rate."""

    options: argparse.Namespace
    urls: list[str] = field(default_factory=list)
    """Of one that stays up."""
    outcomes: dict[float, list[Outcome]] = field(default_factory=lambda: defaultdict(list))


def main() -> None:
    first, *others = parse(sys.argv[1:])
    if first.action == "table":
        print_table(read_runs(first.into), first.attainment)
        return
    first.into.mkdir(parents=True, exist_ok=True)
    contenders = [Contender(options) for options in (first, *others)]
    with ExitStack() as staying:
        for contender in contenders:
            if contender.options.server.startswith("vllm"):
                contender.urls = staying.enter_context(vllm(contender.options))
        for number in range(first.rounds):
            for contender in contenders:
                take_turn(contender, number)


def take_turn(contender: Contender, number: int) -> None:
    with ExitStack() as stack:
        urls = contender.urls or stack.enter_context(tandem(contender.options))
        uvloop.run(measure(contender, urls, number))


def parse(arguments: Sequence[str]) -> list[argparse.Namespace]:
    """What was said of each server; of a later one it may be little."""
    apart = [list(group) for joins, group in groupby(arguments, TOGETHER.__eq__) if not joins]
    found = [parser({}).parse_args(apart[0] if apart else [])]
    for said in apart[1:]:
        known = {**vars(found[0]), "port": found[-1].port + len(CORES["2x1"])}
        found.append(parser(known).parse_args(["run", *said]))
    return found


def parser(known: dict[str, Any]) -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = whole.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run")
    servers = [f"tandem-{shape}" for shape in POOLS] + [f"vllm-{shape}" for shape in CORES]
    run.add_argument("server", choices=servers)
    run.add_argument("--checkpoint", type=Path, required=not known)
    run.add_argument("--ttft", type=float, default=1.0)
    run.add_argument("--tpot", type=float, default=0.04)
    run.add_argument("--seconds", type=float, default=40.0, help="of arrivals, at each rate")
    run.add_argument("--rounds", type=int, default=1, help="each with requests of its own")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--vllm", type=Path, help="the Python of an environment that has vLLM")
    run.add_argument("--vllm-preload", default="", help="libraries it is to be started with")
    run.add_argument("--into", type=Path, required=not known)
    run.set_defaults(**{"port": VLLM_PORT, **known})
    run.add_argument("--rates", type=rates, required=True)
    run.add_argument("--name", default=None, help="what the table calls it; SERVER if not given")
    run.add_argument("--vllm-args", default="", help="added to vLLM's own")
    run.add_argument("--set", action="append", default=[], help="Tandem config, a.b.c=VALUE")
    table = actions.add_parser("table")
    table.add_argument("--into", type=Path, required=True)
    table.add_argument("--attainment", type=float, default=0.9)
    return whole


def rates(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


# The load.


def draw(rate_rps: float, seconds: float, seed: int) -> Workload:
    """The same seed gives the same lengths and, stretched, the same gaps at every rate."""
    rng = random.Random(seed)
    rows: list[tuple[float, int, int]] = []
    now_s = 0.0
    while True:
        prompt, output = lognormal(rng, 256, 0.8, 16, 1024), lognormal(rng, 64, 0.7, 4, 256)
        now_s += rng.expovariate(1.0) / rate_rps
        if now_s > seconds:
            break
        rows.append((now_s, prompt, output))
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(np.array(arrival_s), np.array(prompts), np.array(outputs))


async def measure(contender: Contender, urls: Sequence[str], number: int) -> None:
    """One round; each rate's file holds all rounds so far."""
    options = contender.options
    servers = [await connect(parse_target(url, None), Settings()) for url in urls]
    warm = conversations(draw(1.0, WARM_UP_REQUESTS, options.seed + 1), number * ROUNDS_APART)
    for server in servers:
        await closed_loop(server, warm, WARM_UP_USERS, Silent())
    for place, rate in enumerate(options.rates, number * len(options.rates) + 1):
        drawn = draw(rate, options.seconds, options.seed + number * ROUNDS_APART)
        async with watched_host() as taken:
            samples = await put(servers, conversations(drawn, place * MEASURED_FROM))
        contender.outcomes[rate] += [outcome(one, taken) for one in samples]
        write(options, rate, contender.outcomes[rate])
    for server in servers:
        server.close()


def conversations(load: Workload, first_number: int) -> list[Conversation]:
    """Numbered so that no prompt is ever repeated."""
    drawn = Arrangement(load).conversations()
    return [
        replace(one, turns=tuple(replace(t, index=t.index + first_number) for t in one.turns))
        for one in drawn
    ]


async def put(servers: Sequence[Server], load: Sequence[Conversation]) -> list[Sample]:
    """Servers take turns."""
    shares = [load[place :: len(servers)] for place in range(len(servers))]
    runs = [
        open_loop(server, share, Silent()) for server, share in zip(servers, shares, strict=True)
    ]
    return [sample for samples in await asyncio.gather(*runs) for sample in samples]


def outcome(sample: Sample, taken: Taken) -> Outcome:
    longest = max(sample.gaps_s, default=0.0)
    own = [end - start - taken.between(start, end) for start, end in pairwise(sample.token_s)]
    return Outcome(sample.ttft_s, sample.tpot_s, longest, max(own, default=0.0), sample.error)


def name_of(options: argparse.Namespace) -> str:
    return str(options.name or options.server)


def write(options: argparse.Namespace, rate: float, outcomes: list[Outcome]) -> None:
    targets = None if options.server.startswith("vllm") else [options.ttft, options.tpot]
    name = name_of(options)
    document = {"server": name, "targets": targets, "rate_rps": rate}
    document["requests"] = [asdict(one) for one in outcomes]
    suffix = "" if targets is None else f"-{options.ttft:g}s-{options.tpot * 1000:g}ms"
    path = options.into / f"{name}{suffix}-r{rate:g}.json"
    path.write_text(json.dumps(document))
    print(describe(document, options.ttft, options.tpot), flush=True)


# The servers.


@contextmanager
def tandem(options: argparse.Namespace) -> Iterator[list[str]]:
    from cluster.config import set_value

    shape = options.server.removeprefix("tandem-")
    pools = {role: {"instances": POOLS[shape].get(role, 0)} for role in ("prefill", "decode")}
    pools["mixed"] = {"instances": POOLS[shape].get("mixed", 0)}
    threads = 2 if shape == "mixed" else 1
    config: dict[str, Any] = {
        "model": str(options.checkpoint),
        "device": "cpu",
        "pools": pools,
        "slo": {"ttft_s": options.ttft, "tpot_s": options.tpot},
        "engine": {"threads": threads, "cache_prefixes": False},
    }
    for setting in options.set:
        path, _, value = setting.partition("=")
        set_value(config, path, yaml.safe_load(value))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "cluster", "serve", str(file)]
        command += ["--http-port", "0", "--grpc-port", "0"]
        log = (options.into / f"{name_of(options)}.log").open("a")
        with log, running(command, log, {}) as server:
            assert server.stdout is not None
            found = re.match(r"ready http=(\S+)", server.stdout.readline())
            if found is None:
                raise SystemExit(f"{name_of(options)} did not start: see {log.name}")
            yield [found[1]]


@contextmanager
def vllm(options: argparse.Namespace) -> Iterator[list[str]]:
    if options.vllm is None:
        raise SystemExit("--vllm PYTHON is needed")
    urls = []
    with ExitStack() as stack:
        for place, cores in enumerate(CORES[options.server.removeprefix("vllm-")]):
            port = options.port + place
            command = [str(options.vllm.with_name("vllm")), "serve", str(options.checkpoint)]
            command += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port)]
            command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"]
            command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
            command += shlex.split(options.vllm_args)
            log = stack.enter_context((options.into / f"vllm-{port}.log").open("w"))
            environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"}
            environment["LD_PRELOAD"] = options.vllm_preload
            stack.enter_context(running(command, log, environment))
            urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            wait_for(url)
        yield urls


@contextmanager
def running(command: list[str], log: Any, environment: dict[str, str]) -> Iterator[Any]:
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE if command[1] == "-m" else log,
        stderr=log,
        text=True,
        env={**os.environ, **offline, **environment},
    )
    try:
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url: str) -> None:
    """curl knows how to wait for a server."""
    limit = ("--retry-connrefused", "--retry-delay", "1", "--retry-max-time", f"{START_S:g}")
    command = ["curl", "-sf", "-o", os.devnull, "--retry", f"{START_S:g}", *limit, f"{url}/health"]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{url} did not come up within {START_S:g} s")


# The table.


def read_runs(folder: Path) -> list[dict[str, Any]]:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(runs, key=lambda run: (run["server"], run["rate_rps"]))


def print_table(runs: list[dict[str, Any]], wanted: float) -> None:
    targets = sorted({tuple(run["targets"]) for run in runs if run["targets"]})
    for ttft_s, tpot_s in targets:
        print(f"TTFT {ttft_s:g} s, TPOT {tpot_s * 1000:g} ms, {wanted:.0%} of the requests")
        fitting = [run for run in runs if run["targets"] in (None, [ttft_s, tpot_s])]
        best: dict[str, float] = {}
        for name in dict.fromkeys(run["server"] for run in fitting):
            mine = [run for run in fitting if run["server"] == name]
            for run in mine:
                print("  " + describe(run, ttft_s, tpot_s))
            points = [(run["rate_rps"], share_met(run, ttft_s, tpot_s)) for run in mine]
            goodput = crossing(points, wanted)
            print(f"  {name}: goodput {bounded(points, wanted)} requests/s")
            peer = name.split("-")[0]
            best[peer] = max(best.get(peer, 0.0), goodput)
        if best.get("vllm") and best.get("tandem"):
            print(f"  tandem / vllm = {best['tandem'] / best['vllm']:.2f}")


def outcomes_of(run: dict[str, Any]) -> list[Outcome]:
    return [Outcome(**one) for one in run["requests"]]


def share_met(run: dict[str, Any], ttft_s: float, tpot_s: float) -> float:
    outcomes = outcomes_of(run)
    return sum(one.met(ttft_s, tpot_s) for one in outcomes) / len(outcomes)


def describe(run: dict[str, Any], ttft_s: float, tpot_s: float) -> str:
    outcomes = outcomes_of(run)
    finished = [one for one in outcomes if one.error is None]
    smooth = sum(one.longest_gap_s < GAP_LIMIT_S for one in finished)
    own = sum(one.longest_own_gap_s < GAP_LIMIT_S for one in finished)
    ttfts = [one.ttft_s for one in outcomes if one.ttft_s is not None]
    tpots = [one.tpot_s for one in outcomes if one.tpot_s is not None]
    failed = len(outcomes) - len(finished)
    return (
        f"{run['server']:<14} {run['rate_rps']:>5.2f}/s met {share_met(run, ttft_s, tpot_s):6.1%}  "
        f"ttft p50/p90 {quantiles(ttfts)} ms  tpot p50/p90 {quantiles(tpots)} ms  "
        f"gaps < 100 ms in {smooth / len(outcomes):6.1%} ({own / len(outcomes):.1%} without what "
        f"the host took)  requests {len(outcomes)} failed {failed}"
    )


if __name__ == "__main__":
    main()
