#!/usr/bin/env python3
"""Whether predictions come true here: profile, plan, serve two deployments, bench, and compare.

    python scripts/bench/prediction.py [--model demo] [--ttft 0.5] [--tpot 0.05] [--requests 120]
        [--shares 0.25,0.5,0.75,1.0] [--prompt 128] [--output 32] [--quick] [--json]
        [--folder DIR] [--stages prepare,measure,report] [--deployments aggregated,split,planned]

The model is profiled on one core, and a plan made for two. Two mixed instances of a core each, one
prefill beside one decode instance, and what was planned if it is neither, are then served by
`tandem serve` and driven by `tandem bench` at shares of the rate that the plan is predicted to
serve; `tandem simulate` predicts the same requests at the same rates. Each rate sends the same
prompts to one server, so prefixes are not cached: later rates would find their prompts computed.
The profile also tells what passes cost beside a busy neighbour, and what serving adds to them,
since the generator and the gateway share the two cores with the instances. How far a figure would
lie from itself, were it measured again over as many requests, is printed beside it (a block
bootstrap), and so is how far off the prediction would be for a machine as fast as this one was
while that rate was driven: what else runs on a virtual machine's host slows it down by half for
seconds. With a folder the stages may run one by one, and a rate that was measured is not measured
again. Rates during which other processes computed are measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from machine_speed import watched
from shapes import SHAPES, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).resolve().parents[2]
TANDEM = (sys.executable, "-m", "cluster")
FLEET = {"nodes": [{"device": "cpu-core", "count": 1, "devices": 2}]}
DEPLOYMENTS = {"aggregated": {"mixed": 2}, "split": {"prefill": 1, "decode": 1}}
PLANNED = "planned"
RESAMPLES = 200
FIGURES = (("ttft_s", "p50"), ("ttft_s", "p90"), ("tpot_s", "p50"), ("tpot_s", "p90"))
SPREAD = 0.5
"""Of the logarithm of the lengths."""
SAME = 0.02
"""What two deployments serve is told apart from here on."""
LATENCY_WITHIN, ATTAINMENT_WITHIN = 0.15, 0.05
STOP_S = 60
DISTURBED_CORES = 0.1
"""Measured again where other processes took more of this machine."""
STAGES = ["prepare", "measure", "report"]
PROFILE, SLOWED_PROFILE = "profile.json", "slowed.json"
WORKLOAD, PLAN, RATES, MEASURED = "load.csv", "plan.yaml", "rates.json", "measured.jsonl"
SAMPLES, SPEED = "samples.csv", "speed.json"


@dataclass(frozen=True)
class Row:
    deployment: str
    rate_rps: float
    figure: str
    predicted: float
    measured: float
    sampling: float | None
    """The standard error of what was measured, relative to it."""

    @property
    def off(self) -> float:
        """Of a latency, relative to what was measured; of attainment, in points."""
        difference = self.predicted - self.measured
        return difference if self.figure == "attainment" else difference / self.measured


def main() -> None:
    options = parse()
    with working_folder(options) as folder:
        if "prepare" in options.stages:
            prepare(folder, options)
        if "measure" in options.stages:
            for deployment in options.deployments:
                measure(folder, deployment, options.tries)
        if "report" in options.stages:
            report(folder, as_json=options.json)


@contextmanager
def working_folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        yield options.folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help=f"also {', '.join(SHAPES)}: random weights")
    parser.add_argument("--ttft", type=float, default=0.5)
    parser.add_argument("--tpot", type=float, default=0.05)
    parser.add_argument("--attainment", type=float, default=0.9)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--shares", type=numbers, default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--prompt", type=int, default=128, help="median tokens")
    parser.add_argument("--output", type=int, default=32, help="median tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="profile fewer passes")
    parser.add_argument("--folder", type=Path, help="keeps what is made here, to go on later")
    parser.add_argument("--stages", type=names_of(STAGES), default=STAGES)
    every = [*DEPLOYMENTS, PLANNED]
    parser.add_argument("--deployments", type=names_of(every), default=every)
    parser.add_argument("--tries", type=int, default=3, help="at a rate that others disturbed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.folder is None and set(options.stages) != set(STAGES):
        parser.error("--stages needs a --folder that keeps what other stages made")
    return options


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}")
        return chosen

    return names


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


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """A profile, a plan, the two deployments, and the rates to drive them at."""
    workload = write_workload(folder / WORKLOAD, options)
    plan = make_plan(folder, checkpoint(folder, options.model), workload, options)
    for deployment, entries in deployments(plan).items():
        write_deployment(folder / f"{deployment}.yaml", plan, entries)
    rates = [plan["predicted"]["goodput_rps"] * share for share in options.shares]
    (folder / RATES).write_text(json.dumps(rates))
    (folder / MEASURED).unlink(missing_ok=True)


def checkpoint(folder: Path, model: str) -> str:
    """A shape's name stands for random weights, with the built-in model's tokenizer."""
    if model not in SHAPES:
        return model
    directory = folder / model
    if not directory.exists():
        write_checkpoint(SHAPES[model], "bfloat16", directory)
        for path in (ROOT / "engine" / "demo").glob("token*.json"):
            shutil.copy(path, directory)
    return str(directory)


def make_plan(
    folder: Path, model: str, workload: Path, options: argparse.Namespace
) -> dict[str, Any]:
    fleet, profile, plan = (folder / name for name in ("fleet.yaml", PROFILE, PLAN))
    fleet.write_text(yaml.safe_dump(FLEET))
    if not profile.exists():
        rounds = ["--quick"] if options.quick else []
        beside = ("--neighbours=1", "--serving", "--tensor-parallel=2")
        with watched() as speed:
            tandem("profile", model, "-o", profile, "--device=cpu", *beside, *rounds)
        (folder / SPEED).write_text(json.dumps(speed.undisturbed_s))
    targets = ("--ttft", options.ttft, "--tpot", options.tpot, "--attainment", options.attainment)
    given = ("--hardware", fleet, "--workload", workload, "--profile", profile)
    made = tandem("plan", "--model", model, *given, *targets, "-o", plan, "--json")
    answer: dict[str, Any] = json.loads(made)
    return answer


def deployments(plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Their pools; what was planned stands for itself unless it is one of the others."""
    found = {
        name: [
            {"role": role, "instances": count, "device": "cpu-core", "tensor_parallel": 1}
            for role, count in pools.items()
        ]
        for name, pools in DEPLOYMENTS.items()
    }
    planned = {(one["role"], one["instances"], one["tensor_parallel"]) for one in plan["pools"]}
    known = [
        {(one["role"], one["instances"], one["tensor_parallel"]) for one in entries}
        for entries in found.values()
    ]
    return found if planned in known else {**found, PLANNED: plan["pools"]}


def write_deployment(path: Path, plan: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    kept = {key: plan[key] for key in ("model", "slo", "hardware")}
    engine = {**plan.get("engine", {}), "cache_prefixes": False}
    path.write_text(yaml.safe_dump({**kept, "engine": engine, "pools": entries}))


def measure(folder: Path, deployment: str, most_tries: int) -> None:
    """Every rate that has not been measured yet; each is kept as soon as it is."""
    known = {(one["deployment"], one["rate_rps"]) for one in read_measured(folder)}
    rates = [rate for rate in read_rates(folder) if (deployment, rate) not in known]
    if not rates:
        return
    plan, samples = folder / f"{deployment}.yaml", folder / SAMPLES
    if not plan.exists():
        return
    slo = yaml.safe_load(plan.read_text())["slo"]
    profiled_s = json.loads((folder / SPEED).read_text())
    targets = ("--ttft", slo["ttft_s"], "--tpot", slo["tpot_s"])
    with serving(plan) as url:
        for rate in rates:
            given = ("--workload", folder / WORKLOAD, "--rate", rate, "--json", "--csv", samples)
            bench = partial(tandem, "bench", "--url", url, *targets, *given)
            others, slower, figures = undisturbed(bench, most_tries, profiled_s)
            line = {"deployment": deployment, "rate_rps": rate, "others": others, "slower": slower}
            line["sampling"] = sampling_errors(samples)
            with (folder / MEASURED).open("a") as file:
                file.write(json.dumps({**line, "figures": json.loads(figures)}) + "\n")


def sampling_errors(samples: Path) -> dict[str, float]:
    """Of each figure, relative to it, from resampled runs of successive requests: neighbours in
    time wait for the same things."""
    generator = np.random.default_rng(0)
    with samples.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["ttft_s"] and row["tpot_s"]]
    run = max(1, round(len(rows) ** 0.5))
    starts = generator.integers(0, max(len(rows) - run, 1), (RESAMPLES, -(-len(rows) // run)))
    chosen = (starts[..., None] + np.arange(run)).reshape(RESAMPLES, -1)
    errors = {}
    for name, point in FIGURES:
        values = np.array([float(row[name]) for row in rows])
        share = float(point[1:]) / 100
        resampled = np.quantile(values[chosen], share, axis=1)
        errors[f"{name} {point}"] = float(resampled.std() / np.quantile(values, share))
    return errors


def undisturbed(
    work: Callable[[], str], most_tries: int, profiled_s: float
) -> tuple[float, float, str]:
    """What came of it, how many cores others took meanwhile, and how many times as slow as when it
    was profiled the machine was; again if the others took too much."""
    tries: list[tuple[float, float, str]] = []
    while len(tries) < most_tries and (not tries or tries[-1][0] > DISTURBED_CORES):
        began_s, before_s = time.monotonic(), foreign_s()
        with watched() as speed:
            text = work()
        others = (foreign_s() - before_s) / (time.monotonic() - began_s)
        tries.append((max(others, 0.0), speed.mean_s / profiled_s, text))
    return min(tries)


def foreign_s() -> float:
    """Processor time of this machine that went neither to this process nor to what it began."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft_irq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = sum(processor_ticks(one) for one in family(os.getpid())) / ticks
    busy_s = (user + nice + system + irq + soft_irq) / ticks
    return busy_s - own_s - ended.ru_utime - ended.ru_stime


def family(first: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = stat_fields(path)
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [first]
    for one in found:
        found += children.get(one, [])
    return found


def processor_ticks(process: int) -> int:
    fields = stat_fields(Path(f"/proc/{process}/stat"))
    return int(fields[11]) + int(fields[12]) if fields else 0


def stat_fields(path: Path) -> list[str]:
    """From the state on; none of a process that has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_rates(folder: Path) -> list[float]:
    rates: list[float] = json.loads((folder / RATES).read_text())
    return rates


def read_measured(folder: Path) -> list[dict[str, Any]]:
    path = folder / MEASURED
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def slowed(folder: Path, times: float) -> Path:
    """The profile as it would be of a machine that takes so many times as long for everything."""
    document, path = json.loads((folder / PROFILE).read_text()), folder / SLOWED_PROFILE

    def lengthened(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: lengthened(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [lengthened(one) for one in value]
        return value * times if key in ("seconds", "ttft_s", "tpot_s", "doors_s") else value

    path.write_text(json.dumps(lengthened(document)))
    return path


def compare(folder: Path, *, at_speed: bool) -> Iterator[Row]:
    """By the profile as it is, or at the speed that the machine had while each rate was driven."""
    for one in read_measured(folder):
        deployment, rate, measured = one["deployment"], one["rate_rps"], one["figures"]
        plan = folder / f"{deployment}.yaml"
        given = ("--workload", folder / WORKLOAD, "--rate", rate, "--json")
        profile = folder / PROFILE
        if at_speed:
            profile = slowed(folder, one["slower"])
        predicted = json.loads(tandem("simulate", "--plan", plan, "--profile", profile, *given))
        for name, point in FIGURES:
            values = (predicted[name][point], measured[name][point])
            figure = f"{name} {point}"
            yield Row(deployment, rate, figure, *values, one["sampling"][figure])
        values = (predicted["attainment"], measured["attainment"])
        yield Row(deployment, rate, "attainment", *values, None)


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


def report(folder: Path, *, as_json: bool) -> None:
    plan, measured = yaml.safe_load((folder / PLAN).read_text()), read_measured(folder)
    planned = {pool["role"]: pool["instances"] for pool in plan["pools"]}
    rows, at_speed = (list(compare(folder, at_speed=way)) for way in (False, True))
    better, expected = (preferred(rows, side) for side in ("measured", "predicted"))
    others, slower = (max(one[key] for one in measured) for key in ("others", "slower"))
    if as_json:
        document = {"planned": planned, "expected": expected, "better": better, "others": others}
        lists = {"rows": rows, "rows_at_speed": at_speed}
        entries = {key: [{**asdict(r), "off": r.off} for r in one] for key, one in lists.items()}
        print(json.dumps({**document, "slower": slower, **entries}))
        return
    print(plan["reason"])
    for row, then in zip(rows, at_speed, strict=True):
        sampling = "" if row.sampling is None else f" sampling_error={row.sampling:.1%}"
        print(
            f"{row.deployment:<11} rate_rps={row.rate_rps:<7.2f} {row.figure:<11} "
            f"predicted={row.predicted:<8.4f} measured={row.measured:<8.4f} off={row.off:+.1%} "
            f"off_at_speed={then.off:+.1%}{sampling}"
        )
    print(summary("as profiled", rows))
    print(summary("at the speed that the machine had meanwhile", at_speed))
    print(f"planned={planned} expected_better={expected} measured_better={better}")
    print(
        f"other processes took up to {others:.2f} of {os.cpu_count()} cores; "
        f"the machine was up to {slower:.2f} times as slow as when it was profiled"
    )


def summary(which: str, rows: list[Row]) -> str:
    latencies = [abs(row.off) for row in rows if row.figure != "attainment"]
    shares = [abs(row.off) for row in rows if row.figure == "attainment"]
    within = sum(off <= LATENCY_WITHIN for off in latencies)
    held = sum(off <= ATTAINMENT_WITHIN for off in shares)
    return (
        f"{which}: latencies off: median {np.median(latencies):.1%}, most {max(latencies):.1%}; "
        f"{within} of {len(latencies)} within {LATENCY_WITHIN:.0%}; "
        f"attainment off by at most {max(shares) * 100:.1f} points; "
        f"{held} of {len(shares)} within {ATTAINMENT_WITHIN * 100:.0f}"
    )


def preferred(rows: list[Row], side: str) -> str:
    """What serves more within the targets; `neither` where rates tell no difference."""
    rates = {name: served(rows, name, side) for name in dict.fromkeys(r.deployment for r in rows)}
    best = max(rates, key=lambda name: rates[name])
    return "neither" if min(rates.values()) > rates[best] * (1 - SAME) else best


def served(rows: list[Row], deployment: str, side: str) -> float:
    """Requests a second within their targets, over all rates."""
    mine = [row for row in rows if (row.deployment, row.figure) == (deployment, "attainment")]
    shares = [row.measured if side == "measured" else row.predicted for row in mine]
    return sum(row.rate_rps * share for row, share in zip(mine, shares, strict=True))


if __name__ == "__main__":
    main()
