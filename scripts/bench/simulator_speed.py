"""Both of our simulators beside simdistserve: CPU time of each of its runs, on the same requests.

`ours` runs the project's own router, schedulers and block pools on DistServe's coefficients;
`rules` restates DistServe's published rules. simdistserve's figures are the wall times that its
authors' code took (reference/simdistserve_runs.csv).
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

from distserve_rules import read_workload as read_requests  # noqa: E402
from distserve_table import Row, deployment  # noqa: E402

from engine.slo import Slo  # noqa: E402
from placement.published.distserve_rules import Layout, Parallel  # noqa: E402
from placement.published.distserve_rules import simulate as simulate_rules  # noqa: E402
from placement.simulation.simulator import simulate  # noqa: E402
from placement.workload_files import read_workload  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

REFERENCE = ROOT.parent / "shared" / "data" / "reference"
WANTED = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--repeats", type=int, default=3, help="the quickest counts")
    args = parser.parse_args()
    print("config rate_rps  simdistserve_s  ours_s  faster  rules_s  faster")
    gains, rules_gains = [], []
    with (args.reference / "simdistserve_runs.csv").open(newline="", encoding="utf-8") as file:
        for run in csv.DictReader(file):
            theirs_s = float(run["wall_s"])
            ours_s, rules_s = times(run, args.reference, args.repeats)
            gains.append(theirs_s / ours_s)
            rules_gains.append(theirs_s / rules_s)
            print(
                f"{run['config_id']:6} {float(run['rate_rps']):8.2f}  {theirs_s:14.3f}  "
                f"{ours_s:6.3f}  {gains[-1]:5.1f}x  {rules_s:7.4f}  {rules_gains[-1]:5.0f}x",
                flush=True,
            )
    for name, found in (("ours", gains), ("rules", rules_gains)):
        quick = sum(gain >= WANTED for gain in found)
        print(
            f"{name}: {min(found):.1f} to {max(found):.1f} times faster, median "
            f"{np.median(found):.1f}; at least {WANTED} times in {quick} of {len(found)} runs"
        )
    return 0


def times(run: dict[str, str], reference: Path, repeats: int) -> tuple[float, float]:
    """CPU seconds with our schedulers, and by DistServe's rules."""
    path = reference / f"{run['workload']}.unit.csv"
    rate = float(run["rate_rps"])
    row = described(run)
    target, load = deployment(row), read_workload(path).at_rate(rate)
    layout = Layout(row.model, row.prefill, row.decode)
    requests = read_requests(path).at_rate(rate)
    ours_s = quickest_s(lambda: simulate(target, load), repeats)
    return ours_s, quickest_s(lambda: simulate_rules(layout, requests), repeats)


def described(run: dict[str, str]) -> Row:
    prefill = Parallel(int(run["tp_prefill"]), int(run["pp_prefill"]))
    split = run["backend"] == "distserve"
    decode = Parallel(int(run["tp_decode"]), int(run["pp_decode"])) if split else None
    target = Slo(float(run["ttft_slo_ms"]) / 1e3, float(run["tpot_slo_ms"]) / 1e3)
    return Row(run["model"].rpartition("/")[2], target, prefill, decode, 0.0)


def quickest_s(work: Callable[[], object], repeats: int) -> float:
    def once_s() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return min(once_s() for _ in range(repeats))


if __name__ == "__main__":
    sys.exit(main())
