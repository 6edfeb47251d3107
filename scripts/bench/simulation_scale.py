"""Simulates a million requests on a thousand instances: wall time, and memory at its highest."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.messages import Role  # noqa: E402
from engine.slo import Slo  # noqa: E402
from placement.latency.catalog import find_model, one_kind  # noqa: E402
from placement.planning.candidate import Candidate, deployment_of  # noqa: E402
from placement.planning.costbook import CostBook, Cut  # noqa: E402
from placement.planning.plan import PoolPlan, Target  # noqa: E402
from placement.simulation.cells import simulate_cells  # noqa: E402
from placement.simulation.deployment import Overheads  # noqa: E402
from placement.workload import Arrivals, LengthModel, synthetic  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--cell", type=int, default=8, help="instances a router looks after")
    parser.add_argument("--rate", type=float, default=4.0, help="requests/s per instance")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    cut = Cut("h100-80gb")
    book = CostBook(find_model("llama-3.1-8b"), one_kind("h100-80gb", 1, 8))
    half = args.cell // 2
    pools = (PoolPlan(Role.PREFILL, half, cut), PoolPlan(Role.DECODE, args.cell - half, cut))
    target = Target(1.0, 0.05)
    cell = deployment_of(book, Candidate(pools, 2048), target, Overheads())
    assert cell.slo == Slo(1.0, 0.05)
    generator = np.random.default_rng(0)
    lengths = LengthModel((5.0, 4.0), ((0.6, 0.1), (0.1, 0.5)), (4, 2), (2000, 600))
    times = Arrivals(generator).times(args.requests, args.rate * args.instances)
    workload = synthetic(lengths, times, generator)
    started = time.perf_counter()
    outcome = simulate_cells(cell, workload, args.instances // args.cell, args.processes)
    wall_s = time.perf_counter() - started
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    figures = outcome.figures()
    print(
        f"requests={args.requests} instances={args.instances} cell={args.cell} "
        f"wall_s={wall_s:.1f} cpu_s={cpu_s:.1f} us_per_request={wall_s / args.requests * 1e6:.0f} "
        f"peak_mb={max(usage.ru_maxrss for usage in usages) / 1024:.0f}"
    )
    print(
        f"finished={figures['finished']} attainment={figures['attainment']:.4f} "
        f"virtual_s={figures['duration_s']:.0f} ttft_p90_s={figures['ttft_s']['p90']:.4f} "
        f"tpot_p90_s={figures['tpot_s']['p90']:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
