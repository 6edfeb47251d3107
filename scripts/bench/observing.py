#!/usr/bin/env python3
"""Prints what observing costs: streaming through the HTTP door with all observers and with none.

One process holds two gateways over fake instances, one watched and one not; another streams
from them in turns. Throughput of each turn, and the processor time a token takes, which does
not depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import uvicorn
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.bench.figures import figures
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

TICKS_S = os.sysconf("SC_CLK_TCK")
NAMES = ("prefill-0", "decode-0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    ports = [free_port(), free_port()]
    server = multiprocessing.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    try:
        uvloop.run(compare(options, ports, server.pid or 0))
    finally:
        server.terminate()
        server.join()


def free_port() -> int:
    with listen("127.0.0.1", 0, "port") as probe:
        return int(probe.getsockname()[1])


def serve(ports: list[int]) -> None:
    uvloop.run(serve_both(ports))


async def serve_both(ports: list[int]) -> None:
    watching = Watching(Config(), SystemClock())
    async with running(*NAMES, observers=watching.observers()) as on, running(*NAMES) as off:
        doors = [
            HttpDoor(on.gateway, metrics=watching.metrics.page, extra=watching.routes(None)),
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
    servers = [await reach(port) for port in ports]
    rates: list[list[float]] = [[], []]
    costs: list[list[float]] = [[], []]
    for number in range(options.rounds + 1):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for place in order:
            rate, cost_s = await turn(servers[place], options, pid)
            if number > 0:  # the first turn of each only warms up
                rates[place].append(rate)
                costs[place].append(cost_s)
    for name, rate, cost in zip(("observed", "not observed"), rates, costs, strict=True):
        print(f"{name:13} {statistics.median(rate):9.0f} tokens/s  "
              f"{statistics.median(cost) * 1e6:6.1f} us of processor time a token")  # fmt: skip
    print(f"observing costs {gap(rates[1], rates[0]):+.1%} of throughput and "
          f"{-gap(costs[1], costs[0]):+.1%} of processor time (at most 3% wanted)")  # fmt: skip


def gap(off: list[float], on: list[float]) -> float:
    """How much less the second is, pair by pair."""
    return float(np.median(1 - np.array(on) / np.array(off)))


async def turn(server: Server, options: argparse.Namespace, pid: int) -> tuple[float, float]:
    """Tokens per second, and the server's processor seconds per token."""
    load = [
        Conversation(0.0, (Turn(number, 16, options.tokens),)) for number in range(options.requests)
    ]
    before_s = cpu_s(pid)
    samples = await closed_loop(server, load, options.users, Silent())
    tokens = options.requests * options.tokens
    return figures(samples)["throughput_tokens_s"], (cpu_s(pid) - before_s) / tokens


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


async def reach(port: int) -> Server:
    async with asyncio.timeout(60):
        while True:
            try:
                return await connect(parse_target(f"127.0.0.1:{port}"), Settings(text=True))
            except TransportError:
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
