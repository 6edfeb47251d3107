#!/usr/bin/env python3
"""Whether predictions come true here: profile, plan, serve two deployments, bench, and compare.

    python scripts/bench/prediction.py [--model demo] [--ttft 0.5] [--tpot 0.05] [--requests 120]
        [--shares 0.25,0.5,0.75,1.0] [--prompt 128] [--output 32] [--quick] [--json]

The model is profiled on one core, and a plan made for two. Two mixed instances of a core each, and
one prefill beside one decode instance, are then served by `tandem serve` and driven by `tandem
bench` at shares of the rate that the plan is predicted to serve; `tandem simulate` predicts the
same requests at the same rates. Each rate sends the same prompts to one server, so prefixes are
not cached: later rates would find their prompts computed. The generator and the gateway share the
two cores with the instances, so the lower rates say most about the model of latency.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
TANDEM = (sys.executable, "-m", "cluster")
FLEET = {"nodes": [{"device": "cpu-core", "count": 1, "devices": 2}]}
DEPLOYMENTS = {"aggregated": {"mixed": 2}, "split": {"prefill": 1, "decode": 1}}
FIGURES = (("ttft_s", "p50"), ("ttft_s", "p90"), ("tpot_s", "p50"), ("tpot_s", "p90"))
SPREAD = 0.5
"""Of the logarithm of the lengths."""
SAME = 0.02
"""What two deployments serve is told apart from here on."""
STOP_S = 60


@dataclass(frozen=True)
class Row:
    deployment: str
    rate_rps: float
    figure: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """Of a latency, relative to what was measured; of attainment, in points."""
        difference = self.predicted - self.measured
        return difference if self.figure == "attainment" else difference / self.measured


def main() -> None:
    options = parse()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload = write_workload(folder / "load.csv", options)
        plan = make_plan(folder, workload, options)
        rates = [plan["predicted"]["goodput_rps"] * share for share in options.shares]
        rows: list[Row] = []
        for deployment, pools in DEPLOYMENTS.items():
            file = write_deployment(folder / f"{deployment}.yaml", plan, pools)
            rows += compare(deployment, file, workload, rates, options)
    report(plan, rows, load, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ttft", type=float, default=0.5)
    parser.add_argument("--tpot", type=float, default=0.05)
    parser.add_argument("--attainment", type=float, default=0.9)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--shares", type=numbers, default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--prompt", type=int, default=128, help="median tokens")
    parser.add_argument("--output", type=int, default=32, help="median tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="profile fewer passes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def write_workload(path: Path, options: argparse.Namespace) -> Path:
    generator = np.random.default_rng(options.seed)
    count = options.requests
    arrival_s = np.cumsum(generator.exponential(1.0, count))
    medians = (options.prompt, options.output)
    lengths = [np.rint(generator.lognormal(np.log(m), SPREAD, count)) for m in medians]
    rows = zip(arrival_s, *lengths, strict=True)
    lines = [f"{at:.6f},{max(prompt, 4):.0f},{max(output, 2):.0f}" for at, prompt, output in rows]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]))
    return path


def make_plan(folder: Path, workload: Path, options: argparse.Namespace) -> dict[str, Any]:
    fleet, profile, plan = (folder / name for name in ("fleet.yaml", "profile.json", "plan.yaml"))
    fleet.write_text(yaml.safe_dump(FLEET))
    tandem("profile", options.model, "-o", profile, "--device=cpu", *["--quick"] * options.quick)
    targets = ("--ttft", options.ttft, "--tpot", options.tpot, "--attainment", options.attainment)
    given = ("--hardware", fleet, "--workload", workload, "--profile", profile)
    made = tandem("plan", "--model", options.model, *given, *targets, "-o", plan, "--json")
    answer: dict[str, Any] = json.loads(made)
    return answer


def write_deployment(path: Path, plan: dict[str, Any], pools: dict[str, int]) -> Path:
    entries = [
        {"role": role, "instances": count, "device": "cpu-core"} for role, count in pools.items()
    ]
    kept = {key: plan[key] for key in ("model", "slo", "hardware")}
    engine = {**plan.get("engine", {}), "cache_prefixes": False}
    path.write_text(yaml.safe_dump({**kept, "engine": engine, "pools": entries}))
    return path


def compare(
    deployment: str, plan: Path, workload: Path, rates: list[float], options: argparse.Namespace
) -> Iterator[Row]:
    targets = ("--ttft", options.ttft, "--tpot", options.tpot)
    with serving(plan) as url:
        for rate in rates:
            same = ("--workload", workload, "--rate", rate, "--json")
            predicted = json.loads(tandem("simulate", "--plan", plan, *same))
            measured = json.loads(tandem("bench", "--url", url, *targets, *same))
            for name, point in FIGURES:
                values = (predicted[name][point], measured[name][point])
                yield Row(deployment, rate, f"{name} {point}", *values)
            values = (predicted["attainment"], measured["attainment"])
            yield Row(deployment, rate, "attainment", *values)


@contextmanager
def serving(plan: Path) -> Iterator[str]:
    """The URL of a server that runs this plan; it is drained afterwards."""
    command = (*TANDEM, "serve", str(plan), "--http-port", "0", "--grpc-port", "0")
    server = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield wait_until_ready(server)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        found = re.match(r"ready http=(\S+)", line)
        if found:
            return found[1]
    raise SystemExit(f"the server ended with status {server.wait()}")


def tandem(*arguments: object) -> str:
    command = [*TANDEM, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}: {done.stderr.strip()}")
    return done.stdout


def report(plan: dict[str, Any], rows: list[Row], load: float, *, as_json: bool) -> None:
    planned = {pool["role"]: pool["instances"] for pool in plan["pools"]}
    better, expected = (preferred(rows, side) for side in ("measured", "predicted"))
    if as_json:
        document = {"planned": planned, "expected": expected, "better": better, "load": load}
        print(json.dumps({**document, "rows": [{**asdict(row), "off": row.off} for row in rows]}))
        return
    print(plan["reason"])
    for row in rows:
        print(
            f"{row.deployment:<11} rate_rps={row.rate_rps:<7.2f} {row.figure:<11} "
            f"predicted={row.predicted:<8.4f} measured={row.measured:<8.4f} off={row.off:+.1%}"
        )
    latencies = [abs(row.off) for row in rows if row.figure != "attainment"]
    shares = [abs(row.off) for row in rows if row.figure == "attainment"]
    print(
        f"latencies off: median {np.median(latencies):.1%}, most {max(latencies):.1%}; "
        f"attainment off by at most {max(shares) * 100:.1f} points"
    )
    print(f"planned={planned} expected_better={expected} measured_better={better}")
    print(f"load average before the run: {load:.1f} on {os.cpu_count()} cores")


def preferred(rows: list[Row], side: str) -> str:
    """What serves more within the targets; `neither` where rates tell no difference."""
    rates = {name: served(rows, name, side) for name in DEPLOYMENTS}
    best = max(rates, key=lambda name: rates[name])
    return "neither" if min(rates.values()) > rates[best] * (1 - SAME) else best


def served(rows: list[Row], deployment: str, side: str) -> float:
    """Requests a second within their targets, over all rates."""
    mine = [row for row in rows if (row.deployment, row.figure) == (deployment, "attainment")]
    shares = [row.measured if side == "measured" else row.predicted for row in mine]
    return sum(row.rate_rps * share for row, share in zip(mine, shares, strict=True))


if __name__ == "__main__":
    main()
