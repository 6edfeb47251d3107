"""Progress bars on standard error while instances come up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorUnavailableError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import TaskID

LOOK_S = 0.1
STAGES = ("waiting", "placing", "starting", "loading", "up", "serving")


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
                if name not in bars:
                    bars[name] = progress.add_task(name, total=len(STAGES) - 1, stage=stage)
                progress.update(bars[name], completed=STAGES.index(stage), stage=stage)
            await asyncio.sleep(LOOK_S)
