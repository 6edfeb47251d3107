#!/usr/bin/env python3
"""Prints how closely `tandem bench` reproduces the known latencies of a simulated server.

The server draws each request's latencies and keeps to them; in the second run it also stops
for a second. A generator that waited for answers before sending (closed loop, one user)
stands beside it, to show what coordinated omission would have hidden.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import socket
import sys
from pathlib import Path

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.bench.figures import figures
from cluster.bench.http import parse_target
from cluster.bench.load import Conversation, Silent, open_loop
from cluster.bench.server import Server, Settings, Turn, connect
from engine.errors import TransportError
from tests.cluster.bench.simulated import Behaviour, Latency, serve_forever

POINTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    worst = 0.0
    for stall_at in (None, options.requests // 3):
        worst = max(worst, run(options, Latency(stall_at=stall_at)))
    print(f"largest deviation {worst:.2%} (at most 2% wanted)")
    sys.exit(worst > 0.02)


def run(options: argparse.Namespace, latency: Latency) -> float:
    """The largest deviation of any percentile, after printing all of them."""
    port = free_port()
    server = multiprocessing.Process(
        target=serve_forever, args=(Behaviour(latency), port), daemon=True
    )
    server.start()
    try:
        due_s = arrivals(options.requests, options.rate)
        measured, cpu_share = uvloop.run(measure(port, due_s, options.tokens))
    finally:
        server.terminate()
        server.join()
    stalled = "no stall" if latency.stall_at is None else f"a stall of {latency.stall_s:g} s"
    print(f"{options.requests} requests at {options.rate:g}/s, {stalled}; "
          f"the generator used {cpu_share:.0%} of a core, send lag p99 "
          f"{measured['send_lag_s']['p99'] * 1e3:.2f} ms")  # fmt: skip
    return compare(measured, latency.expected(due_s, options.tokens), due_s)


def arrivals(requests: int, rate_rps: float) -> list[float]:
    rng = np.random.default_rng(1)
    return np.cumsum(rng.exponential(1 / rate_rps, requests)).tolist()


async def measure(port: int, due_s: list[float], tokens: int) -> tuple[dict, float]:
    server = await reach(port)
    load = [Conversation(due, (Turn(index, 64, tokens),)) for index, due in enumerate(due_s)]
    used_s, started_s = cpu_s(), asyncio.get_running_loop().time()
    samples = await open_loop(server, load, Silent())
    share = (cpu_s() - used_s) / (asyncio.get_running_loop().time() - started_s)
    server.close()
    return figures(samples), share


async def reach(port: int) -> Server:
    async with asyncio.timeout(30):
        while True:
            try:
                return await connect(parse_target(f"127.0.0.1:{port}"), Settings())
            except TransportError:
                await asyncio.sleep(0.05)


def compare(measured: dict, tokens_s: list[list[float]], due_s: list[float]) -> float:
    known = {
        "ttft_s": [moments[0] - due for moments, due in zip(tokens_s, due_s, strict=True)],
        "tpot_s": [(moments[-1] - moments[0]) / (len(moments) - 1) for moments in tokens_s],
        "e2e_s": [moments[-1] - due for moments, due in zip(tokens_s, due_s, strict=True)],
        "itl_s": [gap for moments in tokens_s for gap in np.diff(moments)],
    }
    worst = 0.0
    for name, values in known.items():
        for point, q in POINTS.items():
            truth = float(np.quantile(values, q))
            deviation = measured[name][point] / truth - 1
            worst = max(worst, abs(deviation))
            print(f"  {name:7} {point}  known {truth * 1e3:9.2f} ms  "
                  f"measured {measured[name][point] * 1e3:9.2f} ms  {deviation:+.2%}")  # fmt: skip
    return worst


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
