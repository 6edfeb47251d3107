#!/usr/bin/env python3
"""Random kills (SIGKILL) under steady load: is a request lost, a token wrong or a block leaked?

    python scripts/bench/soak.py [--kills 50] [--minutes 10] [--seed 0] [--streams 6] [--tensor 1]
        [--json FILE]
    python scripts/bench/soak.py --sum FILE...

Serves the built-in model on a Ray of its own, with two prefill and two decode instances, or, with
--tensor 2, one prefill instance beside a decode instance of two ranks. Readers stream greedy
answers one after the other, and each answer is compared with that of the undisturbed cluster.
Meanwhile a worker, a single rank or the controller is killed at random moments. A reader's stall is
its longest wait for a token, the first one included. --sum adds up several runs' files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import yaml

from cluster.rpc import tandem_pb2 as pb
from engine.errors import DeadlineExceeded, InstanceLost, TandemError
from tests.ray.serving import command_of, descendants, is_controller, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.client import AsyncClient
    from tests.ray.serving import Serving

ANIMALS = ("fox", "hen", "cat", "dog", "pig", "cow", "owl", "bee", "goat", "duck", "frog", "bear")
PLACES = ("the forest", "the village", "the sea")
PROMPTS = [f"Once upon a time there was a {one} in {place}" for one in ANIMALS for place in PLACES]
TOKENS = (60, 250)
"""Shortest and longest answer."""
SETTLE_S = 90.0
KINDS = ("decode", "prefill", "controller")
WEIGHTS = (5, 4, 1)
"""How often each kind is the victim."""


@dataclass
class Outcome:
    """What a run, or several, came to."""

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    leaked_blocks: int = 0
    left_requests: int = 0

    @property
    def holds(self) -> bool:
        return not (self.lost or self.wrong or self.leaked_blocks or self.left_requests)


def main() -> None:
    options = parse()
    if options.sum:
        outcome = total([Outcome(**json.loads(path.read_text())) for path in options.sum])
    else:
        outcome = soak(options)
        if options.json is not None:
            options.json.write_text(json.dumps(asdict(outcome)))
    report(outcome)
    raise SystemExit(0 if outcome.holds else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--tensor", type=int, default=1, choices=(1, 2))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", type=Path, help="where the cluster's log is kept")
    parser.add_argument("--sum", type=Path, nargs="+")
    return parser.parse_args()


def soak(options: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config(options.tensor, options.kills)))
        serving = serve(options.log or Path(folder) / "serve.log", str(file))
        try:
            outcome = asyncio.run(Soak(serving, options).run())
        finally:
            status = serving.end()
        if status:
            outcome.lost.append(f"the cluster ended with status {status}")
        return outcome


def config(tensor: int, kills: int) -> dict[str, Any]:
    instances = 2 if tensor == 1 else 1
    return {
        "model": "demo",
        "pools": {
            "prefill": {"instances": instances},
            "decode": {"instances": instances, "tensor_parallel": tensor},
        },
        "limits": {"restarts": kills},
    }


class Soak:
    def __init__(self, serving: Serving, options: argparse.Namespace) -> None:
        self._serving, self._options = serving, options
        self._random = random.Random(options.seed)
        self._expected: dict[str, list[int]] = {}
        self._over = asyncio.Event()
        self._numbers = count()
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        async with self._serving.async_client() as client:
            await self._learn(client)
            start_s = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._options.streams):
                    tasks.create_task(self._read_on(client))
                await self._kill_on(client)
                self._over.set()
            self.outcome.seconds = time.monotonic() - start_s
            await self._settle(client)
        return self.outcome

    async def _learn(self, client: AsyncClient) -> None:
        """What every prompt is answered with while nobody dies."""
        prompts = iter(PROMPTS)

        async def learn_on() -> None:
            for prompt in prompts:
                chunks = [chunk async for chunk in client.stream(ask(prompt))]
                self._expected[prompt] = [token for chunk in chunks for token in chunk.token_ids]

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._options.streams):
                tasks.create_task(learn_on())

    # Readers.

    async def _read_on(self, client: AsyncClient) -> None:
        while not self._over.is_set():
            number = next(self._numbers)
            prompt = PROMPTS[number % len(PROMPTS)]
            tokens = random.Random(number).randint(*TOKENS)
            await self._read(client, f"request {number}", prompt, tokens)

    async def _read(self, client: AsyncClient, name: str, prompt: str, tokens: int) -> None:
        got: list[int] = []
        stall_s, last_s, finish = 0.0, time.monotonic(), ""
        try:
            async for chunk in client.stream(ask(prompt, tokens)):
                now_s = time.monotonic()
                stall_s, last_s = max(stall_s, now_s - last_s), now_s
                got += chunk.token_ids
                finish = chunk.finish_reason or finish
        except TandemError as error:
            self.outcome.lost.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if finish != "length":
                self.outcome.lost.append(f"{name}: ended as {finish!r} after {len(got)} tokens")
            elif got != self._expected[prompt][:tokens]:
                self.outcome.wrong.append(
                    f"{name}: {first_difference(self._expected[prompt], got)}"
                )
        self.outcome.requests += 1
        self.outcome.tokens += len(got)
        self.outcome.stalls_s.append(stall_s)

    # Kills.

    async def _kill_on(self, client: AsyncClient) -> None:
        """At random moments of the time there is."""
        loop, end_s = asyncio.get_running_loop(), self._options.minutes * 60.0
        moments = sorted(self._random.uniform(0.0, end_s) for _ in range(self._options.kills))
        start_s, kills = loop.time(), Counter[str]()
        for moment in moments:
            await asyncio.sleep(max(start_s + moment - loop.time(), 0.0))
            victim = await self._kill_one(client)
            kills[victim] += 1
            progress = f"{moment:5.0f} s  killed {victim:<10} {self.outcome.requests} answered"
            print(f"{progress}, {len(self.outcome.lost)} lost", file=sys.stderr, flush=True)
        await asyncio.sleep(max(start_s + end_s - loop.time(), 0.0))
        self.outcome.kills = dict(kills)

    async def _kill_one(self, client: AsyncClient) -> str:
        """Waits until there is one of the kind that was drawn, and says what it was."""
        (kind,) = self._random.choices(KINDS, WEIGHTS)
        while True:
            candidates = await self._candidates(client, kind)
            alive = [one for one in candidates if command_of(one[1])]
            if alive:
                victim, pid = self._random.choice(alive)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return victim
            await asyncio.sleep(0.1)

    async def _candidates(self, client: AsyncClient, kind: str) -> list[tuple[str, int]]:
        if kind == "controller":
            found = await asyncio.to_thread(descendants, self._serving.process.pid)
            return [(kind, pid) for pid in sorted(found) if is_controller(pid)]
        status = await status_of(client)
        return [
            (kind if worker.rank == 0 else f"{kind} rank {worker.rank}", worker.pid)
            for one in status.instances
            if one.role == kind and one.state == "ready"
            for worker in one.workers
        ]

    async def _settle(self, client: AsyncClient) -> None:
        """Everything is up again and holds nothing; what is held at the end has leaked."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            status = await status_of(client)
            held = sum(one.total_blocks - one.free_blocks for one in status.instances)
            up = all(one.state == "ready" for one in status.instances)
            if (up and not held and not status.requests) or time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.2)
        self.outcome.leaked_blocks, self.outcome.left_requests = held, len(status.requests)


async def status_of(client: AsyncClient) -> pb.StatusReply:
    """Asked again while the controller's successor starts."""
    while True:
        try:
            return await client.status()
        except (InstanceLost, DeadlineExceeded):
            await asyncio.sleep(0.2)


def ask(prompt: str, tokens: int = TOKENS[1]) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return pb.GenerateRequest(text=prompt, sampling=sampling)


def first_difference(expected: Sequence[int], got: Sequence[int]) -> str:
    for place, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return f"token {place} is {other}, not {one}"
    return f"{len(got)} tokens"


def total(outcomes: Sequence[Outcome]) -> Outcome:
    whole, kills = Outcome(), Counter[str]()
    for one in outcomes:
        for name in ("seconds", "requests", "tokens", "leaked_blocks", "left_requests"):
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
        for name in ("lost", "wrong", "stalls_s"):
            getattr(whole, name).extend(getattr(one, name))
        kills.update(one.kills)
    whole.kills = dict(kills)
    return whole


def report(outcome: Outcome) -> None:
    p50, p99, most = (float(np.quantile(outcome.stalls_s, q)) for q in (0.5, 0.99, 1.0))
    by_kind = ", ".join(f"{kind} {number}" for kind, number in sorted(outcome.kills.items()))
    print(f"kills            {sum(outcome.kills.values())} in {outcome.seconds:.0f} s ({by_kind})")
    print(f"requests         {outcome.requests}, {outcome.tokens} tokens")
    print(f"longest stall    p50 {p50:.2f} s, p99 {p99:.2f} s, max {most:.2f} s")
    print(f"lost             {len(outcome.lost)}")
    print(f"wrong tokens     {len(outcome.wrong)}")
    print(f"leaked           {outcome.leaked_blocks} blocks, {outcome.left_requests} requests")
    for line in [*outcome.lost, *outcome.wrong][:10]:
        print(f"  {line}")


if __name__ == "__main__":
    main()
