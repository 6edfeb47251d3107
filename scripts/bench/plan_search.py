"""A whole OPT-66B search on four nodes of eight A100, beside what simdistserve takes.

Full search, both phases, every candidate by the project's own schedulers; simdistserve's figures
are its wall times on the same workload (reference/simdistserve_goodput.csv).
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from placement.latency.catalog import find_model, one_kind  # noqa: E402
from placement.planning.costbook import CostBook  # noqa: E402
from placement.planning.optimizer import plan  # noqa: E402
from placement.planning.plan import Target  # noqa: E402
from placement.planning.question import Question  # noqa: E402
from placement.workload_files import read_workload  # noqa: E402

REFERENCE = ROOT.parent / "shared" / "data" / "reference"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="opt-66b")
    parser.add_argument("--device", default="a100-80gb")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--workload", type=Path, default=REFERENCE / "sharegpt_like_1000.unit.csv")
    parser.add_argument("--ttft", type=float, default=2.5, help="seconds")
    parser.add_argument("--tpot", type=float, default=0.15, help="seconds")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pipelined", action="store_true", help="stages work at once")
    args = parser.parse_args()
    hardware = one_kind(args.device, args.nodes, 8)
    book = CostBook(find_model(args.model), hardware, pipelined=args.pipelined)
    question = Question(
        Target(args.ttft, args.tpot),
        requests=args.requests,
        most_requests=args.requests * 8,
        processes=args.processes,
    )
    load = read_workload(args.workload)
    started = time.perf_counter()
    found = plan(book, load, question)
    print(
        f"{args.model} on {args.nodes} nodes of 8 {args.device}: "
        f"wall_s={time.perf_counter() - started:.1f} cpu_s={cpu_s():.1f} "
        f"processes={args.processes} load={os.getloadavg()[0]:.1f}"
    )
    print(f"goodput_rps={found.predicted['goodput_rps']:.2f}: {found.reason}")
    print_simdistserve(REFERENCE / "simdistserve_goodput.csv")
    return 0


def cpu_s() -> float:
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_simdistserve(path: Path) -> None:
    """One bisection of one configuration each; a search runs one for every configuration."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            layout = f"TP{row['tp_prefill']}+TP{row['tp_decode']} on {row['num_gpus']} GPUs"
            print(
                f"simdistserve, {row['model']} {layout}: wall_s={float(row['wall_s']):.1f} for "
                f"{row['n_sims']} simulations of one configuration"
            )


if __name__ == "__main__":
    sys.exit(main())
