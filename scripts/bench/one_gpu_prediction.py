"""What the planner's simulation expects of instances on one device, from the times of passes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from placement.latency.catalog import Link
from placement.latency.measured import fit_run
from placement.latency.profile_file import profile_from
from placement.simulation.deployment import Deployment, InstanceModel
from placement.simulation.simulator import simulate
from scripts.bench.attainment import quantiles
from scripts.bench.one_gpu import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.messages import Role
    from engine.slo import Slo
    from placement.latency.measured import Run
    from placement.workload import Workload
    from scripts.bench.gpu import Figures

COPY_LATENCY_S = 5e-5


def predicted(
    passes: Figures, roles: Sequence[Role], *, slo: Slo, copy_bytes_s: float, load: Workload
) -> Figures:
    runs = json.loads(str(passes["runs"]))
    found = profile_from({"model": "bench", "device": "bench", "runs": runs}).runs
    link = Link("device", copy_bytes_s, COPY_LATENCY_S)
    deployment = Deployment(
        tuple(_instance(role, run, link) for role, run in zip(roles, found, strict=True)),
        int(passes["kv_bytes_per_token"]),
        link,
        slo,
        BLOCK_TOKENS,
    )
    outcome = simulate(deployment, load)
    tpots = outcome.tpot_s[~np.isnan(outcome.tpot_s)]
    return {
        "attainment": float(outcome.attainment),
        "ttft_ms_p50_p90": quantiles(outcome.ttft_s.tolist()),
        "tpot_ms_p50_p90": quantiles(tpots.tolist()),
    }


def _instance(role: Role, run: Run, link: Link) -> InstanceModel:
    assert run.kv_capacity_tokens is not None, "written with the passes"
    crowded = fit_run(run.beside)[0] if run.crowded_samples else None
    return InstanceModel(role, fit_run(run)[0], run.kv_capacity_tokens, link, crowded=crowded)
