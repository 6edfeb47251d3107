"""Very large deployments as cells: each with its own router, requests dealt out in turn.

A router that weighs every instance for every request does not scale to a thousand of them, in
virtual time or in real time; a cell is as many as one router looks after.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.simulation.outcome import Outcome, binned
from placement.simulation.simulator import simulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from placement.simulation.deployment import Deployment
    from placement.workload import Workload


def simulate_cells(cell: Deployment, workload: Workload, cells: int, processes: int = 1) -> Outcome:
    """So many equal cells; one at a time in each process, so that memory stays flat."""
    parts = _dealt(workload, cells)
    run = partial(simulate, cell)
    if processes == 1:
        return _merged(map(run, parts), len(workload), cells)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return _merged(pool.map(run, parts), len(workload), cells)


def _dealt(workload: Workload, cells: int) -> Iterator[Workload]:
    rows = np.arange(len(workload))
    return (workload.select(rows[cell::cells]) for cell in range(cells))


def _merged(outcomes: Iterable[Outcome], count: int, cells: int) -> Outcome:
    """Requests back in order of arrival; instances named by their cell."""
    columns: dict[str, Any] = {}
    gaps: list[Any] = []
    busy_s: dict[str, float] = {}
    preemptions, beyond = 0, dict[str, None]()
    for cell, outcome in enumerate(outcomes):
        for column in fields(Outcome):
            values = getattr(outcome, column.name)
            if isinstance(values, np.ndarray) and not column.name.startswith("gap"):
                whole = columns.setdefault(column.name, np.empty(count, dtype=values.dtype))
                whole[cell::cells] = values
        gaps.append(binned(np.column_stack([outcome.gaps_s, outcome.gap_counts])))
        busy_s |= {f"cell-{cell}/{name}": busy for name, busy in outcome.busy_s.items()}
        preemptions += outcome.preemptions
        beyond |= dict.fromkeys(outcome.beyond)
    every = np.concatenate(gaps)
    return Outcome(
        **columns,
        gaps_s=every[:, 0],
        gap_counts=every[:, 1],
        busy_s=busy_s,
        preemptions=preemptions,
        beyond=tuple(beyond),
    )
