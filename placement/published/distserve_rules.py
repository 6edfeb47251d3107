"""DistServe's simulator restated: its published event rules, to check ours against its figures.

One instance each of prefill and decode (or one aggregated), first come first served, no KV
transfer time, no decode KV capacity. Where a batch stays the same, decode steps are summed in
closed form instead of being walked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.errors import BadConfig, unknown_name
from placement.published.distserve_pipeline import Pipeline
from placement.published.distserve_stage import DecodeStage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

DECODE_BATCH_TOKENS = 50_000
DECODE_WAITING_TOKENS = 9_000_000
"""With more context than this waiting to decode, an aggregated instance stops prefilling."""
FIRST_STAGE_S, FIRST_STAGE_S_PER_TOKEN = 2e-3, 1e-7


@dataclass(frozen=True, slots=True)
class Parallel:
    tensor: int
    pipeline: int

    @property
    def accelerators(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"{self.tensor}x{self.pipeline}"


class Coefficients(NamedTuple):
    """Seconds: prefill a + b*tokens + c*squares, decode a + b*context + c*batch."""

    prefill: tuple[float, float, float]
    decode_small_batch: tuple[float, float, float]
    decode_large_batch: tuple[float, float, float]
    large_batch_from: int


@dataclass(frozen=True, slots=True)
class StageRules:
    """What one pipeline stage of an instance costs and how much it may batch."""

    times: Coefficients
    pipeline: int
    kv_capacity_tokens: int

    def prefill_s(self, tokens: int, squares: int, *, first: bool) -> float:
        a, b, c = self.times.prefill
        compute_s = (a + b * tokens + c * squares) / self.pipeline + 1e-3 * self.pipeline
        return compute_s + (FIRST_STAGE_S + FIRST_STAGE_S_PER_TOKEN * tokens if first else 0.0)

    def decode_line(self, batch: int, *, first: bool) -> tuple[float, float]:
        """(base, slope) of a step's seconds over the sum of context lengths plus one each."""
        t = self.times
        a, b, c = t.decode_small_batch if batch < t.large_batch_from else t.decode_large_batch
        base, slope = (a + c * batch) / self.pipeline, b / self.pipeline
        if first:
            base += FIRST_STAGE_S - FIRST_STAGE_S_PER_TOKEN * batch
            slope += FIRST_STAGE_S_PER_TOKEN
        return base, slope

    @property
    def decode_batch_requests(self) -> int:
        return self.kv_capacity_tokens


@dataclass(frozen=True, slots=True)
class Requests:
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def at_rate(self, rate_rps: float) -> Requests:
        """Unit-rate arrivals compressed to `rate_rps`."""
        return Requests(self.arrival_s / rate_rps, self.prompt_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Per request; TPOT divides by every output token, as DistServe does."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    makespan_s: float

    def attainment(self, ttft_s: float, tpot_s: float) -> tuple[float, float, float]:
        """Shares of requests within the TTFT target, the TPOT target, and both."""
        ttft, tpot = self.ttft_s <= ttft_s, self.tpot_s <= tpot_s
        return float(ttft.mean()), float(tpot.mean()), float((ttft & tpot).mean())


@dataclass(frozen=True, slots=True)
class Layout:
    """One aggregated instance, or one prefill and one decode instance."""

    model: str
    prefill: Parallel
    decode: Parallel | None

    @property
    def accelerators(self) -> int:
        return self.prefill.accelerators + (self.decode.accelerators if self.decode else 0)


def simulate(layout: Layout, requests: Requests) -> Outcome:
    _check(requests)
    engine = "vllm" if layout.decode is None else "distserve"
    prefill = stage_rules(engine, layout.model, layout.prefill)
    longest = int(requests.prompt_tokens.max())
    if longest > prefill.kv_capacity_tokens:
        rule = f"at most the KV capacity of {layout.prefill}, {prefill.kv_capacity_tokens} tokens"
        raise BadConfig("prompt_tokens", longest, rule)
    if layout.decode is None:
        first, last = _aggregated(prefill, requests)
    else:
        first = _prefill(prefill, requests)
        last = _decode(stage_rules(engine, layout.model, layout.decode), requests, first)
    return _outcome(requests, first, last)


def goodput_per_accelerator(
    layout: Layout,
    requests: Requests,
    *,
    ttft_s: float,
    tpot_s: float,
    attainment: float,
    high_rps: float = 16.0,
    resolution_rps: float = 0.01,
) -> float:
    """The highest rate per accelerator with that share within both targets, by bisection."""
    low, high = 0.0, high_rps
    while high - low > resolution_rps:
        middle = (low + high) / 2
        outcome = simulate(layout, requests.at_rate(middle * layout.accelerators))
        if outcome.attainment(ttft_s, tpot_s)[2] >= attainment:
            low = middle
        else:
            high = middle
    return low


def stage_rules(engine: str, model: str, parallel: Parallel) -> StageRules:
    published = _published()
    models: dict[str, Any] = published["coefficients"][engine]
    if model not in models:
        raise unknown_name("model", model, models)
    capacities: dict[str, int] = published["kv_capacity_tokens"][model]
    tensors: dict[str, Any] = models[model]
    if str(parallel.tensor) not in tensors:
        raise unknown_name("tensor_parallel", str(parallel.tensor), tensors)
    if str(parallel) not in capacities:
        raise unknown_name("parallelism", str(parallel), capacities)
    raw = tensors[str(parallel.tensor)]
    kinds = ("prefill", "decode_small_batch", "decode_large_batch")
    a, b, c = (tuple(ms / 1e3 for ms in raw[kind]) for kind in kinds)
    times = Coefficients(a, b, c, raw["large_batch_from"])
    return StageRules(times, parallel.pipeline, capacities[str(parallel)])


@cache
def _published() -> dict[str, Any]:
    path = resources.files("placement") / "profiles" / "distserve_a100_80gb.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _check(requests: Requests) -> None:
    if len(requests.arrival_s) == 0:
        raise BadConfig("workload", 0, "holds no requests")
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    if longest > DECODE_BATCH_TOKENS:
        raise BadConfig("context", longest, f"at most {DECODE_BATCH_TOKENS} tokens can decode")


def _prefill_batches(rules: StageRules, requests: Requests) -> Iterator[tuple[int, int, float]]:
    """First-stage batches in order: (from request, to request, end of the first stage)."""
    arrivals, lengths = requests.arrival_s.tolist(), requests.prompt_tokens.tolist()
    free_s, start = 0.0, 0
    while start < len(arrivals):
        now = max(free_s, arrivals[start])
        end, tokens, squares = _take_prompts(rules, arrivals, lengths, start, now)
        free_s = now + rules.prefill_s(tokens, squares, first=True)
        yield start, end, free_s
        start = end


def _take_prompts(
    rules: StageRules, arrivals: list[float], lengths: list[int], start: int, now: float
) -> tuple[int, int, int]:
    """The waiting prompts from `start` that fit the KV capacity: (end, tokens, squares)."""
    end, tokens, squares = start, 0, 0
    while end < len(arrivals) and arrivals[end] <= now:
        length = lengths[end]
        if tokens + length > rules.kv_capacity_tokens:
            break
        tokens, squares, end = tokens + length, squares + length * length, end + 1
    return end, tokens, squares


def _prefill(rules: StageRules, requests: Requests) -> list[float]:
    """When each request's prefill ends, after every pipeline stage in turn."""
    lengths = requests.prompt_tokens
    free_s = [0.0] * rules.pipeline
    first_token: list[float] = []
    for start, end, done_s in _prefill_batches(rules, requests):
        batch = lengths[start:end]
        stage_s = rules.prefill_s(int(batch.sum()), int((batch * batch).sum()), first=False)
        free_s[0] = done_s
        for before, stage in pairwise(range(rules.pipeline)):
            free_s[stage] = max(free_s[stage], free_s[before]) + stage_s
        first_token += [free_s[-1]] * (end - start)
    return first_token


def _decode(rules: StageRules, requests: Requests, ready: list[float]) -> list[float]:
    if rules.pipeline > 1:
        pipeline = Pipeline(rules, requests, DECODE_BATCH_TOKENS, DECODE_WAITING_TOKENS)
        return pipeline.decode(ready)
    stage = DecodeStage(rules, requests, DECODE_BATCH_TOKENS)
    now, waiting, total = 0.0, 0, len(ready)
    while waiting < total or stage.requests:
        if not stage.requests:
            now = max(now, ready[waiting])
        arrived = waiting
        while arrived < total and ready[arrived] <= now:
            arrived += 1
        stage.push(range(waiting, arrived))
        waiting = arrived
        stage.settle()
        now = stage.advance(now, ready[waiting] if waiting < total else None)
    return stage.finished_s


def _aggregated(rules: StageRules, requests: Requests) -> tuple[list[float], list[float]]:
    if rules.pipeline > 1:
        pipeline = Pipeline(rules, requests, DECODE_BATCH_TOKENS, DECODE_WAITING_TOKENS)
        return pipeline.serve(requests.arrival_s.tolist())
    arrivals, lengths = requests.arrival_s.tolist(), requests.prompt_tokens.tolist()
    stage = DecodeStage(rules, requests, DECODE_BATCH_TOKENS)
    first_token = [0.0] * len(arrivals)
    now, waiting, total = 0.0, 0, len(arrivals)
    while waiting < total or stage.requests:
        if not stage.requests:
            now = max(now, arrivals[waiting])
        stage.settle()
        prompts = waiting < total and arrivals[waiting] <= now
        crowded = stage.context_tokens > DECODE_WAITING_TOKENS
        if prompts and not crowded:
            end, tokens, squares = _take_prompts(rules, arrivals, lengths, waiting, now)
            now += rules.prefill_s(tokens, squares, first=True)
            first_token[waiting:end] = [now] * (end - waiting)
            stage.push(range(waiting, end))
            waiting = end
        else:
            until = now if crowded else (arrivals[waiting] if waiting < total else None)
            now = stage.advance(now, until)
    return first_token, stage.finished_s


def _outcome(requests: Requests, first: list[float], last: list[float]) -> Outcome:
    first_s, last_s = np.array(first), np.array(last)
    return Outcome(
        first_s - requests.arrival_s,
        (last_s - first_s) / requests.output_tokens,
        last_s - requests.arrival_s,
        float(last_s.max()),
    )
