"""Plans again when the workload drifts: notices, asks a planner process, hands its answer on."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.errors import PlannerFailed
from engine.messages import Role
from placement.latency.catalog import cores_of_worker
from placement.scaling.drift import DriftSettings, Profiler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.config import Config
    from cluster.control.balancing import Note
    from placement.scaling.drift import Profiled, Shape
    from placement.scaling.policy import Policy, Replan


@dataclass(frozen=True, slots=True)
class Planned:
    """What the planner says a role should have: instances, and accelerators of each."""

    instances: Mapping[Role, int]
    accelerators: Mapping[Role, int]
    reason: str

    def __str__(self) -> str:
        return ", ".join(f"{role.value}={count}" for role, count in self.instances.items())


class Planner(Protocol):
    async def plan(self, seen: Profiled, policy: Policy) -> Planned: ...


@dataclass(slots=True)
class Replanning:
    """The profile of one policy's time in force; at most one plan is in the making."""

    settings: Replan
    note: Note
    profiler: Profiler = field(init=False)
    due_s: float = 0.0

    def __post_init__(self) -> None:
        settings = DriftSettings(least_requests=self.settings.least_requests)
        self.profiler = Profiler(self.settings.window_s, settings)

    def wants_plan(self, requests: Sequence[Shape], now: float, *, planning: bool) -> bool:
        """Whether what ended since the last look makes another plan due; not while one is made."""
        self.profiler.add(requests, now)
        if planning or now < self.due_s:
            return False
        found = self.profiler.drifted(now)
        if found:
            self.due_s = now + self.settings.interval_s
            self.note("plan", "workload", "drifted", what="; ".join(map(str, found)))
        return bool(found)


class PlannerProcess:
    """`tandem plan` in a process of its own: the controller goes on meanwhile."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def plan(self, seen: Profiled, policy: Policy) -> Planned:
        """The fewest accelerators for the rate seen and the forecast's headroom."""
        assert policy.replan is not None, "asked for by a policy"
        with tempfile.TemporaryDirectory() as name:
            arguments = self._arguments(Path(name), seen, policy, policy.replan)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "cluster", "plan", *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                async with asyncio.timeout(policy.replan.plan_s):
                    out, err = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
        if process.returncode:
            lines = err.decode(errors="replace").strip().splitlines()
            raise PlannerFailed(lines[-1] if lines else f"status {process.returncode}")
        return planned_from(json.loads(out))

    def _arguments(self, folder: Path, seen: Profiled, policy: Policy, replan: Replan) -> list[str]:
        fleet, load = folder / "fleet.yaml", folder / "load.csv"
        threads = self._config.engine.threads
        fleet.write_text(fleet_line(policy.budget_accelerators, replan, threads))
        load.write_text("\n".join(workload_lines(seen)))
        slo = self._config.slo
        options = {
            "model": self._config.model,
            "hardware": fleet,
            "workload": load,
            "ttft": slo.ttft_s,
            "tpot": slo.tpot_s,
            "attainment": slo.attainment,
            "objective": "accelerators",
            "rate": seen.rate_rps * (1 + policy.forecast.headroom),
            "profile": replan.profile,
        }
        given = [f"--{key}={value}" for key, value in options.items() if value is not None]
        return [*given, "--processes=1", "--json"]


def fleet_line(workers: int, replan: Replan, threads: int) -> str:
    """A fleet file with room for as many workers, as a profile has the planner count them."""
    cores = cores_of_worker(replan.device, 1 if replan.profile is None else threads)
    return f"nodes: [{{device: {replan.device!r}, devices: {workers * cores}}}]\n"


def workload_lines(seen: Profiled) -> list[str]:
    """A workload file of the requests seen, evenly spaced; a cached prefix is one they share."""
    gap_s = seen.lasted_s / len(seen.requests)
    rows = [
        f"{number * gap_s:.6f},{one.prompt_tokens},{max(one.output_tokens, 1)},"
        f"{'shared' if one.cached_tokens else ''},{one.cached_tokens}"
        for number, one in enumerate(seen.requests)
    ]
    return ["arrival_s,prompt_tokens,output_tokens,prefix_id,prefix_tokens", *rows]


def planned_from(document: dict[str, object]) -> Planned:
    """What `tandem plan --json` printed."""
    pools = document["pools"]
    assert isinstance(pools, list), "the planner's own output"
    instances = dict.fromkeys(Role, 0)
    accelerators: dict[Role, int] = {}
    for pool in pools:
        role = Role(pool["role"])
        instances[role] = int(pool["instances"])
        accelerators[role] = pool["tensor_parallel"] * pool["pipeline_parallel"]
    return Planned(instances, accelerators, str(document["reason"]))
