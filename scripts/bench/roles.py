#!/usr/bin/env python3
"""Roles that follow the workload: from prompt-heavy to output-heavy under a policy with switches.

    python scripts/bench/roles.py [--seconds 20] [--prompt-rate 8] [--output-rate 9] [--json]

Serves the built-in model as two prefill instances beside one that decodes, under a policy that
may have three instances in all and turns one role into the other. The first half of the load is
long prompts with short answers, the second half short prompts with long answers. Printed are the
instances of each role over time, how long each switch took from the decision to the new role,
and attainment before, during and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
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
from engine.slo import Slo
from placement.workload import Workload
from tests.ray.serving import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.bench.sample import Sample
    from cluster.rpc.tandem_pb2 import Event
    from tests.ray.serving import Serving

POLICY: dict[str, Any] = {
    "name": "follow the workload",
    "budget_accelerators": 3,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 3,
    "upscale_delay_s": 1,
    "downscale_delay_s": 120,
    "cooldown_s": 5,
}
SHAPES = {"prompts": (320, 8), "outputs": (24, 160)}
"""Prompt and output tokens of each half, in the median."""
SPREAD = 0.3
WATCH_S = 0.25


@dataclass
class Timeline:
    """Ready instances of each role whenever they changed, from the start of the load."""

    looks: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    decided_s: dict[str, float] = field(default_factory=dict)
    """By instance, on the controller's clock."""
    switches_s: list[tuple[str, float]] = field(default_factory=list)

    def see(self, now_s: float, roles: dict[str, int]) -> None:
        if not self.looks or self.looks[-1][1] != roles:
            self.looks.append((now_s, roles))

    def hear(self, event: Event) -> None:
        if event.text == "switch":
            self.decided_s[event.subject] = event.at_s
        elif event.text == "role changed" and event.subject in self.decided_s:
            took_s = event.at_s - self.decided_s.pop(event.subject)
            self.switches_s.append((event.subject, took_s))


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        policy, config = Path(folder) / "policy.yaml", Path(folder) / "config.yaml"
        policy.write_text(yaml.safe_dump(POLICY | {"roles": roles(options)}))
        config.write_text(yaml.safe_dump(deployment(options)))
        log = options.log or Path(folder) / "serve.log"
        serving = serve(log, str(config), "--policy", str(policy))
        try:
            samples, timeline = uvloop.run(run(serving, options))
        finally:
            serving.end()
    report(samples, timeline, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each half")
    parser.add_argument("--prompt-rate", type=float, default=8.0)
    parser.add_argument("--output-rate", type=float, default=9.0)
    parser.add_argument("--ttft", type=float, default=0.5)
    parser.add_argument("--tpot", type=float, default=0.005)
    parser.add_argument("--queued", type=float, default=400.0, help="prompt tokens per prefill")
    parser.add_argument("--sequences", type=float, default=4.0, help="per decode instance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def deployment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": "demo",
        "device": "cpu",
        "pools": {"prefill": {"instances": 2}, "decode": {"instances": 1}},
        "slo": {"ttft_s": options.ttft, "tpot_s": options.tpot},
        "engine": {"cache_prefixes": False},
    }


def roles(options: argparse.Namespace) -> dict[str, Any]:
    prompts = {"signal": "queued_prompt_tokens", "target": options.queued}
    outputs = {"signal": "batch", "target": options.sequences}
    limits = {"min_replicas": 1, "max_replicas": 2}
    return {
        "prefill": {**limits, "signals": [prompts]},
        "decode": {**limits, "signals": [outputs]},
    }


def draw(options: argparse.Namespace) -> Workload:
    generator = np.random.default_rng(options.seed)
    rates = (options.prompt_rate, options.output_rate)
    arrivals: list[Any] = []
    prompts: list[Any] = []
    outputs: list[Any] = []
    for half, (rate, medians) in enumerate(zip(rates, SHAPES.values(), strict=True)):
        count = int(rate * options.seconds)
        arrivals.append(np.sort(generator.uniform(0, options.seconds, count)))
        arrivals[-1] += half * options.seconds
        for lengths, median in zip((prompts, outputs), medians, strict=True):
            drawn = generator.lognormal(np.log(median), SPREAD, count)
            lengths.append(np.maximum(np.rint(drawn), 2).astype(int))
    return Workload(*(np.concatenate(parts) for parts in (arrivals, prompts, outputs)))


async def run(serving: Serving, options: argparse.Namespace) -> tuple[list[Sample], Timeline]:
    server = await connect(parse_target(serving.http, None), Settings())
    arrangement = Arrangement(draw(options), Slo(options.ttft, options.tpot))
    load, timeline = arrangement.conversations(), Timeline()
    warm = [replace(one, turns=(replace(one.turns[0], index=10**7),)) for one in load[:4]]
    await closed_loop(server, warm, 2, Silent())
    watching = [asyncio.create_task(one(serving, timeline)) for one in (watch, listen)]
    samples = await open_loop(server, load, Silent())
    for task in watching:
        task.cancel()
    server.close()
    return samples, timeline


async def watch(serving: Serving, timeline: Timeline) -> None:
    start_s = time.monotonic()
    async with serving.async_client() as client:
        while True:
            status = await client.status()
            ready = [one.role for one in status.instances if one.state == "ready"]
            counts = {role: ready.count(role) for role in sorted(set(ready))}
            timeline.see(time.monotonic() - start_s, counts)
            await asyncio.sleep(WATCH_S)


async def listen(serving: Serving, timeline: Timeline) -> None:
    async with serving.async_client() as client:
        async for event in client.watch("scale", "instance"):
            timeline.hear(event)


def report(samples: Sequence[Sample], timeline: Timeline, options: argparse.Namespace) -> None:
    """`during` lasts from the turn of the workload until the last change of roles after it."""
    turn_s = options.seconds
    changes = [at_s for at_s, _ in timeline.looks if at_s > turn_s]
    settled_s = changes[-1] if changes else turn_s
    spans = {
        "before": (0.0, turn_s),
        "during": (turn_s, settled_s),
        "after": (settled_s, 2 * turn_s),
    }
    parts = {
        name: attainment([one for one in samples if low <= one.due_s < high])
        for name, (low, high) in spans.items()
    }
    failed = [one.error for one in samples if one.error is not None]
    if options.json:
        document = {"failed": failed, "settled_s": settled_s, "roles": timeline.looks}
        document["switches_s"] = timeline.switches_s
        print(json.dumps(document | {"attainment": parts, "requests": len(samples)}))
        return
    for at_s, counts in timeline.looks:
        shown = ", ".join(f"{count} {role}" for role, count in counts.items())
        print(f"{at_s:6.1f} s  {shown}")
    for instance, took_s in timeline.switches_s:
        print(f"{instance} took its new role {took_s * 1e3:.0f} ms after the decision")
    print(f"the workload turned at {turn_s:.1f} s; roles had followed at {settled_s:.1f} s")
    for name, (low, high) in spans.items():
        share = "no request" if parts[name] is None else f"{parts[name]:.1%}"
        print(f"{name:<7} {low:5.1f} to {high:5.1f} s: attainment {share}")
    print(f"{len(samples)} requests, {len(failed)} failed")
    for error in dict.fromkeys(failed):
        print(f"  {error}")


def attainment(samples: Sequence[Sample]) -> float | None:
    return sum(one.met() for one in samples) / len(samples) if samples else None


if __name__ == "__main__":
    main()
