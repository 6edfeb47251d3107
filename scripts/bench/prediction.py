#!/usr/bin/env python3
"""Whether predictions come true here: profile, plan, serve two deployments, bench, and compare.

    python scripts/bench/prediction.py [--model demo] [--ttft 0.5] [--tpot 0.05] [--requests 120]
        [--shares 0.25,0.5,0.75,1.0] [--prompt 128] [--output 32] [--rounds 3] [--quick] [--json]
        [--folder DIR] [--stages prepare,measure,report] [--deployments aggregated,split,planned]

The model is profiled on one core, and a plan made for two. Two mixed instances of a core each, one
prefill beside one decode instance, and what was planned if it is neither, are then served by
`tandem serve` and driven by `tandem bench` at shares of the rate that the plan is predicted to
serve; `tandem simulate` predicts the same requests at the same rates. Each rate sends the same
prompts to one server, so prefixes are not cached: later rates would find their prompts computed.
The profile also tells what passes cost beside a busy neighbour, and what serving adds to them,
since the generator and the gateway share the two cores with the instances.

A virtual machine's pace drifts, as others of its host compute: in each of several rounds it is
profiled anew, then every deployment is driven at every rate, and what a round measured is compared
with what its own profile said. The plan and the rates are by the first. Printed are medians: of the
predictions, of the measurements, and of how far one was off the other in each round. How far rounds
lie apart is printed beside it, and how near the first comes to the others: no prediction can be
expected to come nearer than the same requests to themselves.

Two predictions are compared with each measurement. One is by the profile as it was taken. For the
other, a process of its own times passes of the model every now and then, while a server is profiled
and while a rate is driven: it is by the profile with its times made as much longer as these take
longer. Nothing that was measured of the server or the rate goes into it.

Where the time to the first token and to the second went is told for the mean request, as predicted
and as measured. With a folder the stages may run one by one, and a rate that was measured is not
measured again, unless other processes, or other guests of the host, took processors meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from prediction_report import (
    MEASURED,
    PLAN,
    ROOT,
    TANDEM,
    WORKLOAD,
    profile_of,
    read_measured,
    report,
    tandem,
)
from shapes import SHAPES, write_checkpoint

from cluster.profiling.one_rank import RankSettings
from cluster.profiling.others import Others, least_disturbed
from cluster.profiling.speed import SpeedProbe, speed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cluster.profiling.speed import Speed

FLEET = {"nodes": [{"device": "cpu-core", "count": 1, "devices": 2}]}
DEPLOYMENTS = {"aggregated": {"mixed": 2}, "split": {"prefill": 1, "decode": 1}}
PLANNED = "planned"
SPREAD = 0.5
"""Of the logarithm of the lengths."""
STOP_S = 60
STAGES = ["prepare", "measure", "report"]
RATES = "rates.json"


def main() -> None:
    options = parse()
    with working_folder(options) as folder:
        if "prepare" in options.stages:
            prepare(folder, options)
        if "measure" in options.stages:
            for turn in range(options.rounds):
                profile(folder, turn, options)
                for deployment in options.deployments:
                    measure(folder, deployment, turn, options.tries)
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
    parser.add_argument("--rounds", type=int, default=3, help="of profile and rates")
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
    profile(folder, 0, options)
    plan = make_plan(folder, options)
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


def profile(folder: Path, turn: int, options: argparse.Namespace) -> None:
    """Unless it is there already."""
    path = profile_of(folder, turn)
    if not path.exists():
        model, passes = checkpoint(folder, options.model), ["--quick"] if options.quick else []
        beside = ("--neighbours=1", "--serving=1", f"--seed={turn}")
        tandem("profile", model, "-o", path, "--device=cpu", *beside, *passes)


def make_plan(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    model, workload = checkpoint(folder, options.model), write_workload(folder / WORKLOAD, options)
    fleet, plan = folder / "fleet.yaml", folder / PLAN
    fleet.write_text(yaml.safe_dump(FLEET))
    targets = ("--ttft", options.ttft, "--tpot", options.tpot, "--attainment", options.attainment)
    given = ("--hardware", fleet, "--workload", workload, "--profile", profile_of(folder, 0))
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


def measure(folder: Path, deployment: str, turn: int, most_tries: int) -> None:
    """Every rate that has not been measured yet; each is kept as soon as it is."""
    known = {(one["deployment"], one["rate_rps"], one["turn"]) for one in read_measured(folder)}
    rates = [rate for rate in read_rates(folder) if (deployment, rate, turn) not in known]
    if not rates:
        return
    plan = folder / f"{deployment}.yaml"
    if not plan.exists():
        return
    served = yaml.safe_load(plan.read_text())
    targets = ("--ttft", served["slo"]["ttft_s"], "--tpot", served["slo"]["tpot_s"])
    with SpeedProbe(RankSettings(served["model"])) as probe, serving(plan) as url:
        for rate in rates:
            given = ("--workload", folder / WORKLOAD, "--rate", rate, "--json")
            bench = partial(tandem, "bench", "--url", url, *targets, *given)
            found = least_disturbed(partial(driven, bench, probe), most_tries)
            line = {"deployment": deployment, "rate_rps": rate, "turn": turn}
            line |= {"others": found.others, "speed": found.speed.described()}
            with (folder / MEASURED).open("a") as file:
                file.write(json.dumps({**line, "figures": json.loads(found.figures)}) + "\n")


@dataclass(frozen=True)
class Driven:
    others: float
    """Cores that other processes, and other guests of the host, took."""
    speed: Speed
    """Of the machine meanwhile."""
    figures: str


def driven(bench: Callable[[], str], probe: SpeedProbe) -> Driven:
    others = Others()
    probe.readings()
    text = bench()
    return Driven(others.cores, speed_of(probe.readings()), text)


def read_rates(folder: Path) -> list[float]:
    rates: list[float] = json.loads((folder / RATES).read_text())
    return rates


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


if __name__ == "__main__":
    main()
