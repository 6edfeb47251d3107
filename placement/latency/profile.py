"""What `tandem profile` measured, and the latency model fitted to it.

A profile is JSON: `model` (name), `device`, `dtype`, `kv_bytes_per_token`, and `runs`, one for
each parallelism: `tensor_parallel`, `pipeline_parallel`, `kv_capacity_tokens`, and samples
`prefill` (tokens, squares, seconds; optionally prompts, context), `decode` (batch, context,
seconds), `mixed` (the fields of both), where context sums the KV tokens already there, and
`beside`, the same while `neighbours` others compute on the machine; `transfer` (bytes, seconds);
and `serving` (instances, users, prompt_tokens, output_tokens, ttft_s, tpot_s; optionally requests,
loops_s, doors_s, prefill_s, handed_off), as clients of a server on this machine see it, whose
instances compute on so many `threads` of its `processors`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.errors import BadConfig, unknown_name
from placement.latency.catalog import Link
from placement.latency.model import LatencyModel, Step
from placement.latency.robust_fit import fit_costs
from placement.latency.serving_costs import (
    Machine,
    Served,
    ServingCosts,
    WithServing,
    fit_doors,
    fit_serving,
    handing_of,
    handoff_of,
    way_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from placement.latency.roofline import Roofline

MOST_KNOTS = 12


class Sample(NamedTuple):
    step: Step
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """Samples of one parallelism."""

    tensor_parallel: int
    pipeline_parallel: int
    kv_capacity_tokens: int | None
    samples: tuple[Sample, ...]
    crowded_samples: tuple[Sample, ...] = ()
    """The same passes, while `neighbours` others compute."""
    neighbours: int = 0

    @property
    def beside(self) -> Run:
        return replace(self, samples=self.crowded_samples, crowded_samples=(), neighbours=0)


@dataclass(frozen=True, slots=True)
class Profile:
    model: str
    device: str
    runs: tuple[Run, ...]
    transfers: tuple[tuple[float, float], ...] = ()
    """(bytes, seconds)."""
    served: tuple[Served, ...] = ()
    processors: int | None = None
    threads: int = 1
    """Of each rank."""

    def run(self, tensor_parallel: int, pipeline_parallel: int) -> Run | None:
        for run in self.runs:
            if (run.tensor_parallel, run.pipeline_parallel) == (tensor_parallel, pipeline_parallel):
                return run
        return None

    def check_fits(self, model: str, device: str) -> None:
        if self.model != model:
            raise BadConfig("profile.model", self.model, f"the plan is for {model!r}")
        if self.device != device:
            raise BadConfig("profile.device", self.device, f"the plan is for {device!r}")

    def latency(
        self, roofline: Roofline, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[LatencyModel, FitReport]:
        """The measured parallelism, or the nearest one carried over by the roofline's ratio."""
        run = self.run(tensor_parallel, pipeline_parallel)
        if run is not None:
            return self._served_run(run)
        nearest = min(
            self.runs,
            key=lambda r: (
                abs(r.tensor_parallel - tensor_parallel),
                abs(r.pipeline_parallel - pipeline_parallel),
            ),
        )
        measured, report = self._served_run(nearest)
        wanted = roofline.cut(tensor_parallel, pipeline_parallel)
        known = roofline.cut(nearest.tensor_parallel, nearest.pipeline_parallel)
        return CarriedOver(measured, known, wanted, pipeline_parallel), report

    def crowded(self, tensor_parallel: int, pipeline_parallel: int) -> LatencyModel | None:
        """Beside busy neighbours, where that was measured."""
        run = self.run(tensor_parallel, pipeline_parallel)
        if run is None or not run.crowded_samples:
            return None
        return self._with_serving(fit_run(run.beside)[0])

    def machine(self, tensor_parallel: int, pipeline_parallel: int) -> Machine | None:
        """What instances share with what serves their tokens; None where that was not measured."""
        doors = fit_doors(self.served)
        if doors is None or self.processors is None:
            return None
        return Machine(self.processors, self.threads * tensor_parallel * pipeline_parallel, doors)

    @property
    def arrival_s(self) -> float:
        """From the client to an instance and back, beyond the passes; 0 where not measured."""
        alone = self._served_by(1)
        if not alone:
            return 0.0
        return way_of(alone, self._with_serving(fit_run(self.runs[0])[0]))

    @property
    def handing_s(self) -> float:
        """How much longer a prompt takes whose KV is handed off; 0 where not measured."""
        return handing_of(self.served)

    @property
    def handoff_s(self) -> float:
        """Of its messages, beyond the copy; 0 where not measured."""
        served = [one for one in self.served if one.handed_off]
        return handoff_of(served, self._with_serving(fit_run(self.runs[0])[0]))

    def _served_by(self, instances: int) -> list[Served]:
        return [one for one in self.served if one.instances == instances and not one.handed_off]

    @property
    def serving(self) -> ServingCosts | None:
        """What an instance's own thread does beside its passes; None where not measured."""
        alone = self._served_by(1)
        return fit_serving(alone, fit_run(self.runs[0])[0]) if alone else None

    def _with_serving(self, passes: Measured) -> LatencyModel:
        costs = self.serving
        return passes if costs is None else WithServing(passes, costs)

    def _served_run(self, run: Run) -> tuple[LatencyModel, FitReport]:
        passes, report = fit_run(run)
        return self._with_serving(passes), report


@dataclass(frozen=True, slots=True)
class FitReport:
    """How well the fit explains its samples, as shares of the measured time."""

    samples: int
    median_error: float
    p90_error: float

    def __str__(self) -> str:
        errors = f"{self.median_error:.1%} median, {self.p90_error:.1%} p90"
        return f"{self.samples} samples, error {errors}"


@dataclass(frozen=True)
class Measured(LatencyModel):
    """A piecewise linear cost of the tokens in a pass, plus attention, draws, and what passes take
    longer that hold prompts, or prompts and decodes: kernels are others then."""

    knots: tuple[int, ...]
    seconds: tuple[float, ...]
    """At each knot."""
    draw_s: float
    pair_cost_s: float
    read_cost_s: float
    prompts_s: float
    mixed_cost_s: float
    most_kv_read_tokens: int
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return self.pair_cost_s

    @property
    def read_s(self) -> float:
        return self.read_cost_s

    @property
    def mixed_s(self) -> float:
        return self.mixed_cost_s

    def fixed_s(self, tokens: int, draws: int) -> float:
        prompts_s = self.prompts_s if tokens > draws else 0.0
        return _interpolated_s(self.knots, self.seconds, tokens) + self.draw_s * draws + prompts_s

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        beyond = []
        if tokens > self.knots[-1]:
            beyond.append(f"{tokens} tokens in a pass, measured up to {self.knots[-1]}")
        if kv_read_tokens > self.most_kv_read_tokens:
            most = self.most_kv_read_tokens
            beyond.append(f"{kv_read_tokens} KV tokens read in a pass, measured up to {most}")
        return tuple(beyond)


@lru_cache(maxsize=65536)
def _interpolated_s(knots: tuple[int, ...], seconds: tuple[float, ...], tokens: int) -> float:
    """Beyond the last knot the last segment goes on."""
    if len(knots) == 1 or tokens <= knots[0]:
        return seconds[0]
    if tokens <= knots[-1]:
        return float(np.interp(tokens, knots, seconds))
    slope = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2])
    return seconds[-1] + slope * (tokens - knots[-1])


@dataclass(frozen=True)
class CarriedOver(LatencyModel):
    """Measured at one parallelism, scaled to another by what the roofline says of both."""

    measured: LatencyModel
    known: Roofline
    wanted: Roofline
    pipeline_parallel: int = 1

    @property
    def pair_s(self) -> float:
        return self.measured.pair_s * self.wanted.pair_s / self.known.pair_s

    @property
    def read_s(self) -> float:
        return self.measured.read_s * self.wanted.read_s / self.known.read_s

    @property
    def mixed_s(self) -> float:
        return self.measured.mixed_s * self.wanted.fixed_s(1, 1) / self.known.fixed_s(1, 1)

    def fixed_s(self, tokens: int, draws: int) -> float:
        ratio = self.wanted.fixed_s(tokens, draws) / self.known.fixed_s(tokens, draws)
        return self.measured.fixed_s(tokens, draws) * ratio

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        wanted, known = self.wanted, self.known
        carried = (
            f"measured at {known.tensor_parallel}x{known.pipeline_parallel}, carried over to "
            f"{wanted.tensor_parallel}x{wanted.pipeline_parallel}"
        )
        return (carried, *self.measured.outside(tokens, kv_read_tokens))


def fit_run(run: Run) -> tuple[Measured, FitReport]:
    steps = [sample.step for sample in run.samples]
    seconds = np.array([sample.seconds for sample in run.samples])
    knots = _choose_knots(_sizes(steps))
    fit = fit_costs(_features(steps, knots), seconds)
    *segments, draw_s, pair_s, read_s, prompts_s, mixed_s = fit.coefficients.tolist()
    measured = Measured(
        knots,
        _at_knots(segments, knots),
        draw_s=draw_s,
        pair_cost_s=pair_s,
        read_cost_s=read_s,
        prompts_s=prompts_s,
        mixed_cost_s=mixed_s,
        most_kv_read_tokens=max(step.kv_read_tokens for step in steps),
        pipeline_parallel=run.pipeline_parallel,
    )
    return measured, FitReport(len(steps), fit.median_error, fit.p90_error)


def fit_link(transfers: Sequence[tuple[float, float]], name: str = "measured") -> Link:
    """Latency and bandwidth of measured transfers."""
    sizes = np.array([size for size, _ in transfers])
    seconds = np.array([duration for _, duration in transfers])
    fit = fit_costs(np.column_stack([np.ones(len(sizes)), np.sqrt(sizes), sizes]), seconds)
    latency_s, ramp_s, per_byte_s = (float(c) for c in fit.coefficients)
    fastest = float((sizes / seconds).max())
    bandwidth = 1 / per_byte_s if per_byte_s > 0 else fastest
    return Link(name, bandwidth, latency_s, ramp_s_per_sqrt_byte=ramp_s, source="profile")


def _sizes(steps: Sequence[Step]) -> list[int]:
    """Tokens of decodes, and of larger prompts: smaller ones differ by what prompts take."""
    decodes = {step.tokens for step in steps if step.tokens == step.draws}
    prompts = [step for step in steps if step.tokens > step.draws]
    alone = [step for step in prompts if not step.mixed] or prompts
    most = max(decodes, default=0)
    return sorted(decodes | {step.tokens for step in alone if step.tokens > most})


def _choose_knots(tokens: list[int]) -> tuple[int, ...]:
    """At most so many of the measured sizes, evenly in their order."""
    if len(tokens) <= MOST_KNOTS:
        return tuple(tokens)
    chosen = np.linspace(0, len(tokens) - 1, MOST_KNOTS).round().astype(int)
    return tuple(tokens[i] for i in chosen)


def _features(steps: Sequence[Step], knots: tuple[int, ...]) -> NDArray[np.float64]:
    """Columns: one, the part of each segment that is filled, draws, pairs, KV tokens read, whether
    there are prompts, and whether beside decodes."""
    tokens = np.array([step.tokens for step in steps], dtype=float)
    columns = [np.ones(len(steps))]
    for low, high in pairwise(knots):
        columns.append(np.clip(tokens, low, high) - low)
    rest = [(s.draws, s.pairs, s.kv_read_tokens, s.tokens > s.draws, s.mixed) for s in steps]
    return np.column_stack([*columns, np.array(rest, dtype=float)])


def _at_knots(segments: Sequence[float], knots: tuple[int, ...]) -> tuple[float, ...]:
    """Seconds, from what the first column takes and each segment a token."""
    heights = np.concatenate([[segments[0]], np.array(segments[1:]) * np.diff(knots)])
    return tuple(np.cumsum(heights).tolist())


def read_profile(path: Path) -> Profile:
    if not path.is_file():
        raise BadConfig("profile", str(path), "no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadConfig("profile", str(path), f"not JSON: {error}") from error
    return profile_from(content)


def profile_from(content: object) -> Profile:
    if not isinstance(content, dict):
        raise BadConfig("profile", type(content).__name__, "must be a JSON object")
    for key in ("model", "device", "runs"):
        if key not in content:
            raise BadConfig(f"profile.{key}", None, "is required")
    entries = _mappings("profile.runs", content["runs"])
    runs = tuple(_run(f"profile.runs[{i}]", raw) for i, raw in enumerate(entries))
    if not runs:
        raise BadConfig("profile.runs", 0, "at least one")
    transfers = tuple(
        (_number("profile.transfer", raw, "bytes"), _number("profile.transfer", raw, "seconds"))
        for raw in _mappings("profile.transfer", content.get("transfer", []))
    )
    served = tuple(
        _served(f"profile.serving[{i}]", raw)
        for i, raw in enumerate(_mappings("profile.serving", content.get("serving", [])))
    )
    processors = content.get("processors")
    return Profile(
        str(content["model"]),
        str(content["device"]),
        runs,
        transfers,
        served,
        None if processors is None else _count("profile", content, "processors"),
        _count("profile", content, "threads", 1),
    )


def _served(where: str, raw: Mapping[str, Any]) -> Served:
    ttft_s, tpot_s = (_number(where, raw, key) for key in ("ttft_s", "tpot_s"))
    if min(ttft_s, tpot_s) <= 0:
        raise BadConfig(where, dict(raw), "needs positive seconds")
    return Served(
        instances=_count(where, raw, "instances"),
        users=_count(where, raw, "users"),
        prompt_tokens=_count(where, raw, "prompt_tokens"),
        output_tokens=_count(where, raw, "output_tokens"),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        requests=int(_number(where, raw, "requests", 0)),
        doors_s=_number(where, raw, "doors_s", 0),
        loops_s=_number(where, raw, "loops_s", 0),
        prefill_s=_number(where, raw, "prefill_s", 0),
        handed_off=bool(raw.get("handed_off")),
    )


def _count(where: str, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    return max(int(_number(where, raw, key, default)), 1)


def _mappings(where: str, value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadConfig(where, value, "must be a list of objects")
    return value


def _run(where: str, raw: Mapping[str, Any]) -> Run:
    known = {
        "tensor_parallel",
        "pipeline_parallel",
        "kv_capacity_tokens",
        "prefill",
        "decode",
        "mixed",
        "beside",
    }
    for key in raw:
        if key not in known:
            raise unknown_name(where, key, known)
    samples, beside = _samples(where, raw), raw.get("beside") or {}
    crowded = _samples(f"{where}.beside", beside) if beside else ()
    capacity = raw.get("kv_capacity_tokens")
    return Run(
        int(raw.get("tensor_parallel", 1)),
        int(raw.get("pipeline_parallel", 1)),
        None if capacity is None else int(capacity),
        samples,
        crowded,
        int(_number(f"{where}.beside", beside, "neighbours", 0)),
    )


def _samples(where: str, raw: Mapping[str, Any]) -> tuple[Sample, ...]:
    samples = tuple(
        _sample(f"{where}.{kind}[{i}]", entry)
        for kind in ("prefill", "decode", "mixed")
        for i, entry in enumerate(_mappings(f"{where}.{kind}", raw.get(kind, [])))
    )
    if len(samples) < 4:
        raise BadConfig(where, len(samples), "at least 4 samples are needed")
    return samples


def _sample(where: str, raw: Mapping[str, Any]) -> Sample:
    """A pass of prompts, of decodes, or both; `context` sums the KV tokens already there."""
    tokens = int(_number(where, raw, "tokens", 0))
    squares = int(_number(where, raw, "squares", 0))
    batch = int(_number(where, raw, "batch", 0))
    context = int(_number(where, raw, "context", 0))
    prompts = int(_number(where, raw, "prompts", 1 if tokens else 0))
    pairs = int(_number(where, raw, "pairs", (squares + tokens) // 2))
    seconds = _number(where, raw, "seconds")
    if tokens + batch < 1 or seconds <= 0:
        raise BadConfig(where, dict(raw), "needs tokens or batch, and positive seconds")
    mixed = tokens > 0 and batch > 0
    return Sample(Step(tokens + batch, prompts + batch, pairs, context, mixed), seconds)


def _number(where: str, raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise BadConfig(f"{where}.{key}", value, "must be a number of at least 0")
    return float(value)
