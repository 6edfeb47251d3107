"""A skewed load on 16 instances in the simulator, with balancing off and on.

Prompts and outputs follow one power law from a few tokens to thousands, on accelerators whose
memory holds two or three of the longest. Room for a long prompt is then scattered over instances,
however requests are routed, and balancing makes holes of it. At the default rates memory is short
for a while; beyond them (5.5/s) a seed asks for more than the fleet has, and balancing moves the
shortage about. With `--lengths outputs` a few very long outputs stand among short ones, and prompts
are short: the default router finds each a place until the whole fleet is full, and what balancing
saves are preemptions. Round robin fills instances blindly: there balancing takes prompts out of the
queue of a full one.

What a seed brings varies much, and near saturation anything changes it (heartbeats a little earlier
do as much), so each rate is also judged by the requests of all seeds together.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
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


@dataclass(frozen=True)
class Case:
    router: str
    rate: float
    seed: int
    balance: bool


def skewed(arguments: argparse.Namespace, case: Case) -> Workload:
    generator = np.random.default_rng(case.seed)
    count = arguments.requests
    if arguments.lengths == "power-law":
        prompts, outputs = power_law(generator, count), power_law(generator, count)
        return Workload(Arrivals(generator).times(count, case.rate), prompts, outputs)
    long_one = generator.random(count) < arguments.long_share
    outputs = np.where(
        long_one,
        generator.integers(arguments.long_tokens // 2, arguments.long_tokens * 3 // 2, count),
        generator.integers(16, 200, count),
    )
    prompts = generator.integers(64, 1024, count)
    return Workload(Arrivals(generator).times(count, case.rate), prompts, outputs)


def power_law(generator: np.random.Generator, count: int) -> np.ndarray:
    """Lengths from SHORTEST to LONGEST whose density falls with a power: a mean of about 500."""
    exponent = 1.0 - POWER
    low, high = SHORTEST**exponent, LONGEST**exponent
    lengths: np.ndarray = (low + generator.random(count) * (high - low)) ** (1.0 / exponent)
    return lengths.astype(np.int64)


def run(arguments: argparse.Namespace, case: Case) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of a case, and every TTFT."""
    cut = Cut(arguments.device)
    book = CostBook(find_model(arguments.model), one_kind(arguments.device, 4, 8))
    role = Role.DECODE if arguments.prefill else Role.MIXED
    pools = [PoolPlan(role, arguments.instances, cut)]
    if arguments.prefill:
        pools.insert(0, PoolPlan(Role.PREFILL, arguments.prefill, cut))
    target = Target(2.0, 0.1)
    deployment = deployment_of(book, Candidate(tuple(pools), 2048), target, Overheads())
    deployment = replace(deployment, router=RouterSettings(policy=Policy(case.router)))
    dynamics = Dynamics(balance=case.balance)
    simulation = Simulation(deployment, skewed(arguments, case), dynamics=dynamics)
    outcome, record = simulation.run(), simulation.record
    figures = outcome.figures()
    return {
        **asdict(case),
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
    }, outcome.first_token_s - outcome.arrived_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--prefill", type=int, default=0, help="0: decode instances prefill, too")
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--device", default="a10g")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--rates", type=float, nargs="+", default=[5.0, 5.2])
    parser.add_argument("--lengths", choices=("power-law", "outputs"), default="power-law")
    parser.add_argument("--long-share", type=float, default=0.05)
    parser.add_argument("--long-tokens", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--routers", nargs="*", default=["default"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for router in arguments.routers:
        for rate in arguments.rates:
            rows += compare(arguments, router, rate)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return 0


def compare(arguments: argparse.Namespace, router: str, rate: float) -> list[dict[str, Any]]:
    """All seeds at one rate, each without and with balancing."""
    ttft_s: dict[bool, list[np.ndarray]] = {False: [], True: []}
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(HEAD)
    for seed in range(arguments.seeds):
        for balance in (False, True):
            row, of_each_s = run(arguments, Case(router, rate, seed, balance))
            rows.append(row)
            ttft_s[balance].append(of_each_s)
            if not arguments.json:
                show(row)
    if not arguments.json:
        falls = [off["ttft_p99_s"] / on["ttft_p99_s"] for off, on in pairwise(rows)][::2]
        off_s, on_s = (np.nanquantile(np.concatenate(ttft_s[one]), 0.99) for one in (False, True))
        each = ", ".join(f"{fall:.1f}" for fall in falls)
        print(f"{router}, {rate}/s: p99 TTFT falls {each} times; of all seeds together "
              f"{off_s:.2f} -> {on_s:.2f} s, {off_s / on_s:.1f} times\n", flush=True)  # fmt: skip
    return rows


HEAD = (
    "router       rate seed balancing  ttft p50   ttft p99  2nd p99  tpot p99  queue mean  "
    "decode queue  preempted  attained  moved (failed)  pause p99"
)


def show(row: dict[str, Any]) -> None:
    pause = "-" if row["pause_p99_s"] is None else f"{row['pause_p99_s'] * 1e3:.1f} ms"
    print(
        f"{row['router']:12} {row['rate']:4} {row['seed']:4} {'on' if row['balance'] else 'off':9} "
        f"{row['ttft_p50_s']:9.3f}s {row['ttft_p99_s']:9.3f}s "
        f"{row['second_p99_s']:7.2f}s {row['tpot_p99_s']:8.4f}s "
        f"{row['queue_mean_s']:10.3f}s {row['decode_queue_mean_s']:12.3f}s "
        f"{row['preemptions']:10} {row['attainment']:9.1%} "
        f"{row['migrations']:7} ({row['failed_migrations']})   {pause}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
