#!/usr/bin/env python3
"""A day of production traffic in the simulator: the best static plans beside autoscaling policies.

    python scripts/bench/trace_day.py [conversation code mooncake] [--day-s 3600] [--json]

A trace is scaled in rate by adding time-shifted copies of itself, and thinned to a day's curve,
whose peak fills the fleet of 32 accelerators. The curves have the ratios that Stojkovic et al.
(DynamoLLM, HPCA 2025) give for a week of the Azure services that the traces are of: in the
conversation service a peak of 1.7 times the mean and 3.3 times the valley, in the coding service,
which its users leave at night, of 2.8 and 34.6 times. Mooncake's conversations follow the first.

The best static plan is the smallest whose attainment over the day reaches the bar, of all splits
into separate pools and of all aggregated ones. The policies are the shipped ones, the same for all
traces but for the fleet's budget, the length of the day, and what one instance handles, which is
the best separate plan's load at the peak. Beside them stands an oracle: whole instances at that
capacity that know the load of each quarter of an hour and start at once.

The day may run faster than 24 hours. Starting an instance, a forecast's season and samples, and the
delay before stopping (but not below the look-back period) are then as much shorter. All else is as
shipped: windows see fewer requests of the day, which makes it harder to follow. Direction
changes are counted for an hour of simulated time, which is less than an hour of the day.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster.policy_file import parse_policy  # noqa: E402
from engine.messages import Role  # noqa: E402
from placement.latency.catalog import find_model, one_kind  # noqa: E402
from placement.planning.candidate import Candidate, deployment_of  # noqa: E402
from placement.planning.costbook import CostBook, Cut  # noqa: E402
from placement.planning.plan import PoolPlan, Target  # noqa: E402
from placement.simulation.deployment import Overheads  # noqa: E402
from placement.simulation.dynamics import Dynamics  # noqa: E402
from placement.simulation.simulator import Simulation, simulate  # noqa: E402
from placement.workload import DAY_S, Workload  # noqa: E402
from placement.workload_files import read_workload  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from placement.scaling.policy import Policy
    from placement.simulation.deployment import Deployment

ACCELERATORS = 32
ATTAINMENT = 0.9
ORACLE_SAMPLES = 96
PEAK_HOUR = 15.0
PEAK_SPAN = (PEAK_HOUR - 2.0) / 24, (PEAK_HOUR + 2.0) / 24
"""Of the day, in which a plan that is too small is found out soonest."""
POLICIES = ROOT / "cluster" / "configs" / "policies"


@dataclass(frozen=True)
class Curve:
    """A day's load, as shares of its peak: a cosine, raised until its mean is right."""

    peak_over_mean: float
    peak_over_valley: float

    def at(self, day_share: NDArray[np.float64]) -> NDArray[np.float64]:
        valley = 1 / self.peak_over_valley
        wave = (1 + np.cos(2 * np.pi * (day_share - PEAK_HOUR / 24))) / 2
        curve: NDArray[np.float64] = valley + (1 - valley) * wave ** self._sharpness()
        return curve

    def _sharpness(self) -> float:
        wave = (1 + np.cos(np.linspace(0, 2 * np.pi, 10_000, endpoint=False))) / 2
        valley = 1 / self.peak_over_valley
        wanted = (1 / self.peak_over_mean - valley) / (1 - valley)
        low, high = 0.1, 10.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if (wave**middle).mean() > wanted else (low, middle)
        return low


CONVERSATIONS, CODING = Curve(1.7, 3.3), Curve(2.8, 34.6)


@dataclass(frozen=True)
class Case:
    """A trace, what serves it, and how much of it: the peak of the day fills the fleet."""

    file: str
    device: str
    target: Target
    peak_rps: float
    curve: Curve


CASES = {
    "conversation": Case(
        "AzureLLMInferenceTrace_conv_2023.csv", "a10g", Target(2.0, 0.05), 38.0, CONVERSATIONS
    ),
    "code": Case("AzureLLMInferenceTrace_code_2023.csv", "a10g", Target(4.0, 0.05), 22.0, CODING),
    "mooncake": Case(
        "mooncake_conversation_trace.jsonl",
        "a100-80gb",
        Target(15.0, 0.05),
        16.0,
        CONVERSATIONS,
    ),
}


def day_workload(trace: Workload, case: Case, day_s: float, seed: int) -> Workload:
    generator = np.random.default_rng(seed)
    span_s = trace.duration_s
    copies = ceil(case.peak_rps / trace.rate_rps)
    parts = []
    for _ in range(copies):
        shift_s = generator.uniform(0, span_s)
        for lap in range(ceil(day_s / span_s) + 1):
            arrivals = trace.arrival_s - trace.arrival_s[0] + lap * span_s - shift_s
            inside = np.flatnonzero((arrivals >= 0) & (arrivals < day_s))
            parts.append(replace(trace.select(inside), arrival_s=arrivals[inside]))
    merged = _merged(parts)
    share = case.curve.at(merged.arrival_s / day_s)
    kept = generator.random(len(merged)) < share * case.peak_rps / (copies * trace.rate_rps)
    return merged.select(np.flatnonzero(kept))


def _merged(parts: list[Workload]) -> Workload:
    arrivals = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrivals, kind="stable")
    prompt = np.concatenate([part.prompt_tokens for part in parts])
    output = np.concatenate([part.output_tokens for part in parts])
    return Workload(arrivals[order], prompt[order], output[order])


@dataclass(frozen=True)
class Row:
    name: str
    prefill: int
    """Instances at first."""
    decode: int
    mixed: int
    attainment: float
    accelerator_hours: float
    turns_an_hour: float = 0.0
    """Of the role that turned most."""
    switches: int = 0
    most_accelerators: int = 0
    wall_s: float = 0.0


class Bench:
    def __init__(self, case: Case, data: Path, day_s: float, start_s: float) -> None:
        self.case, self.day_s, self.start_s = case, day_s, start_s * day_s / DAY_S
        self._trace = read_workload(data / case.file)
        self.day = day_workload(self._trace, case, day_s, seed=0)
        first, last = (share * day_s for share in PEAK_SPAN)
        self._peak = self.day.between(first, last)
        self.book = CostBook(find_model("llama-3.1-8b"), one_kind(case.device, 4, 8))

    def deployment(self, prefill: int, decode: int, mixed: int) -> Deployment:
        counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
        cut = Cut(self.case.device)
        pools = tuple(PoolPlan(role, count, cut) for role, count in counts.items() if count)
        return deployment_of(self.book, Candidate(pools, 2048), self.case.target, Overheads())

    def static(self, prefill: int, decode: int, mixed: int) -> Row:
        """One that misses the bar is left as soon as it is sure to."""
        begun_s = time.perf_counter()
        deployment = self.deployment(prefill, decode, mixed)
        attainment = simulate(deployment, self.day, ATTAINMENT).attainment
        name = f"static {mixed} mixed" if mixed else f"static {prefill}P+{decode}D"
        most = prefill + decode + mixed
        row = Row(name, prefill, decode, mixed, attainment, most * self.day_s / 3600)
        return replace(row, most_accelerators=most, wall_s=time.perf_counter() - begun_s)

    def stands_peak(self, prefill: int, decode: int) -> bool:
        """Whether the day is not lost in its busiest hours alone."""
        lost = 1 - (1 - ATTAINMENT) * len(self.day) / len(self._peak)
        deployment = self.deployment(prefill, decode, 0)
        return not simulate(deployment, self._peak, lost).stopped

    def follow(self, name: str, policy: Policy, first: tuple[int, int]) -> Row:
        begun_s = time.perf_counter()
        history = self._history(policy)
        dynamics = Dynamics(policy=policy, start_s=self.start_s, history=history)
        simulation = Simulation(self.deployment(*first, 0), self.day, dynamics=dynamics)
        outcome, record = simulation.run(), simulation.record
        return Row(
            name,
            *first,
            0,
            outcome.attainment,
            record.accelerator_hours,
            max(record.turns_an_hour.values(), default=0.0),
            record.switches,
            record.most_accelerators,
            time.perf_counter() - begun_s,
        )

    def _history(self, policy: Policy) -> dict[Role, tuple[float, ...]]:
        """What a forecast with seasons has seen of two other days."""
        if policy.forecast.season_s is None:
            return {}
        samples = round(self.day_s / policy.forecast.sample_s)
        seen = [day_workload(self._trace, self.case, self.day_s, seed) for seed in (1, 2)]
        return {
            role: tuple(np.concatenate([tokens_s(day, role, samples, self.day_s) for day in seen]))
            for role in (Role.PREFILL, Role.DECODE)
        }

    def capacity(self, plan: Row) -> dict[Role, float]:
        """Tokens per second of one instance at the day's peak."""
        day, peak = self.day, self.case.peak_rps
        return {
            Role.PREFILL: peak * float(day.prompt_tokens.mean()) / plan.prefill,
            Role.DECODE: peak * float(day.output_tokens.mean()) / plan.decode,
        }

    def oracle(self, capacity: dict[Role, float]) -> Row:
        rates = {role: tokens_s(self.day, role, ORACLE_SAMPLES, self.day_s) for role in capacity}
        whole = sum(np.maximum(np.ceil(rates[role] / capacity[role]), 1) for role in capacity)
        counts = np.minimum(whole, ACCELERATORS)
        hours = float(np.mean(counts)) * self.day_s / 3600
        return Row("oracle", 0, 0, 0, 1.0, hours, most_accelerators=int(np.max(counts)))

    def policy(self, file: str, capacity: dict[Role, float], *, switch: bool) -> Policy:
        """A shipped policy for this fleet and this length of a day."""
        shipped = parse_policy((POLICIES / file).read_text())
        values, faster = shipped.model_dump(), DAY_S / self.day_s
        values |= {"budget_accelerators": ACCELERATORS, "role_switch": switch}
        for role, tokens in capacity.items():
            values["roles"][role.value]["max_replicas"] = ACCELERATORS
            values["roles"][role.value]["capacity_tokens_s"] = tokens
        if shipped.forecast.season_s is not None:
            for name in ("season_s", "sample_s", "horizon_s"):
                values["forecast"][name] /= faster
        down_s = shipped.downscale_delay_s / faster
        values["downscale_delay_s"] = max(down_s, shipped.look_back_period_s)
        return type(shipped).model_validate(values)


def tokens_s(day: Workload, role: Role, samples: int, day_s: float) -> NDArray[np.float64]:
    """The day's load of a role, in samples of equal length."""
    tokens = day.prompt_tokens if role is Role.PREFILL else day.output_tokens
    edges = np.linspace(0, day_s, samples + 1)
    rates: NDArray[np.float64] = np.histogram(day.arrival_s, edges, weights=tokens)[0]
    return rates * samples / day_s


def best_static(bench: Bench) -> Iterator[Row]:
    """What is tried on the way to the smallest plan that attains.

    Aggregated plans are tried only where they would be smaller than the best separate one.
    """
    smallest = ACCELERATORS + 1
    for row in separate_plans(bench):
        smallest = min(smallest, row.most_accelerators) if attains(row) else smallest
        yield row
    below = bench.static(0, 0, smallest - 1)
    yield below
    if attains(below):
        yield from _bisect(1, smallest - 2, lambda total: bench.static(0, 0, total))


def separate_plans(bench: Bench) -> Iterator[Row]:
    """Every split that could be smaller than the best one so far.

    With more instances of either role a plan attains no less. So fewer for prefill than attain
    beside any number for decode never do, and one that misses rules out fewer for decode.
    """
    smallest = ACCELERATORS + 1
    for prefill in range(_fewest_prefill(bench), ACCELERATORS):
        most = smallest - 1 - prefill
        if most >= 1 and bench.stands_peak(prefill, most):
            for row in _ascend(bench, prefill, most):
                smallest = row.most_accelerators if attains(row) else smallest
                yield row


def _fewest_prefill(bench: Bench) -> int:
    def enough(prefill: int) -> bool:
        stands = bench.stands_peak(prefill, ACCELERATORS)
        return stands and attains(bench.static(prefill, ACCELERATORS, 0))

    return 1 + bisect_left(range(1, ACCELERATORS), 1, key=enough)


def _ascend(bench: Bench, prefill: int, most: int) -> Iterator[Row]:
    """From the fewest decode instances that stand the peak to the fewest that attain."""
    fewest = 1 + bisect_left(range(1, most), 1, key=lambda one: bench.stands_peak(prefill, one))
    for decode in range(fewest, most + 1):
        row = bench.static(prefill, decode, 0)
        yield row
        if attains(row):
            return


def attains(row: Row) -> bool:
    return row.attainment >= ATTAINMENT


def _bisect(low: int, high: int, of_size: Callable[[int], Row]) -> Iterator[Row]:
    while low <= high:
        middle = (low + high) // 2
        row = of_size(middle)
        yield row
        low, high = (low, middle - 1) if attains(row) else (middle + 1, high)


def rows_of(bench: Bench, arguments: argparse.Namespace) -> Iterator[tuple[Row, float | None]]:
    """Each row once it is known, with its accelerator-hours below the best static plan's."""
    enough: list[Row] = []
    given = (bench.static(*plan) for plan in arguments.static)
    for row in given if arguments.static else best_static(bench):
        enough += [row] if attains(row) else []
        yield row, None
    best_hours = min(row.accelerator_hours for row in enough)
    separate = min((row for row in enough if not row.mixed), key=lambda row: row.most_accelerators)
    for row in followers(bench, separate, arguments.policies):
        yield row, 1 - row.accelerator_hours / best_hours


def followers(bench: Bench, separate: Row, titles: Sequence[str]) -> Iterator[Row]:
    capacity = bench.capacity(separate)
    yield bench.oracle(capacity)
    first = ceil(separate.prefill / 2), ceil(separate.decode / 2)
    for title in titles:
        for switch in (False, True):
            policy = bench.policy(f"{title}.yaml", capacity, switch=switch)
            yield bench.follow(f"{title}, roles switch" if switch else title, policy, first)


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(CASES[name], arguments.data, arguments.day_s, arguments.start_s)
    if not arguments.json:
        print(f"{name}: {len(bench.day)} requests\n{HEADING}", flush=True)
    rows = []
    for row, fewer in rows_of(bench, arguments):
        rows.append(asdict(row) | {"fewer_hours": fewer})
        if not arguments.json:
            show(rows[-1])
    if not arguments.json:
        for title in arguments.policies:
            print(f"  {bound(title)}")
    return {"trace": name, "requests": len(bench.day), "rows": rows}


def bound(title: str) -> str:
    cooldown_s = parse_policy((POLICIES / f"{title}.yaml").read_text()).cooldown_s
    most = 3600 / cooldown_s
    return f"{title}: its cool-down of {cooldown_s:g} s bounds turns/h of a role to {most:g}"


HEADING = f"  {'':24} attained  acc-hours  fewer  turns/h  switches  most  wall_s"


def show(row: dict[str, Any]) -> None:
    attained = f"{row['attainment']:.1%}" if row["attainment"] else f"< {ATTAINMENT:.0%}"
    fewer = "" if row["fewer_hours"] is None else f"{row['fewer_hours']:.1%}"
    print(
        f"  {row['name']:24} {attained:>8} {row['accelerator_hours']:10.2f} "
        f"{fewer:>6} {row['turns_an_hour']:8.1f} {row['switches']:9} "
        f"{row['most_accelerators']:5} {row['wall_s']:7.1f}",
        flush=True,
    )


def plan_of(text: str) -> tuple[int, int, int]:
    prefill, decode, mixed = (int(count) for count in text.split(","))
    return prefill, decode, mixed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="*", default=list(CASES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--day-s", type=float, default=3600.0, help="how long the day lasts")
    parser.add_argument(
        "--start-s",
        type=float,
        default=120.0,
        help="until an instance serves, in a day of 24 hours",
    )
    parser.add_argument(
        "--static",
        type=plan_of,
        nargs="*",
        default=(),
        metavar="P,D,MIXED",
        help="static plans in place of a search, a separate one among them",
    )
    parser.add_argument("--policies", nargs="*", default=["reactive", "predictive"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [compare(name, arguments) for name in arguments.traces]
    if arguments.json:
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
