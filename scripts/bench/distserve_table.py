"""DistServe's published goodputs beside ours: its coefficients, our schedulers and links.

The ceiling is plain arithmetic on the same coefficients and memory: what prompts in the largest
batches, and decodes in as many sequences as the memory holds, come to on the mean lengths, over the
share of requests that must meet their targets. No scheduling gets beyond it for long; it is none
where too many prompts take longer than the TTFT target by themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.messages import Role  # noqa: E402
from engine.slo import Slo  # noqa: E402
from placement.latency.catalog import find_link, find_model  # noqa: E402
from placement.latency.model import LatencyModel  # noqa: E402
from placement.planning.goodput import find_goodput  # noqa: E402
from placement.published.distserve_rules import Coefficients, Parallel, stage_rules  # noqa: E402
from placement.simulation.deployment import Deployment, InstanceModel  # noqa: E402
from placement.workload_files import read_workload  # noqa: E402

if TYPE_CHECKING:
    from placement.workload import Workload

WORKLOAD = ROOT.parent / "shared" / "data" / "reference" / "sharegpt_like_1000.unit.csv"


@dataclass(frozen=True)
class Published(LatencyModel):
    """DistServe's fitted lines for one tensor size; its stages share them evenly."""

    times: Coefficients
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return max(2 * self.times.prefill[2], 0.0)

    @property
    def read_s(self) -> float:
        return self.times.decode_small_batch[1]

    def fixed_s(self, tokens: int, draws: int) -> float:
        """A pass of decodes alone, or of prompts with whatever decodes ride along."""
        if tokens == draws:
            large = tokens >= self.times.large_batch_from
            line = self.times.decode_large_batch if large else self.times.decode_small_batch
            return line[0] + line[2] * tokens
        return self.times.prefill[0] + self.times.prefill[1] * tokens


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    target: Slo
    prefill: Parallel
    decode: Parallel | None
    published_rps_per_gpu: float


ATTAINMENT = 0.9
ROWS = (
    Row("opt-13b", Slo(0.25, 0.1), Parallel(2, 1), Parallel(1, 1), 2.30),
    Row("opt-13b", Slo(0.25, 0.1), Parallel(1, 1), None, 0.50),
    Row("opt-66b", Slo(2.5, 0.15), Parallel(4, 1), Parallel(2, 2), 0.955),
    Row("opt-66b", Slo(2.5, 0.15), Parallel(4, 1), None, 0.347),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, default=WORKLOAD)
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args()
    workload = read_workload(args.workload).first(args.requests)
    print(
        "model    layout             published  ours  ratio  ceiling  gives way  "
        "simulations  wall_s"
    )
    for row in ROWS:
        target = deployment(row)
        started = time.perf_counter()
        guess = row.published_rps_per_gpu * target.accelerators
        found = find_goodput(target, workload, ATTAINMENT, guess, resolution=0.01)
        wall_s = time.perf_counter() - started
        ours = found.rate_rps / target.accelerators
        layout = f"{row.prefill} + {row.decode}" if row.decode else f"{row.prefill} aggregated"
        print(
            f"{row.model:8} {layout:18} {row.published_rps_per_gpu:9.3f} {ours:6.3f} "
            f"{ours / row.published_rps_per_gpu:6.2f}  "
            f"{ceiling_rps(row, workload) / target.accelerators:7.3f}  "
            f"{found.limit:10} {found.simulations:6} "
            f"{wall_s:10.1f}",
            flush=True,
        )
    return 0


def ceiling_rps(row: Row, load: Workload) -> float:
    prompts, later = load.prompt_tokens.astype(float), load.output_tokens - 1.0
    engine = "vllm" if row.decode is None else "distserve"
    start_s, token_s, square_s = stage_rules(engine, row.model, row.prefill).times.prefill
    batched_s = token_s * prompts + square_s * prompts**2
    if (start_s + batched_s > row.target.ttft_s).mean() > 1 - ATTAINMENT:
        return 0.0
    parallel = row.decode or row.prefill
    rules = stage_rules(engine, row.model, parallel)
    context = float((prompts + later / 2).mean())
    sequences = rules.kv_capacity_tokens / context
    part = sequences / parallel.pipeline
    large = part >= rules.times.large_batch_from
    line = rules.times.decode_large_batch if large else rules.times.decode_small_batch
    step_s = line[0] + line[1] * part * context + line[2] * part
    decode_s = float(later.mean()) * step_s / sequences
    prefill_s = float(batched_s.mean())
    busy_s = max(prefill_s, decode_s) if row.decode else prefill_s + decode_s
    return 1 / busy_s / ATTAINMENT


def deployment(row: Row) -> Deployment:
    if row.decode is None:
        instances: tuple[InstanceModel, ...] = (instance(row, row.prefill, Role.MIXED),)
    else:
        instances = (
            instance(row, row.prefill, Role.PREFILL),
            instance(row, row.decode, Role.DECODE),
        )
    shape = find_model(row.model)
    return Deployment(
        instances, shape.kv_bytes_per_token, find_link("ethernet-25"), row.target, block_tokens=16
    )


def instance(row: Row, parallel: Parallel, role: Role) -> InstanceModel:
    engine = "vllm" if row.decode is None else "distserve"
    rules = stage_rules(engine, row.model, parallel)
    return InstanceModel(
        role,
        Published(rules.times, parallel.pipeline),
        rules.kv_capacity_tokens,
        find_link("nvlink3"),
        tensor_parallel=parallel.tensor,
        pipeline_parallel=parallel.pipeline,
        pipelined=True,
    )


if __name__ == "__main__":
    sys.exit(main())
