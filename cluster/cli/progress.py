"""Progress bars on standard error while instances come up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorUnavailableError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import TaskID

    from cluster.control.controller import InstanceReport

LOOK_S = 0.1
STAGES = ("waiting", "placing", "starting", "loading", "warming up", "up", "serving")
DONE = {stage: number for number, stage in enumerate(STAGES)} | {"stopping": 0}
MEASURED = ("loading", "warming up")


async def show_progress(controller: Any, ready: Callable[[], bool]) -> None:
    """Returns once every instance is up and `ready`; raises what makes that impossible."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}
        while not ready():
            try:
                reports = await controller.report.remote()
            except ActorUnavailableError:
                reports = ()
            for report in reports:
                name, stage = report.spec.name, report.stage
                if report.failure is not None:
                    raise InstanceLost(f"{name} has been given up: {report.failure}")
                if name not in bars:
                    bars[name] = progress.add_task(name, total=len(STAGES) - 1, stage=stage)
                done = DONE[stage] + (report.progress if stage in MEASURED else 0.0)
                progress.update(bars[name], completed=done, stage=stage_text(report))
            await asyncio.sleep(LOOK_S)


def stage_text(report: InstanceReport) -> str:
    """Loading is told by the weights' bytes, the warm-up by its batches."""
    if report.stage not in MEASURED:
        return report.stage
    return f"{report.stage} {report.progress:.0%}"
