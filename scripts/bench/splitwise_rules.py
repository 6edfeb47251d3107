"""Simulates a trace under Splitwise's published rules and prints its simulator's figures."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.errors import BadConfig, BadInput  # noqa: E402
from placement.published.splitwise_rules import Fleet, Outcome, Trace, simulate  # noqa: E402
from placement.workload_files import read_columns  # noqa: E402

REFERENCE = ROOT.parent / "shared" / "data" / "reference"
COLUMNS = ("arrival_timestamp", "prompt_size", "token_size")


def main() -> int:
    args = _arguments()
    try:
        if args.all:
            return _print_all(args.reference)
        _print_one(args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bloom-176b")
    parser.add_argument("--trace", type=Path, help=f"CSV with {', '.join(COLUMNS)}")
    parser.add_argument("--baseline", type=int, default=0, help="machines, without a split")
    parser.add_argument("--prompt", type=int, default=0, help="prompt machines")
    parser.add_argument("--token", type=int, default=0, help="token machines")
    parser.add_argument("--hardware", default="h100-80gb", help="of baseline and prompt machines")
    parser.add_argument("--token-hardware", help="of token machines, as --hardware if not given")
    parser.add_argument("--until", type=float, help="requests arriving before this second only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true", help="every reference row, with deviations")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    return parser.parse_args()


def _fleet(args: argparse.Namespace) -> Fleet:
    counts = (args.baseline, args.prompt, args.token)
    if args.baseline > 0 and counts[1:] == (0, 0):
        return Fleet(args.model, (args.hardware,) * args.baseline)
    if args.baseline == 0 and args.prompt > 0 and args.token > 0:
        token_hardware = args.token_hardware or args.hardware
        return Fleet(args.model, (args.hardware,) * args.prompt, (token_hardware,) * args.token)
    raise BadConfig("machines", counts, "give --baseline, or --prompt and --token, each positive")


def read_trace(path: Path, until_s: float | None = None) -> Trace:
    load = read_columns(path, COLUMNS)
    if until_s is not None:
        load = load.between(0.0, until_s)
    if not len(load):
        raise BadConfig("until", until_s, "no request arrives before")
    return Trace(load.arrival_s, load.prompt_tokens, load.output_tokens)


def figures(trace: Trace, outcome: Outcome) -> dict[str, Any]:
    count = len(trace.arrival_s)
    row: dict[str, Any] = {"n_requests": count, "n_completed": count}
    row["offered_rps"] = count / max(np.ceil(trace.arrival_s[-1]), 1.0)
    timings = {
        "ttft": outcome.ttft_s,
        "tbt": outcome.tbt_s,
        "e2e": outcome.e2e_s,
        "queue": outcome.queue_s,
    }
    for name, values in timings.items():
        row |= {f"{name}_p{p}_s": float(np.percentile(values, p)) for p in (50, 90, 99)}
    row["makespan_s"] = outcome.makespan_s
    row["throughput_rps"] = count / outcome.makespan_s
    row["out_tok_per_s"] = float(trace.output_tokens.sum()) / outcome.makespan_s
    row["rps_completed_in_120s"] = float((outcome.completed_s <= 120).sum()) / 120
    return row


def _print_one(args: argparse.Namespace) -> None:
    if args.trace is None:
        raise BadConfig("arguments", None, "needs --trace")
    fleet, trace = _fleet(args), read_trace(args.trace, args.until)
    started = time.perf_counter()
    row: dict[str, Any] = {
        "model": args.model,
        "prompt_machines": list(fleet.prompt_hardware),
        "token_machines": list(fleet.token_hardware),
        "trace": args.trace.stem,
    }
    row |= figures(trace, simulate(fleet, trace))
    row["wall_s"] = round(time.perf_counter() - started, 3)
    print(json.dumps(row) if args.json else "\n".join(f"{k:24} {v}" for k, v in row.items()))


def _reference_fleet(row: dict[str, str]) -> Fleet:
    model = row["model"].split()[0]
    counts = {
        "h100-80gb": int(row["n_h100"]),
        "a100-80gb": int(row["n_a100"]),
        "h100-80gb-pcap": int(row["n_h100cap"]),
    }
    hardware = tuple(name for name, count in counts.items() for _ in range(count))
    if row["scheduler"] == "token_jsq":
        return Fleet(model, hardware)
    prompts = int(row["layout"].split(" prompt")[0])
    return Fleet(model, hardware[:prompts], hardware[prompts:])


def _print_all(reference: Path) -> int:
    """Each figure beside the reference's, in percent; 3% are allowed."""
    good = True
    path = reference / "splitwise_runs.csv"
    if not path.is_file():
        raise BadConfig("reference", str(path), "no such file")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        trace = read_trace(reference / f"{row['trace']}.csv")
        started = time.perf_counter()
        ours = figures(trace, simulate(_reference_fleet(row), trace))
        wall_s = time.perf_counter() - started
        print(f"{row['config']}: {wall_s:.2f} s, theirs {row['wall_s']} s")
        for name, value in ours.items():
            theirs = float(row[name])
            deviation = abs(value - theirs) if theirs == 0 else abs(value / theirs - 1) * 100
            good &= deviation <= 3.0
            verdict = "ok" if deviation <= 3 else "DEVIATES"
            print(f"  {name:24} {theirs:12.6g} {value:12.6g} {deviation:8.4f}%  {verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
