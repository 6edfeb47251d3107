"""Live migration between two real hosts, beside stop-and-copy and recompute in the same run.

    python scripts/bench/migration.py [--shape 120m] [--contexts 512 2048 8192 16384]
        [--transports shared_memory nixl] [--modes live stop-and-copy] [--rounds 12]
        [--no-recompute] [--laps 6] [--json]

Each host decodes 15 other sequences on a core of its own, fresh ones for each move. A sequence of
each context in turn joins the source, decodes, moves, and decodes on at the target. The gap is what
its reader sees: from the source's last token to the target's first. The pause is that gap less an
ordinary step of the target's batch of 16 with the sequence in it. Most of it is the wait for the
target to end the step it is in: `joined` is from the source's last token to the end of that step,
so `pause` less `joined` is how much longer the first step took than those after it. A wait is
uniform over a step (`beside`: the target's without the sequence), so means over the middle half of
the rounds are told, that of the pause with its standard error.
Before a transport's live migrations, `--laps` moves each way of PASSING_TOKENS tell how much they
slow the other sequences down (see migration_slowdown.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.blocks import blocks_for
from engine.messages import Role
from engine.request import Request, Sampling
from engine.slo import Slo
from placement.routing.router import Route
from scripts.bench.migration_slowdown import RESAMPLES, slow_down
from scripts.bench.two_hosts import Gateway, HostPlan, HostProcess, start, stop, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.bench.two_hosts import Stream

BLOCK_TOKENS, NEIGHBOURS, NEIGHBOUR_TOKENS = 16, 15, 64
NEIGHBOUR_BLOCKS = 96
"""Room for each neighbour to go on decoding through one move."""
LAP_BLOCKS = 20
"""More for each lap of the slow-down."""
SOURCE, TARGET = "decode-0", "decode-1"
MODES = {"live": 8, "stop-and-copy": 0}
"""Rounds that a migration may copy while the source still decodes."""
SETTLE_TOKENS = 24
BESIDE_STEPS = 9
PASSING_TOKENS = 4096
"""Context of what moves for the slow-down: long enough for a copy to take many steps."""
PATIENT = Slo(600.0, 10.0)
HEADER = """{shape} in bf16, a batch of 16 on either side, ms
transport      mode           context     MB         pause  joined  beside     gap    step  total"""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        write_model(options.shape, Path(directory) / "model")
        figures: dict[str, Any] = {"shape": options.shape, "runs": [], "slow_down": {}}
        if not options.json:
            print(HEADER.format(shape=options.shape))
        for transport in options.transports:
            for mode in options.modes:
                rows, slowed = asyncio.run(run(options, Path(directory), transport, mode))
                figures["runs"] += rows
                figures["slow_down"] |= slowed
    if options.json:
        print(json.dumps(figures, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="120m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--transports", nargs="+", default=["shared_memory", "nixl"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-recompute", dest="recompute", action="store_false")
    parser.add_argument("--laps", type=int, default=6, help="moves each way for the slow-down")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


async def run(
    options: argparse.Namespace, directory: Path, transport: str, mode: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All contexts over one pair of hosts, and how live moves slow their neighbours down."""
    sockets = directory / f"{transport}-{mode}"
    sockets.mkdir()
    blocks = blocks_for(max(options.contexts) + 1024, BLOCK_TOKENS)
    blocks += NEIGHBOURS * (NEIGHBOUR_BLOCKS + LAP_BLOCKS * options.laps)
    plans = [
        HostPlan(
            name,
            Role.MIXED,
            str(directory / "model"),
            str(sockets),
            blocks,
            transport=transport,
            max_rounds=MODES[mode],
            core=core,
        )
        for core, name in enumerate((SOURCE, TARGET))
    ]
    gateway = Gateway(sockets)
    hosts = start(plans, gateway.link.address)
    gateway.meet(hosts)
    slowed: dict[str, Any] = {}
    if options.laps and mode == "live":
        slowed[transport] = await slow_neighbours(gateway, hosts, options)
        if not options.json:
            show_slow_down(transport, slowed[transport])
    rows = await measure(gateway, hosts, options)
    for context, row in rows.items():
        row |= {"transport": transport, "mode": mode, "context": context}
        if options.recompute and transport == options.transports[0] and mode == "live":
            row["recompute_s"] = await recompute(gateway, context)
        if not options.json:
            show(row)
    stop(hosts)
    gateway.link.close()
    return list(rows.values()), slowed


async def slow_neighbours(
    gateway: Gateway, hosts: list[HostProcess], options: argparse.Namespace
) -> dict[str, Any]:
    neighbours = await surround(gateway, "passing")
    passing = min(PASSING_TOKENS, max(options.contexts))
    found = await slow_down(gateway, hosts, partial(ask, tokens=passing), options.laps)
    for name in neighbours:
        gateway.abort(name)
    return found


async def measure(
    gateway: Gateway, hosts: list[HostProcess], options: argparse.Namespace
) -> dict[int, dict[str, Any]]:
    """Contexts take turns, so that a machine whose speed drifts drifts for all of them."""
    laps: dict[int, list[dict[str, float]]] = {context: [] for context in options.contexts}
    for number in range(options.rounds + 1):
        for context, found in laps.items():
            neighbours = await surround(gateway, f"{context}-{number}")
            found.append(await lap(gateway, hosts, context, number))
            for name in neighbours:
                gateway.abort(name)
    return {context: summary(found[1:]) for context, found in laps.items()}


def summary(laps: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {key: midmean([one[key] for one in laps]) for key in laps[0]}
    pauses = [one["pause_s"] for one in laps]
    generator = random.Random(0)
    again = [midmean(generator.choices(pauses, k=len(pauses))) for _ in range(RESAMPLES)]
    return row | {"pause_error_s": statistics.pstdev(again), "rounds": len(laps)}


def midmean(values: Sequence[float]) -> float:
    """Of the middle half: a wait is anything up to a step, and a few are held up by others."""
    outer = len(values) // 4
    return statistics.mean(sorted(values)[outer : len(values) - outer])


async def surround(gateway: Gateway, what: str) -> list[str]:
    """Fills both hosts' batches with ordinary sequences."""
    names = []
    streams = []
    for host in (SOURCE, TARGET):
        for number in range(NEIGHBOURS):
            name = f"near-{what}-{host}-{number}"
            streams.append(gateway.open(ask(name, NEIGHBOUR_TOKENS), Route(host)))
            names.append(name)
    await gateway.until(lambda: all(stream.arrived_s for stream in streams))
    return names


def ask(name: str, tokens: int) -> Request:
    seed = sum((i + 1) * byte for i, byte in enumerate(name.encode()))
    prompt = tuple((seed * 31 + 17 * n + n * n) % 30011 + 3 for n in range(tokens))
    sampling = Sampling(max_tokens=16384, temperature=0.0, ignore_eos=True)
    return Request(name, prompt, sampling, PATIENT)


async def lap(
    gateway: Gateway, hosts: list[HostProcess], context: int, number: int
) -> dict[str, float]:
    request = ask(f"moved-{context}-{number}", context)
    hosts[0].know(request.prompt)
    stream = gateway.open(request, Route(SOURCE))
    await gateway.tokens(stream, SETTLE_TOKENS)
    gateway.migrate(request.id, SOURCE, TARGET)
    await gateway.until(lambda: request.id in gateway.ended)
    moved = gateway.ended[request.id]
    assert moved.outcome == "committed", moved
    await gateway.tokens(stream, SETTLE_TOKENS)
    gateway.abort(request.id)
    return {
        **timing(stream, gateway.steps_s[TARGET]),
        "total_s": moved.total_s,
        "MB": moved.kv_bytes / 1e6,
    }


def timing(stream: Stream, target_steps_s: list[float]) -> dict[str, float]:
    first = stream.senders.index(TARGET)
    left_s, came_s = stream.arrived_s[first - 1], stream.arrived_s[first]
    step_s = statistics.median(b - a for a, b in pairwise(stream.arrived_s[first:]))
    before = [at_s for at_s in target_steps_s if at_s < came_s]
    beside_s = statistics.median(b - a for a, b in pairwise(before[-BESIDE_STEPS:]))
    return {
        "gap_s": came_s - left_s,
        "step_s": step_s,
        "pause_s": came_s - left_s - step_s,
        "joined_s": before[-1] - left_s,
        "beside_s": beside_s,
    }


async def recompute(gateway: Gateway, context: int) -> float:
    """How long a reader waits when the target computes the sequence again, beside its others."""
    neighbours = await surround(gateway, f"again-{context}")
    request = ask(f"again-{context}", context)
    asked_s = time.monotonic()
    stream = gateway.open(request, Route(TARGET))
    await gateway.tokens(stream, 1)
    for name in [request.id, *neighbours]:
        gateway.abort(name)
    return stream.arrived_s[0] - asked_s


def show(row: dict[str, Any]) -> None:
    again = f", again {row['recompute_s']:.2f} s" if "recompute_s" in row else ""
    times_ms = [row[key] * 1e3 for key in ("joined_s", "beside_s", "gap_s", "step_s", "total_s")]
    print(
        f"{row['transport']:14} {row['mode']:13} {row['context']:8} {row['MB']:6.0f} "
        f"{row['pause_s'] * 1e3:7.1f} +-{row['pause_error_s'] * 1e3:4.1f} "
        + " ".join(f"{time_ms:7.1f}" for time_ms in times_ms)
        + again,
        flush=True,
    )


def show_slow_down(transport: str, slowed: dict[str, Any]) -> None:
    for side, found in slowed.items():
        print(
            f"{transport}: {side}'s other sequences {found['median']:+.1%} while KV moves "
            f"({found['low']:+.1%} to {found['high']:+.1%}, {found['copies']} copies)",
            flush=True,
        )


if __name__ == "__main__":
    main()
