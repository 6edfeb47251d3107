"""A day of production traffic in the simulator: the best static plans beside autoscaling policies.

A trace is scaled in rate by adding time-shifted copies of itself, and thinned to a day's curve.
The day may run faster than 24 hours: starting an instance and the delay before stopping one are
then as much shorter, the delay never below the look-back period; all else is as shipped, so that
windows see fewer requests and weigh more, which makes the day harder to follow. The policies are
the shipped ones, given the fleet's budget and what an instance of the best static plan handles at
the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster.policy_file import parse_policy  # noqa: E402
from engine.messages import Role  # noqa: E402
from placement.candidate import Candidate, deployment_of  # noqa: E402
from placement.catalog import find_model, one_kind  # noqa: E402
from placement.costbook import CostBook, Cut  # noqa: E402
from placement.deployment import Overheads  # noqa: E402
from placement.dynamics import Dynamics  # noqa: E402
from placement.plan import PoolPlan, Target  # noqa: E402
from placement.simulator import Simulation, simulate  # noqa: E402
from placement.workload import DAY_S, Workload, day_of  # noqa: E402
from placement.workload_files import read_workload  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from placement.deployment import Deployment
    from placement.policy import Policy

ACCELERATORS = 32
ATTAINMENT = 0.9
SAMPLES_A_DAY = 288
STEP = 2
"""In which static plans grow."""
POLICIES = ROOT / "cluster" / "configs" / "policies"


@dataclass(frozen=True)
class Case:
    """A trace, what serves it, and how much of it: the peak of the day fills the fleet."""

    file: str
    device: str
    target: Target
    peak_rps: float
    prefill_share: float
    """Of a static plan's instances: where its search begins."""


CASES = {
    "conversation": Case(
        "AzureLLMInferenceTrace_conv_2023.csv", "a10g", Target(2.0, 0.1), 32.0, 0.5
    ),
    "code": Case("AzureLLMInferenceTrace_code_2023.csv", "a10g", Target(2.0, 0.1), 16.0, 0.8),
    "mooncake": Case("mooncake_conversation_trace.jsonl", "a100-80gb", Target(10.0, 0.1), 9.0, 0.7),
}


def day_workload(trace: Workload, case: Case, day_s: float, swing: float, seed: int) -> Workload:
    generator = np.random.default_rng(seed)
    span_s = trace.duration_s
    copies = int(np.ceil(case.peak_rps / trace.rate_rps))
    curve = day_of(1.0, swing)
    parts = []
    for _ in range(copies):
        shift_s = generator.uniform(0, span_s)
        laps = int(np.ceil(day_s / span_s)) + 1
        for lap in range(laps):
            arrivals = trace.arrival_s - trace.arrival_s[0] + lap * span_s - shift_s
            inside = np.flatnonzero((arrivals >= 0) & (arrivals < day_s))
            parts.append(replace(trace.select(inside), arrival_s=arrivals[inside]))
    merged = _merged(parts)
    share = curve(merged.arrival_s * (DAY_S / day_s)) / (1.0 + swing)
    kept = generator.random(len(merged)) < share * case.peak_rps / (copies * trace.rate_rps)
    return merged.select(np.flatnonzero(kept))


def _merged(parts: list[Workload]) -> Workload:
    arrivals = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrivals, kind="stable")
    prompt = np.concatenate([part.prompt_tokens for part in parts])
    output = np.concatenate([part.output_tokens for part in parts])
    return Workload(arrivals[order], prompt[order], output[order])


class Bench:
    def __init__(self, case: Case, data: Path, day_s: float, swing: float, start_s: float) -> None:
        self.case, self.day_s, self.start_s = case, day_s, start_s * day_s / DAY_S
        trace = read_workload(data / case.file)
        self.day = day_workload(trace, case, day_s, swing, seed=0)
        before = [day_workload(trace, case, day_s, swing, seed) for seed in (1, 2)]
        self.history = {
            Role.PREFILL: _samples([(day.arrival_s, day.prompt_tokens) for day in before], day_s),
            Role.DECODE: _samples([(day.arrival_s, day.output_tokens) for day in before], day_s),
        }
        self.book = CostBook(find_model("llama-3.1-8b"), one_kind(case.device, 4, 8))

    def deployment(self, prefill: int, decode: int, mixed: int) -> Deployment:
        counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
        cut = Cut(self.case.device)
        pools = tuple(PoolPlan(role, count, cut) for role, count in counts.items() if count)
        return deployment_of(self.book, Candidate(pools, 2048), self.case.target, Overheads())

    def static(self, prefill: int, decode: int, mixed: int, *, whole: bool = False) -> Row:
        begun_s = time.perf_counter()
        deployment = self.deployment(prefill, decode, mixed)
        outcome = simulate(deployment, self.day, None if whole else ATTAINMENT)
        hours = deployment.accelerators * self.day_s / 3600
        name = f"static {prefill}P+{decode}D" if prefill else f"static {mixed} mixed"
        lasted_s = time.perf_counter() - begun_s
        most = deployment.accelerators
        return Row(name, prefill, decode, outcome.attainment, hours, 0.0, 0, most, lasted_s)

    def follow(self, name: str, policy: Policy, first: tuple[int, int]) -> Row:
        begun_s = time.perf_counter()
        dynamics = Dynamics(policy=policy, start_s=self.start_s, history=self.history)
        simulation = Simulation(self.deployment(*first, 0), self.day, dynamics=dynamics)
        outcome, record = simulation.run(), simulation.record
        return Row(
            name,
            *first,
            outcome.attainment,
            record.accelerator_hours,
            max(record.turns_an_hour.values(), default=0.0),
            record.switches,
            record.most_accelerators,
            time.perf_counter() - begun_s,
        )

    def capacity(self, prefill: int, decode: int) -> dict[str, float]:
        """Tokens per second that one instance of a plan handles at the day's peak."""
        peak = self.case.peak_rps
        prompt_s = peak * float(self.day.prompt_tokens.mean())
        output_s = peak * float(self.day.output_tokens.mean())
        return {"prefill": prompt_s / prefill, "decode": output_s / decode}

    def policy(self, file: str, capacity: dict[str, float], *, switch: bool) -> Policy:
        """A shipped policy for this fleet."""
        values = parse_policy((POLICIES / file).read_text()).model_dump()
        values |= {"budget_accelerators": ACCELERATORS, "role_switch": switch}
        for role, tokens_s in capacity.items():
            values["roles"][role]["max_instances"] = ACCELERATORS - 2
            if values["roles"][role]["capacity_tokens_s"] is not None:
                values["roles"][role]["capacity_tokens_s"] = tokens_s
        if values["forecast"]["season_s"] is not None:
            sample_s = self.day_s / SAMPLES_A_DAY
            season = {"season_s": self.day_s, "sample_s": sample_s}
            values["forecast"] |= {**season, "horizon_s": max(self.start_s, sample_s)}
        down_s = values["downscale_delay_s"] * self.day_s / DAY_S
        values["downscale_delay_s"] = max(down_s, values["look_back_period_s"])
        return type(parse_policy((POLICIES / file).read_text())).model_validate(values)


@dataclass(frozen=True)
class Row:
    name: str
    prefill: int
    """Instances at first."""
    decode: int
    attainment: float
    accelerator_hours: float
    turns_an_hour: float
    switches: int
    most_accelerators: int
    wall_s: float


def _samples(days: list[tuple[Any, Any]], day_s: float) -> tuple[float, ...]:
    """Tokens per second of days one after another."""
    edges = np.linspace(0, day_s, SAMPLES_A_DAY + 1)
    rates = [np.histogram(at, edges, weights=tokens)[0] for at, tokens in days]
    samples: tuple[float, ...] = tuple((np.concatenate(rates) * SAMPLES_A_DAY / day_s).tolist())
    return samples


def best_static(bench: Bench, least: int) -> list[Row]:
    """The smallest plans that attain, separate and aggregated: a search upwards in size."""
    found: list[Row] = []
    for split in (_separate(bench), _aggregated):
        for total in range(least, ACCELERATORS + 1, STEP):
            rows = [bench.static(*plan) for plan in split(total)]
            best = max(rows, key=lambda row: row.attainment)
            if best.attainment >= ATTAINMENT or total + STEP > ACCELERATORS:
                found.append(best)
                break
    return found


def _separate(bench: Bench) -> Callable[[int], list[tuple[int, int, int]]]:
    def plans(total: int) -> list[tuple[int, int, int]]:
        middle = round(total * bench.case.prefill_share)
        return [(prefill, total - prefill, 0) for prefill in (middle, middle + 1)]

    return plans


def _aggregated(total: int) -> list[tuple[int, int, int]]:
    return [(0, 0, total)]


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    bench = Bench(case, arguments.data, arguments.day_s, arguments.swing, arguments.start_s)
    statics = best_static(bench, arguments.least)
    separate = statics[0]
    capacity = bench.capacity(separate.prefill, separate.decode)
    first = (ceil(separate.prefill / 2), ceil(separate.decode / 2))
    rows = list(statics)
    for file, title in (("reactive.yaml", "reactive"), ("predictive.yaml", "predictive")):
        for switch in (False, True):
            full = f"{title}, roles switch" if switch else title
            rows.append(bench.follow(full, bench.policy(file, capacity, switch=switch), first))
    best_hours = min(row.accelerator_hours for row in statics if row.attainment >= ATTAINMENT)
    return {
        "trace": name,
        "requests": len(bench.day),
        "rows": [
            {**asdict(row), "fewer_hours": 1 - row.accelerator_hours / best_hours} for row in rows
        ],
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['trace']}: {result['requests']} requests")
    print(f"  {'':26} attained  acc-hours  fewer  turns/h  switches  most  wall_s")
    for row in result["rows"]:
        print(
            f"  {row['name']:26} {row['attainment']:8.1%} {row['accelerator_hours']:10.2f} "
            f"{row['fewer_hours']:6.1%} {row['turns_an_hour']:8.1f} {row['switches']:9} "
            f"{row['most_accelerators']:5} {row['wall_s']:7.1f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", default=list(CASES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--day-s", type=float, default=3600.0, help="how long the day lasts")
    parser.add_argument("--swing", type=float, default=0.7, help="the day's curve: 1 +- this")
    parser.add_argument(
        "--start-s",
        type=float,
        default=120.0,
        help="until an instance serves, in a day of 24 hours",
    )
    parser.add_argument("--least", type=int, default=14, help="the smallest static plan tried")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = []
    for name in arguments.traces:
        results.append(compare(name, arguments))
        if not arguments.json:
            show(results[-1])
    if arguments.json:
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
