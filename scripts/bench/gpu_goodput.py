"""Goodput of one GPU: aggregated, prefill and decode in turns, and side by side in SM shares.

    python scripts/bench/gpu_goodput.py --output figures.jsonl [--shape 8b] [--rates 2,4,8,16]
        [--ttft 0.5] [--tpot 0.02] [--only aggregated,turns,shares] [--prefill-shares 0.4,0.6]
        [--share-weights] [--device cuda|cpu] [--small]

Requests come as Poisson arrivals, half of them with long prompts and short outputs, half the other
way round. Each arrangement serves the same requests at each rate, through the gateway and instances
of a cluster in processes of their own: `aggregated` is one mixed instance with the whole GPU,
`turns` a prefill and a decode instance that the GPU serves in turns, `shares` the same kept to
parts of its multiprocessors by an MPS daemon that this starts for itself. Before it serves, each
instance's passes are timed, alone and beside the other's, and the planner's simulation of those
times gives the prediction beside each figure. Every figure is a line of the output file at once;
run again after an interruption, it goes on where it stopped. `--device cpu` shows that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from cluster.profiling.passes import passes_of
from engine.messages import Role
from engine.slo import Slo
from placement.workload import Workload
from scripts.bench.attainment import bounded, lognormal, quantiles
from scripts.bench.gpu import KNOWN_SHAPES, SMALL, Records, Sizes, machine, write_model
from scripts.bench.one_gpu import BLOCK_TOKENS, InstancePlan, serve, started
from scripts.bench.one_gpu_load import Sample, gateway_of, put, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from cluster.profiling.passes import Pass
    from scripts.bench.gpu import Figures
    from scripts.bench.one_gpu import InstanceProcess
    from scripts.bench.shapes import Shape

MPS_CONTROL = "nvidia-cuda-mps-control"
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
ATTAINMENT = 0.9
SIGMA = 0.4
WARM_UP_REQUESTS = 64
"""Served before any rate is measured: graphs are made when steps of a size are first needed."""


@dataclass(frozen=True)
class Scale:
    """Median lengths of both kinds of requests, and what else depends on the machine."""

    long_prompt: int = 4096
    short_output: int = 64
    short_prompt: int = 256
    long_output: int = 512
    kv_bytes: int = 24 << 30
    """Of each of two instances; a single one has as much as both."""
    warm_up_sequences: int = 128
    longest_pass: int = 8192
    rounds: int = 3


SMALL_SCALE = Scale(96, 4, 16, 12, 16 << 20, 4, 40, 1)


@dataclass(frozen=True)
class Arrangement:
    name: str
    roles: tuple[Role, ...]
    sm_shares: tuple[float | None, ...] = (None, None)

    @property
    def needs_mps(self) -> bool:
        return self.sm_shares[0] is not None


AGGREGATED = Arrangement("aggregated", (Role.MIXED,))
TURNS = Arrangement("turns", (Role.PREFILL, Role.DECODE))


def main() -> None:
    options = parse()
    records = Records(options.output)
    sizes, scale = (SMALL, SMALL_SCALE) if options.small else (Sizes(), Scale())
    device = torch.device(options.device)
    records.measure("machine", partial(machine, device, sizes))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, scale, records, Path(scratch))
        chosen = arrangements(options)
        for one in chosen:
            bench.serve(one)
    for one in chosen:
        if bench.has_served(one):
            bench.predict(one)
            bench.show(one)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(KNOWN_SHAPES), default="8b")
    parser.add_argument("--rates", type=numbers, default=[2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, at each rate")
    parser.add_argument("--ttft", type=float, default=0.5)
    parser.add_argument("--tpot", type=float, default=0.02)
    parser.add_argument("--prefill-shares", type=numbers, default=[0.4, 0.6])
    parser.add_argument("--only", type=names, default=["aggregated", "turns", "shares"])
    parser.add_argument("--share-weights", action="store_true", help="one copy for both instances")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - {"aggregated", "turns", "shares"}:
        raise argparse.ArgumentTypeError(f"no such arrangement: {', '.join(sorted(unknown))}")
    return chosen


def arrangements(options: argparse.Namespace) -> list[Arrangement]:
    found = [one for one in (AGGREGATED, TURNS) if one.name in options.only]
    if "shares" not in options.only:
        return found
    for prefill in options.prefill_shares:
        decode = round(1.0 - prefill, 6)
        name = f"shares={prefill:g}/{decode:g}"
        found.append(replace(TURNS, name=name, sm_shares=(prefill, decode)))
    return found


@contextmanager
def mps_daemon() -> Iterator[dict[str, str]]:
    """What processes must be started with to find a daemon of our own."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **found}
        subprocess.run([MPS_CONTROL, "-d"], env=environment, check=True)
        try:
            yield found
        finally:
            subprocess.run([MPS_CONTROL], env=environment, input=b"quit\n", check=True)


def draw(scale: Scale, rate_rps: float, seconds: float, seed: int) -> Workload:
    """The same seed gives the same requests and, stretched, the same gaps at every rate."""
    rng = random.Random(seed)
    kinds = (scale.long_prompt, scale.short_output), (scale.short_prompt, scale.long_output)
    rows: list[tuple[float, int, int]] = []
    now_s = rng.expovariate(rate_rps)
    while now_s < seconds or not rows:
        prompt, output = (
            lognormal(rng, median, SIGMA, max(median // 4, 2), 2 * median)
            for median in rng.choice(kinds)
        )
        rows.append((now_s, prompt, output))
        now_s += rng.expovariate(1.0) / rate_rps
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(np.array(arrival_s), np.array(prompts), np.array(outputs))


@dataclass(frozen=True)
class Bench:
    options: argparse.Namespace
    scale: Scale
    records: Records
    scratch: Path

    @property
    def _shape(self) -> Shape:
        return KNOWN_SHAPES[self.options.shape]

    @property
    def _slo(self) -> Slo:
        return Slo(self.options.ttft, self.options.tpot)

    @property
    def _passes(self) -> list[Pass]:
        return list(passes_of(self.scale.longest_pass, quick=self.options.small))

    def _case(self, one: Arrangement, rest: str) -> str:
        return f"{self.options.shape} {one.name} {rest}"

    def _load(self, rate: float) -> Workload:
        return draw(self.scale, rate, self.options.seconds, self.options.seed)

    def serve(self, one: Arrangement) -> None:
        wanted = [self._case(one, f"rate={rate:g}") for rate in self.options.rates]
        if all(case in self.records.of for case in [self._case(one, "passes"), *wanted]):
            return
        if one.needs_mps and (self.options.device == "cpu" or shutil.which(MPS_CONTROL) is None):
            print(f"{one.name}: not here, it needs a GPU and {MPS_CONTROL}", flush=True)
            return
        daemon: AbstractContextManager[dict[str, str]] = nullcontext({})
        if one.needs_mps:
            daemon = mps_daemon()
        with daemon as environment:
            asyncio.run(self._serve(one, self._plans(one, environment)))

    def _plans(self, one: Arrangement, environment: dict[str, str]) -> list[InstancePlan]:
        dtype = DTYPES[self.options.device]
        if not (self.scratch / "config.json").exists():
            write_model(self._shape, dtype, self.scratch)
            write_tokenizer(self._shape.vocab, self.scratch)
        several = len(one.roles) > 1
        return [
            InstancePlan(
                f"{role.value}-0",
                role,
                str(self.scratch),
                self.options.device,
                dtype,
                self.scale.kv_bytes * (1 if several else 2),
                self.scale.warm_up_sequences,
                sm_share=sm_share,
                share_weights=several and self.options.share_weights,
                environment=environment,
            )
            for role, sm_share in zip(one.roles, one.sm_shares, strict=False)
        ]

    async def _serve(self, one: Arrangement, plans: list[InstancePlan]) -> None:
        async with started(plans) as (link, instances):
            passes = self._case(one, "passes")
            if passes not in self.records.of:
                found = await self._time_passes(instances)
                self.records.measure(passes, lambda: found)
            serve(instances)
            async with gateway_of(link, self.scratch, self._slo, len(instances)) as gateway:
                warm = self._load(max(self.options.rates)).first(WARM_UP_REQUESTS)
                await put(gateway, warm, self._shape.vocab, self.options.seed)
                for rate in self.options.rates:
                    case = self._case(one, f"rate={rate:g}")
                    if case not in self.records.of:
                        load = self._load(rate)
                        samples = await put(gateway, load, self._shape.vocab, self.options.seed)
                        self.records.measure(case, partial(self._figures, samples))

    async def _time_passes(self, instances: Sequence[InstanceProcess]) -> Figures:
        """As a profile's runs, one for each instance."""
        runs: list[dict[str, Any]] = []
        for one in instances:
            samples = await one.measure(self._passes, self.scale.rounds)
            tokens = one.blocks * BLOCK_TOKENS
            cut = {"tensor_parallel": 1, "pipeline_parallel": 1, "kv_capacity_tokens": tokens}
            runs.append({**cut, **samples})
        if len(instances) > 1:
            for run, one, other in zip(runs, instances, instances[::-1], strict=True):
                async with other.computing(self._passes):
                    beside = await one.measure(self._passes, self.scale.rounds)
                run["beside"] = {"neighbours": 1} | beside
        per_token = instances[0].kv_bytes_per_token
        return {"kv_bytes_per_token": float(per_token), "runs": json.dumps(runs)}

    def _figures(self, samples: Sequence[Sample]) -> Figures:
        met = sum(one.met(self._slo) for one in samples) / len(samples)
        failed = float(sum(one.ttft_s is None for one in samples))
        ttfts = [one.ttft_s for one in samples if one.ttft_s is not None]
        tpots = [one.tpot_s for one in samples if one.tpot_s is not None]
        return {
            "attainment": met,
            "requests": float(len(samples)),
            "failed": failed,
            "ttft_ms_p50_p90": quantiles(ttfts),
            "tpot_ms_p50_p90": quantiles(tpots),
        }

    def has_served(self, one: Arrangement) -> bool:
        return self._case(one, "passes") in self.records.of

    def predict(self, one: Arrangement) -> None:
        """From the times of passes alone, whichever machine they were taken on."""
        if find_spec("pydantic") is None:
            print(
                "no prediction: the planner needs pydantic; run this again where it is", flush=True
            )
            return
        from scripts.bench.one_gpu_prediction import predicted

        bytes_s = float(self.records.of["machine"]["bytes_s"]) / 2
        for rate in self.options.rates:
            predict = partial(
                predicted,
                self.records.of[self._case(one, "passes")],
                one.roles,
                slo=self._slo,
                copy_bytes_s=bytes_s,
                load=self._load(rate),
            )
            self.records.measure(self._case(one, f"rate={rate:g} predicted"), predict)

    def show(self, one: Arrangement) -> None:
        shown = [f"{self.options.shape} {one.name}: goodput"]
        for kind in ("", " predicted"):
            cases = [(rate, self._case(one, f"rate={rate:g}{kind}")) for rate in self.options.rates]
            if all(case in self.records.of for _, case in cases):
                points = [(r, float(self.records.of[case]["attainment"])) for r, case in cases]
                shown.append(f"{bounded(points, ATTAINMENT)} requests/s{kind}")
        print(" ".join(shown), flush=True)


if __name__ == "__main__":
    main()
