"""The cheapest mix of instances for a workload, as an integer program over slices of load.

Requests are put into buckets of like sizes; each instance type has a measured highest rate per
bucket, and an instance's time is shared out among buckets. As in Mélange.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import highspy
import numpy as np

from engine.errors import NoFeasiblePlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from placement.workload import Workload


@dataclass(frozen=True, slots=True)
class InstanceType:
    """A unit of deployment: its price, its rate for each bucket, and what it takes of the fleet."""

    name: str
    price: float
    """Of one, in whatever is to be least: dollars an hour, accelerators, watts."""
    most: int
    bucket_rps: tuple[float, ...]
    """Zero where it cannot meet the targets."""
    uses: Mapping[str, float] = field(default_factory=dict)
    """Of each limited resource, such as devices of a kind."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests of like sizes, and how many of them arrive a second."""

    rate_rps: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    counts: dict[str, int]
    price: float
    shares: dict[tuple[str, int], float]
    """Of each bucket's load, by instance type."""


def size_buckets(workload: Workload, rate_rps: float, edges: int = 3) -> list[Bucket]:
    """Requests of like sizes, each stood for by its means."""
    return [
        Bucket(
            rate_rps * len(rows) / len(workload),
            int(workload.prompt_tokens[rows].mean()),
            int(workload.output_tokens[rows].mean()),
        )
        for rows in size_bins(workload, edges)
    ]


def size_bins(workload: Workload, edges: int = 3) -> list[NDArray[np.intp]]:
    """The rows in each quantile bin of prompt and output lengths that has any."""
    prompts = _bins(workload.prompt_tokens, edges)
    outputs = _bins(workload.output_tokens, edges)
    bins = [
        np.flatnonzero((prompts == p) & (outputs == o)) for p in range(edges) for o in range(edges)
    ]
    return [rows for rows in bins if len(rows)]


def _bins(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    inner = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    bins: NDArray[np.int64] = np.searchsorted(inner, values, side="left")
    return bins


def cheapest_mix(
    types: Sequence[InstanceType],
    buckets: Sequence[Bucket],
    limits: Mapping[str, float] | None = None,
) -> Mix:
    """Least price such that every bucket's load is carried and no instance is more than busy."""
    _check_carriable(types, buckets)
    model = highspy.Highs()
    counts = _counts(model, types, limits or {})
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
    model.minimize(sum(n * kind.price for n, kind in zip(counts, types, strict=True)))
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise _too_few(types, buckets)
    values = model.getSolution().col_value
    used = {(types[t].name, b): values[v.index] for (t, b), v in shares.items()}
    return _mix(types, counts, values, {key: value for key, value in used.items() if value > 1e-9})


def fullest_mix(types: Sequence[InstanceType], limits: Mapping[str, float]) -> Mix:
    """The most that all kinds together serve of one bucket within the limits."""
    model = highspy.Highs()
    counts = _counts(model, types, limits)
    model.maximize(sum(n * kind.bucket_rps[0] for n, kind in zip(counts, types, strict=True)))
    return _mix(types, counts, model.getSolution().col_value, {})


def _counts(
    model: highspy.Highs, types: Sequence[InstanceType], limits: Mapping[str, float]
) -> list[highspy.highs.highs_var]:
    """A whole number of each kind, together within every limit."""
    model.setOptionValue("output_flag", False)  # noqa: FBT003  (the solver's own signature)
    counts = [
        model.addVariable(lb=0, ub=kind.most, type=highspy.HighsVarType.kInteger, name=kind.name)
        for kind in types
    ]
    for resource, limit in limits.items():
        taken = [
            n * kind.uses[resource]
            for n, kind in zip(counts, types, strict=True)
            if resource in kind.uses
        ]
        if taken:
            model.addConstr(sum(taken) <= limit)
    return counts


def _mix(
    types: Sequence[InstanceType],
    counts: Sequence[highspy.highs.highs_var],
    values: Sequence[float],
    shares: dict[tuple[str, int], float],
) -> Mix:
    numbers = {kind.name: round(values[n.index]) for kind, n in zip(types, counts, strict=True)}
    return Mix(numbers, sum(numbers[kind.name] * kind.price for kind in types), shares)


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
