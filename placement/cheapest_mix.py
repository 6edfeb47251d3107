"""The cheapest mix of instances for a workload, as an integer program over slices of load.

Requests are put into buckets of like sizes; each instance type has a measured highest rate per
bucket, and an instance's time is shared out among buckets. As in Mélange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import highspy
import numpy as np

from engine.errors import NoFeasiblePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from placement.workload import Workload


@dataclass(frozen=True, slots=True)
class InstanceType:
    """What one instance costs an hour, how many there may be, and its rate for each bucket."""

    name: str
    cost_per_hour: float
    most: int
    bucket_rps: tuple[float, ...]
    """Zero where it cannot meet the targets."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests of like sizes, and how many of them arrive a second."""

    rate_rps: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    counts: dict[str, int]
    cost_per_hour: float
    shares: dict[tuple[str, int], float]
    """Of each bucket's load, by instance type."""


def size_buckets(workload: Workload, rate_rps: float, edges: int = 3) -> list[Bucket]:
    """Quantile bins of prompt and output lengths, each stood for by its means."""
    prompts = _bins(workload.prompt_tokens, edges)
    outputs = _bins(workload.output_tokens, edges)
    buckets = []
    for p in range(edges):
        for o in range(edges):
            inside = (prompts == p) & (outputs == o)
            if inside.any():
                share = float(inside.mean())
                prompt = int(workload.prompt_tokens[inside].mean())
                output = int(workload.output_tokens[inside].mean())
                buckets.append(Bucket(rate_rps * share, prompt, output))
    return buckets


def _bins(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    inner = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    bins: NDArray[np.int64] = np.searchsorted(inner, values, side="left")
    return bins


def cheapest_mix(types: Sequence[InstanceType], buckets: Sequence[Bucket]) -> Mix:
    """Least cost such that every bucket's load is carried and no instance is more than busy."""
    _check_carriable(types, buckets)
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)  # noqa: FBT003  (the solver's own signature)
    counts = [
        model.addVariable(lb=0, ub=kind.most, type=highspy.HighsVarType.kInteger, name=kind.name)
        for kind in types
    ]
    shares = {
        (t, b): model.addVariable(lb=0, ub=1)
        for t, kind in enumerate(types)
        for b in range(len(buckets))
        if kind.bucket_rps[b] > 0
    }
    for b in range(len(buckets)):
        model.addConstr(sum(share for (_, bucket), share in shares.items() if bucket == b) == 1)
    for t, kind in enumerate(types):
        busy = [
            share * (buckets[b].rate_rps / kind.bucket_rps[b])
            for (of, b), share in shares.items()
            if of == t
        ]
        if busy:
            model.addConstr(sum(busy) <= counts[t])
    cost = sum(n * kind.cost_per_hour for n, kind in zip(counts, types, strict=True))
    model.minimize(cost)
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise _too_few(types, buckets)
    values = model.getSolution().col_value
    numbers = {kind.name: round(values[n.index]) for kind, n in zip(types, counts, strict=True)}
    total = sum(numbers[kind.name] * kind.cost_per_hour for kind in types)
    used = {(types[t].name, b): values[v.index] for (t, b), v in shares.items()}
    return Mix(numbers, total, {key: value for key, value in used.items() if value > 1e-9})


def _check_carriable(types: Sequence[InstanceType], buckets: Sequence[Bucket]) -> None:
    for number, bucket in enumerate(buckets):
        if not any(kind.bucket_rps[number] > 0 for kind in types):
            size = f"{bucket.prompt_tokens} prompt and {bucket.output_tokens} output tokens"
            raise NoFeasiblePlan("targets", size, "no instance type meets them for such requests")


def _too_few(types: Sequence[InstanceType], buckets: Sequence[Bucket]) -> NoFeasiblePlan:
    wanted = sum(bucket.rate_rps for bucket in buckets)
    needed = sum(
        bucket.rate_rps / max(kind.bucket_rps[b] * kind.most for kind in types)
        for b, bucket in enumerate(buckets)
    )
    rule = (
        f"all instances there may be carry about {wanted / needed:.4g} requests/s of {wanted:.4g}"
    )
    return NoFeasiblePlan("rate", wanted, rule)
