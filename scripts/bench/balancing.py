"""A skewed load on 16 decode instances in the simulator, with balancing off and on.

A few very long outputs among short ones: which instance they end up on is chance, and where
several meet, memory runs out, others give way and new requests wait. With `--lengths power-law`
prompts and outputs follow one law from a few tokens to thousands, so that room for a long prompt
is scattered over instances, however requests are routed.

Which router stands before the balancer decides where the gain shows. Round robin fills instances
blindly, and balancing takes prompts out of the queue of a full one. The default router sends each
request to where there is room: until the whole fleet is full a first token hardly ever waits for
memory, and what balancing saves are preemptions and waits for the second token.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.messages import Role  # noqa: E402
from placement.latency.catalog import find_model, one_kind  # noqa: E402
from placement.planning.candidate import Candidate, deployment_of  # noqa: E402
from placement.planning.costbook import CostBook, Cut  # noqa: E402
from placement.planning.plan import PoolPlan, Target  # noqa: E402
from placement.routing.router import Policy, RouterSettings  # noqa: E402
from placement.simulation.deployment import Overheads  # noqa: E402
from placement.simulation.dynamics import Dynamics  # noqa: E402
from placement.simulation.simulator import Simulation  # noqa: E402
from placement.workload import Arrivals, Workload  # noqa: E402

POWER, SHORTEST, LONGEST = 1.3, 16, 6000


def skewed(arguments: argparse.Namespace, seed: int) -> Workload:
    generator = np.random.default_rng(seed)
    count = arguments.requests
    if arguments.lengths == "power-law":
        prompts, outputs = power_law(generator, count), power_law(generator, count)
        return Workload(Arrivals(generator).times(count, arguments.rate), prompts, outputs)
    long_one = generator.random(count) < arguments.long_share
    outputs = np.where(
        long_one,
        generator.integers(arguments.long_tokens // 2, arguments.long_tokens * 3 // 2, count),
        generator.integers(16, 200, count),
    )
    prompts = generator.integers(64, 1024, count)
    return Workload(Arrivals(generator).times(count, arguments.rate), prompts, outputs)


def power_law(generator: np.random.Generator, count: int) -> np.ndarray:
    """Lengths from SHORTEST to LONGEST whose density falls with a power: a mean of about 500."""
    exponent = 1.0 - POWER
    low, high = SHORTEST**exponent, LONGEST**exponent
    lengths: np.ndarray = (low + generator.random(count) * (high - low)) ** (1.0 / exponent)
    return lengths.astype(np.int64)


def run(arguments: argparse.Namespace, router: str, seed: int, *, balance: bool) -> dict[str, Any]:
    cut = Cut(arguments.device)
    book = CostBook(find_model("llama-3.1-8b"), one_kind(arguments.device, 4, 8))
    role = Role.DECODE if arguments.prefill else Role.MIXED
    pools = [PoolPlan(role, arguments.instances, cut)]
    if arguments.prefill:
        pools.insert(0, PoolPlan(Role.PREFILL, arguments.prefill, cut))
    target = Target(2.0, 0.1)
    deployment = deployment_of(book, Candidate(tuple(pools), 2048), target, Overheads())
    deployment = replace(deployment, router=RouterSettings(policy=Policy(router)))
    dynamics = Dynamics(balance=balance)
    simulation = Simulation(deployment, skewed(arguments, seed), dynamics=dynamics)
    outcome, record = simulation.run(), simulation.record
    figures = outcome.figures()
    return {
        "ttft_p50_s": figures["ttft_s"]["p50"],
        "ttft_p99_s": figures["ttft_s"]["p99"],
        "second_p99_s": float(np.nanquantile(outcome.second_token_s - outcome.arrived_s, 0.99)),
        "tpot_p99_s": figures["tpot_s"]["p99"],
        "queue_mean_s": figures["ttft_parts_s"]["queue"],
        "decode_queue_mean_s": figures["ttft_parts_s"]["decode_queue"],
        "preemptions": outcome.preemptions,
        "attainment": outcome.attainment,
        "migrations": record.migrations,
        "failed_migrations": record.failed_migrations,
        "pause_p99_s": float(np.quantile(record.pauses_s, 0.99)) if record.pauses_s else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--prefill", type=int, default=0, help="0: decode instances prefill, too")
    parser.add_argument("--device", default="a10g")
    parser.add_argument("--requests", type=int, default=7000)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--lengths", choices=("skewed", "power-law"), default="skewed")
    parser.add_argument("--long-share", type=float, default=0.05)
    parser.add_argument("--long-tokens", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--routers", nargs="*", default=["default", "round_robin"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        {"router": router, "seed": seed, "balancing": balance,
         **run(arguments, router, seed, balance=balance)}
        for router in arguments.routers
        for seed in range(arguments.seeds)
        for balance in (False, True)
    ]  # fmt: skip
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    print("router       seed balancing  ttft p50   ttft p99  2nd p99  tpot p99  queue mean  "
          "decode queue  preempted  attained  moved (failed)  pause p99")  # fmt: skip
    for row in rows:
        pause = "-" if row["pause_p99_s"] is None else f"{row['pause_p99_s'] * 1e3:.1f} ms"
        print(
            f"{row['router']:12} {row['seed']:4} {'on' if row['balancing'] else 'off':9} "
            f"{row['ttft_p50_s']:9.3f}s {row['ttft_p99_s']:9.3f}s "
            f"{row['second_p99_s']:7.2f}s {row['tpot_p99_s']:8.4f}s "
            f"{row['queue_mean_s']:10.3f}s {row['decode_queue_mean_s']:12.3f}s "
            f"{row['preemptions']:10} {row['attainment']:9.1%} "
            f"{row['migrations']:7} ({row['failed_migrations']})   {pause}"
        )
    for off, on in zip(rows[::2], rows[1::2], strict=True):
        falls = {key: off[key] / on[key] for key in ("ttft_p99_s", "second_p99_s")}
        print(
            f"{off['router']}, seed {off['seed']}: p99 TTFT falls {falls['ttft_p99_s']:.1f} times, "
            f"p99 of the second token {falls['second_p99_s']:.1f} times"
        )


if __name__ == "__main__":
    sys.exit(main())
