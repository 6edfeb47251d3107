#!/usr/bin/env python3
"""Routing decisions a second with many instances in the view, prompts sharing prefixes.

Every decision counts in full: hashing the prompt, choosing, the ledger, and forgetting it again;
every `--load-every` decisions all instances tell a new load.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.messages import InstanceState, Load, Role
from engine.request import Request, Sampling
from placement.routing.router import Policy, Router, RouterSettings
from placement.view import InstanceView, View


def load(name: str, draw: random.Random) -> Load:
    role = Role(name.split("-", maxsplit=1)[0])
    return Load(
        instance=name, role=role, state=InstanceState.READY, queue_requests=draw.randrange(4),
        queued_tokens=draw.randrange(4000), running_sequences=draw.randrange(32),
        running_tokens=0, free_blocks=draw.randrange(2000, 4000), total_blocks=4096,
        block_tokens=16, pinned_blocks=0, cached_blocks=0, step_s=draw.uniform(0.005, 0.03),
        sequences=(),
    )  # fmt: skip


def make_view(instances: int, shape: str, draw: random.Random) -> View:
    names = {
        "split": [f"prefill-{n}" if n % 2 else f"decode-{n}" for n in range(instances)],
        "mixed": [f"mixed-{n}" for n in range(instances)],
    }[shape]
    return View(0.0, tuple(InstanceView(load(name, draw)) for name in sorted(names)))


def refreshed(view: View, draw: random.Random) -> View:
    loads = [replace(one.load, queued_tokens=draw.randrange(4000)) for one in view.instances]
    return View(view.now_s, tuple(InstanceView(one) for one in loads))


def make_requests(count: int, prompt_tokens: int, draw: random.Random) -> list[Request]:
    """Half of each prompt is one of 100 shared beginnings."""
    half = prompt_tokens // 2
    beginnings = [tuple(draw.randrange(32_000) for _ in range(half)) for _ in range(100)]
    return [
        Request(
            f"r{n}",
            draw.choice(beginnings) + tuple(draw.randrange(32_000) for _ in range(half)),
            Sampling(max_tokens=128),
        )
        for n in range(count)
    ]


def decisions_per_s(
    view: View, requests: list[Request], policy: Policy, load_every: int
) -> tuple[float, float]:
    """By the clock on the wall, and by the processor's own."""
    router = Router(RouterSettings(policy=policy))
    draw = random.Random(1)
    views = [refreshed(view, draw) for _ in range(len(requests) // load_every + 1)]
    live: list[str] = []
    started, cpu_started = time.perf_counter(), time.process_time()
    for number, request in enumerate(requests):
        route = router.choose(request, views[number // load_every])
        assert route is not None
        router.dispatched(request, route, 0.0)
        live.append(request.id)
        if len(live) > 512:
            gone = live.pop(0)
            router.prefilled(gone, 0.1)
            router.ended(gone)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    return len(requests) / wall_s, len(requests) / cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--load-every", type=int, default=100)
    options = parser.parse_args()
    draw = random.Random(0)
    requests = make_requests(options.requests, options.prompt_tokens, draw)
    print(f"{options.instances} instances, prompts of {options.prompt_tokens} tokens")
    for shape in ("split", "mixed"):
        view = make_view(options.instances, shape, draw)
        for policy in Policy:
            wall, cpu = decisions_per_s(view, requests, policy, options.load_every)
            figures = f"{wall:7.0f} decisions/s, {cpu:7.0f} in a second of processor time"
            print(f"  {shape:5} {policy.value:12} {figures}")


if __name__ == "__main__":
    main()
