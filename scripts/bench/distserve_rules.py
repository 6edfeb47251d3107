"""Simulates under DistServe's published rules and prints rows in its simulator's terms."""

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
from placement.published.distserve_rules import (  # noqa: E402
    Layout,
    Outcome,
    Parallel,
    Requests,
    goodput_per_accelerator,
    simulate,
)
from placement.workload_files import read_columns  # noqa: E402

REFERENCE = ROOT.parent / "shared" / "data" / "reference"
COLUMNS = ("unit_arrival_s", "input_len", "output_len")
LEAST, MOST = 1e-6, 1e6
LIMITS = (
    ("rate", LEAST, MOST),
    ("ttft", LEAST, MOST),
    ("tpot", LEAST, MOST),
    ("goodput", LEAST, 1.0),
    ("search_high", LEAST, MOST),
    ("resolution", LEAST, MOST),
)
PERCENTILES = ("mean", "p50", "p90", "p99")


def main() -> int:
    args = _arguments()
    try:
        if args.all:
            return _print_all(args)
        _print_one(args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="opt-13b")
    parser.add_argument("--prefill", type=_parallel, metavar="TPxPP")
    parser.add_argument("--decode", type=_parallel, metavar="TPxPP")
    parser.add_argument("--aggregated", type=_parallel, metavar="TPxPP")
    parser.add_argument("--workload", type=Path, help=f"CSV with {', '.join(COLUMNS)}")
    parser.add_argument("--rate", type=float, help="requests per second")
    parser.add_argument("--ttft", type=float, default=0.25, help="seconds")
    parser.add_argument("--tpot", type=float, default=0.1, help="seconds")
    parser.add_argument("--goodput", type=float, metavar="ATTAINMENT", help="bisect the rate")
    parser.add_argument("--search-high", type=float, default=16.0, help="requests/s per GPU")
    parser.add_argument("--resolution", type=float, default=0.01, help="requests/s per GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true", help="every reference row, with deviations")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    return parser.parse_args()


def _parallel(text: str) -> Parallel:
    tensor, _, pipeline = text.partition("x")
    try:
        parallel = Parallel(int(tensor), int(pipeline or 1))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected TPxPP, as in 2x1") from error
    if parallel.tensor < 1 or parallel.pipeline < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: both at least 1")
    return parallel


def _layout(args: argparse.Namespace) -> Layout:
    model = args.model.rpartition("/")[2]
    if args.aggregated and not (args.prefill or args.decode):
        return Layout(model, args.aggregated, None)
    if args.prefill and args.decode and not args.aggregated:
        return Layout(model, args.prefill, args.decode)
    raise BadConfig("layout", None, "give --prefill and --decode, or --aggregated")


def read_workload(path: Path) -> Requests:
    load = read_columns(path, COLUMNS)
    return Requests(load.arrival_s, load.prompt_tokens, load.output_tokens)


def _check(args: argparse.Namespace) -> None:
    if args.workload is None or (args.rate is None and args.goodput is None):
        raise BadConfig("arguments", None, "needs --workload, and --rate or --goodput")
    for name, least, most in LIMITS:
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            rule = f"must be from {least:g} to {most:g}"
            raise BadConfig(name.replace("_", "-"), value, rule)


def _print_one(args: argparse.Namespace) -> None:
    _check(args)
    layout, requests = _layout(args), read_workload(args.workload)
    started = time.perf_counter()
    row: dict[str, Any] = describe(layout, args.workload, len(requests.arrival_s))
    row |= {"ttft_slo_ms": args.ttft * 1e3, "tpot_slo_ms": args.tpot * 1e3}
    if args.goodput is not None:
        goodput = goodput_per_accelerator(
            layout,
            requests,
            ttft_s=args.ttft,
            tpot_s=args.tpot,
            attainment=args.goodput,
            high_rps=args.search_high,
            resolution_rps=args.resolution,
        )
        row |= {
            "attainment": args.goodput,
            "goodput_rps_per_gpu": goodput,
            "goodput_joint90_rps_per_gpu" if args.goodput == 0.9 else "goodput_joint": goodput,
            "goodput_rps": goodput * layout.accelerators,
        }
    if args.rate is not None:
        outcome = simulate(layout, requests.at_rate(args.rate))
        row |= {"rate_rps": args.rate, "per_gpu_rate_rps": args.rate / layout.accelerators}
        row |= figures(outcome, args.ttft, args.tpot)
    row["wall_s"] = round(time.perf_counter() - started, 4)
    print(json.dumps(row) if args.json else "\n".join(f"{k:28} {v}" for k, v in row.items()))


def describe(layout: Layout, workload: Path, count: int) -> dict[str, Any]:
    decode = layout.decode or Parallel(0, 0)
    return {
        "model": f"facebook/{layout.model}",
        "backend": "distserve" if layout.decode else "vllm",
        "n_prefill_inst": 1,
        "n_decode_inst": 1 if layout.decode else 0,
        "tp_prefill": layout.prefill.tensor,
        "pp_prefill": layout.prefill.pipeline,
        "tp_decode": decode.tensor,
        "pp_decode": decode.pipeline,
        "num_gpus": layout.accelerators,
        "workload": workload.name.removesuffix(".csv").removesuffix(".unit"),
        "n_requests": count,
    }


def figures(outcome: Outcome, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    shares = outcome.attainment(ttft_s, tpot_s)
    row: dict[str, Any] = {
        f"attain_{name}_pct": 100 * share
        for name, share in zip(("ttft", "tpot", "both"), shares, strict=True)
    }
    for name, values in (("ttft", outcome.ttft_s), ("tpot", outcome.tpot_s)):
        row |= {f"{name}_{p}_ms": 1e3 * _percentile(values, p) for p in PERCENTILES}
    row |= {f"e2e_{p}_ms": 1e3 * _percentile(outcome.e2e_s, p) for p in ("p50", "p99")}
    row["makespan_s"] = outcome.makespan_s
    row["p90_criterion_met"] = bool(
        _percentile(outcome.ttft_s, "p90") < ttft_s and _percentile(outcome.tpot_s, "p90") < tpot_s
    )
    return row


def _percentile(values: Any, which: str) -> float:
    return float(values.mean() if which == "mean" else np.percentile(values, int(which[1:])))


def _print_all(args: argparse.Namespace) -> int:
    runs = _compare_runs(args.reference)
    goodputs = _compare_goodputs(args.reference)
    return 0 if runs and goodputs else 1


def _reference_layout(row: dict[str, str]) -> Layout:
    model = row["model"].rpartition("/")[2]
    prefill = Parallel(int(row["tp_prefill"]), int(row["pp_prefill"]))
    aggregated = row["backend"] == "vllm"
    decode = None if aggregated else Parallel(int(row["tp_decode"]), int(row["pp_decode"]))
    return Layout(model, prefill, decode)


def _reference_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise BadConfig("reference", str(path), "no such file")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _compare_runs(reference: Path) -> bool:
    """Each row's deviations: attainment in points, the others in percent; allowed 1.0 and 2%."""
    good = True
    print("config rate_rps  points(ttft tpot both)  worst_percentile_%  wall_ms  speedup")
    for row in _reference_rows(reference / "simdistserve_runs.csv"):
        requests = read_workload(reference / f"{row['workload']}.unit.csv")
        started = time.perf_counter()
        outcome = simulate(_reference_layout(row), requests.at_rate(float(row["rate_rps"])))
        wall_s = time.perf_counter() - started
        ours = figures(outcome, float(row["ttft_slo_ms"]) / 1e3, float(row["tpot_slo_ms"]) / 1e3)
        points = [ours[k] - float(row[k]) for k in ours if k.startswith("attain")]
        worst = max(
            (100 * abs(ours[k] / float(row[k]) - 1), k) for k in ours if k.endswith(("_ms", "n_s"))
        )
        fits = max(map(abs, points)) <= 1.0 and worst[0] <= 2.0
        good &= fits
        print(
            f"{row['config_id']:6} {float(row['rate_rps']):6.2f}  "
            + " ".join(f"{p:+7.2f}" for p in points)
            + f"  {worst[0]:8.4f} ({worst[1]})  {wall_s * 1e3:7.1f}"
            + f"  {float(row['wall_s']) / wall_s:6.0f}x  {'ok' if fits else 'DEVIATES'}"
        )
    return good


def _compare_goodputs(reference: Path) -> bool:
    good = True
    print("config goodput/GPU: theirs, ours, deviation %, wall_s (theirs, ours)")
    for row in _reference_rows(reference / "simdistserve_goodput.csv"):
        requests = read_workload(reference / f"{row['workload']}.unit.csv")
        layout = _reference_layout(row)
        ttft_s, tpot_s = (float(row[f"{name}_slo_ms"]) / 1e3 for name in ("ttft", "tpot"))
        started = time.perf_counter()
        ours = goodput_per_accelerator(
            layout, requests, ttft_s=ttft_s, tpot_s=tpot_s, attainment=0.9
        )
        wall_s = time.perf_counter() - started
        theirs = float(row["goodput_joint90_rps_per_gpu"])
        deviation = 100 * (ours / theirs - 1)
        good &= abs(deviation) <= 2.0
        print(
            f"{row['config_id']:6} {theirs:8.4f} {ours:8.4f} {deviation:+7.3f}"
            f"  {row['wall_s']} {wall_s:.2f}  {'ok' if abs(deviation) <= 2 else 'DEVIATES'}"
        )
    return good


if __name__ == "__main__":
    sys.exit(main())
