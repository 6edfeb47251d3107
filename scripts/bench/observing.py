#!/usr/bin/env python3
"""Prints what observing costs: streaming through the HTTP door with all observers and with none.

One process holds two gateways over fake instances, one watched and one not; another streams from
them in short slices that take turns (ABBA), so that whatever else the machine does falls on both
alike. Each pair of slices is one comparison, of the wall rate and of the server's processor time
for each token; their medians are told with 95% bootstrap intervals.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import uvicorn
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.bench.figures import bootstrap
from cluster.bench.http import parse_target
from cluster.bench.load import Conversation, Silent, closed_loop
from cluster.bench.server import Server, Settings, Turn, connect
from cluster.config import Config
from cluster.doors.both import listen
from cluster.doors.http import HttpDoor
from cluster.watching.everything import Watching
from engine.clock import SystemClock
from engine.errors import TransportError
from tests.cluster.serving import running

NAMES = ("prefill-0", "decode-0")
WARM_UP_SLICES = 2
PROCESS_CLOCK = 2
"""Of Linux's clock ids: the processor time of all threads of a process, in nanoseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="of one slice")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--null", action="store_true", help="watch neither: what noise remains")
    options = parser.parse_args()
    ports = [free_port(), free_port()]
    server = multiprocessing.Process(
        target=serve, args=(ports,), kwargs={"null": options.null}, daemon=True
    )
    server.start()
    try:
        uvloop.run(compare(options, ports, server.pid or 0))
    finally:
        server.terminate()
        server.join()


def free_port() -> int:
    with listen("127.0.0.1", 0, "port") as probe:
        return int(probe.getsockname()[1])


def serve(ports: list[int], *, null: bool) -> None:
    uvloop.run(serve_both(ports, null=null))


async def serve_both(ports: list[int], *, null: bool) -> None:
    watching = Watching(Config(), SystemClock())
    observers = () if null else watching.observers()
    async with running(*NAMES, observers=observers) as on, running(*NAMES) as off:
        page = watching.routes(watching.whole(on.gateway), None)
        doors = [
            HttpDoor(on.gateway, metrics=watching.metrics.page, extra=page),
            HttpDoor(off.gateway),
        ]
        await asyncio.gather(
            *(
                uvicorn.Server(
                    uvicorn.Config(one.app, port=port, log_level="error", lifespan="off")
                ).serve()
                for one, port in zip(doors, ports, strict=True)
            )
        )


async def compare(options: argparse.Namespace, ports: list[int], pid: int) -> None:
    on, off = [await reach(port) for port in ports]
    for server in (on, off) * WARM_UP_SLICES:
        await slice_of(server, options, pid)
    slower: list[float] = []
    dearer: list[float] = []
    costs_s: list[list[float]] = [[], []]
    for number in range(options.pairs):
        order = (on, off) if number % 2 == 0 else (off, on)
        took = {server.url: await slice_of(server, options, pid) for server in order}
        (on_s, on_cpu_s), (off_s, off_cpu_s) = took[on.url], took[off.url]
        slower.append(on_s / off_s - 1)
        dearer.append(on_cpu_s / off_cpu_s - 1)
        costs_s[0].append(on_cpu_s)
        costs_s[1].append(off_cpu_s)
    tokens = options.requests * options.tokens
    for name, cost_s in zip(("observed", "not observed"), costs_s, strict=True):
        print(f"{name:13} {np.median(cost_s) / tokens * 1e6:6.2f} us of processor time a token")
    print(f"{options.pairs} pairs of slices of {tokens} tokens, {options.users} streams at a time")
    print(f"throughput lost:       {told(slower)}")
    print(f"processor time added:  {told(dearer)}   (at most 3% wanted)")


def told(gaps: list[float]) -> str:
    low, high = bootstrap(np.array(gaps), np.median, seed=0)
    return f"{np.median(gaps):+.2%}, 95% interval {low:+.2%} to {high:+.2%}"


async def slice_of(server: Server, options: argparse.Namespace, pid: int) -> tuple[float, float]:
    """Seconds that the slice took, and processor seconds of the server."""
    load = [
        Conversation(0.0, (Turn(number, 16, options.tokens),)) for number in range(options.requests)
    ]
    used_s, began_s = cpu_s(pid), time.perf_counter()
    samples = await closed_loop(server, load, options.users, Silent())
    took_s, used_s = time.perf_counter() - began_s, cpu_s(pid) - used_s
    assert all(one.output_tokens == options.tokens for one in samples), "every token came"
    return took_s, used_s


def cpu_s(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | PROCESS_CLOCK)


async def reach(port: int) -> Server:
    async with asyncio.timeout(60):
        while True:
            try:
                return await connect(parse_target(f"127.0.0.1:{port}"), Settings(text=True))
            except TransportError:
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
