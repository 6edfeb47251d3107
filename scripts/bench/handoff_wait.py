"""What a prompt's first decode step waits for its hand-off, between two real hosts.

    python scripts/bench/handoff_wait.py [--shape 0.6b] [--tokens 2048] [--rounds 3]
        [--transport auto] [--json]

A prefill instance computes the prompt and streams its first token; a decode instance in another
process pulls layer groups meanwhile and draws the second. The wait is what passes between the
first token and the start of the step that draws the second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.messages import Role
from engine.request import Request, Sampling
from engine.slo import Slo
from placement.routing.router import Route
from scripts.bench.two_hosts import Gateway, HostPlan, start, stop, write_model

GOAL = 0.03
BLOCK_TOKENS = 16


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(measure(options, Path(directory)))
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for lap in figures["laps"]:
        print(
            f"prefill {lap['prefill_s']:.2f} s; KV is the target's {lap['commit_s'] * 1e3:5.1f} ms "
            f"after the first token; the next step starts after {lap['wait_s'] * 1e3:5.1f} ms "
            f"= {lap['share']:.2%} of the prefill"
        )
    print(f"median {figures['median_share']:.2%} (goal {GOAL:.0%})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="0.6b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    write_model(options.shape, directory / "model")
    blocks = 2 * options.tokens // BLOCK_TOKENS
    plans = [
        HostPlan(
            name,
            role,
            str(directory / "model"),
            str(directory),
            blocks,
            transport=options.transport,
            core=core,
        )
        for core, (name, role) in enumerate(
            (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE))
        )
    ]
    gateway = Gateway(directory)
    hosts = start(plans, gateway.link.address)
    gateway.meet(hosts)
    laps = [await lap(gateway, number, options.tokens) for number in range(options.rounds + 1)][1:]
    stop(hosts)
    gateway.link.close()
    return {"laps": laps, "median_share": statistics.median(lap["share"] for lap in laps)}


async def lap(gateway: Gateway, number: int, tokens: int) -> dict[str, float]:
    prompt = tuple((7 * n + 131 * number) % 4001 + 3 for n in range(tokens))
    request = Request(f"r{number}", prompt, Sampling(max_tokens=4, temperature=0.0), Slo(60, 10))
    stream = gateway.open(request, Route("prefill-0", "decode-0"))
    await gateway.tokens(stream, 4)
    at = stream.stamps
    prefill_s = at["first_token_s"] - at["prefill_started_s"]
    wait_s = at["decode_started_s"] - at["first_token_s"]
    commit_s = at["transferred_s"] - at["first_token_s"]
    share = wait_s / prefill_s
    return {"prefill_s": prefill_s, "commit_s": commit_s, "wait_s": wait_s, "share": share}


if __name__ == "__main__":
    main()
