"""DistServe's rules: the closed form against walking every step, and the rules themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import BadConfig
from placement.latency.model import steps_to_reach
from placement.published.distserve_pipeline import Pipeline
from placement.published.distserve_rules import (
    DECODE_BATCH_TOKENS,
    DECODE_WAITING_TOKENS,
    Layout,
    Parallel,
    Requests,
    goodput_per_accelerator,
    simulate,
    stage_rules,
)

ONE = Parallel(1, 1)
SPLIT = Layout("opt-13b", ONE, ONE)
AGGREGATED = Layout("opt-13b", ONE, None)


def requests(count: int = 150, seed: int = 0) -> Requests:
    generator = np.random.default_rng(seed)
    return Requests(
        np.cumsum(generator.exponential(1.0, count)),
        generator.integers(20, 1500, count),
        generator.integers(1, 300, count),
    )


def walked_step_by_step(rate: float) -> tuple[list[float], list[float]]:
    """The same aggregated instance by the pipeline of one stage, which skips nothing."""
    workload = requests().at_rate(rate)
    rules = stage_rules("vllm", "opt-13b", ONE)
    pipeline = Pipeline(rules, workload, DECODE_BATCH_TOKENS, DECODE_WAITING_TOKENS)
    return pipeline.serve(workload.arrival_s.tolist())


@pytest.mark.parametrize("rate", [0.5, 3.0, 40.0])
def test_skipping_steps_gives_the_times_of_walking_them(rate: float) -> None:
    workload = requests().at_rate(rate)
    outcome = simulate(AGGREGATED, workload)
    first, last = walked_step_by_step(rate)
    np.testing.assert_allclose(outcome.ttft_s, np.array(first) - workload.arrival_s, atol=1e-9)
    np.testing.assert_allclose(outcome.e2e_s, np.array(last) - workload.arrival_s, atol=1e-9)


def test_a_lone_request_takes_the_published_formula() -> None:
    lone = Requests(np.array([0.0]), np.array([512]), np.array([2]))
    outcome = simulate(SPLIT, lone)
    times = stage_rules("distserve", "opt-13b", ONE).times
    a, b, c = times.prefill
    assert outcome.ttft_s[0] == pytest.approx(a + b * 512 + c * 512**2 + 1e-3 + 2e-3 + 512e-7)
    a, b, c = times.decode_small_batch
    steps = [a + b * (context + 1) + c + 2e-3 + context * 1e-7 for context in (512, 513)]
    assert outcome.tpot_s[0] == pytest.approx(sum(steps) / 2)


def test_a_pipeline_stage_costs_its_share_and_the_first_one_the_overhead() -> None:
    rules = replace(stage_rules("distserve", "opt-66b", Parallel(2, 2)), pipeline=2)
    first, later = (rules.prefill_s(100, 10_000, first=f) for f in (True, False))
    assert first - later == pytest.approx(2e-3 + 100e-7)


def test_prompts_that_exceed_the_capacity_together_are_prefilled_in_turn() -> None:
    both = Requests(np.zeros(2), np.array([11_000, 11_000]), np.array([5, 5]))
    ttft = simulate(Layout("opt-66b", Parallel(2, 1), Parallel(2, 1)), both).ttft_s
    assert ttft[1] == pytest.approx(2 * ttft[0])


def test_goodput_is_where_attainment_crosses() -> None:
    workload = requests()
    goodput = goodput_per_accelerator(SPLIT, workload, ttft_s=0.3, tpot_s=0.1, attainment=0.9)
    rates = (goodput * 2, (goodput + 0.02) * 2)
    below, above = (simulate(SPLIT, workload.at_rate(r)).attainment(0.3, 0.1)[2] for r in rates)
    assert below >= 0.9 > above


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        (Layout("opt-30b", ONE, ONE), "model"),
        (Layout("opt-13b", Parallel(3, 1), ONE), "tensor_parallel"),
        (Layout("opt-13b", ONE, Parallel(1, 3)), "parallelism"),
    ],
)
def test_what_was_not_published_is_refused(layout: Layout, field: str) -> None:
    with pytest.raises(BadConfig) as refusal:
        simulate(layout, requests(5))
    assert refusal.value.field == field


def test_a_context_beyond_the_decode_batch_is_refused() -> None:
    with pytest.raises(BadConfig, match="can decode"):
        simulate(SPLIT, Requests(np.array([0.0]), np.array([50_000]), np.array([1])))


@pytest.mark.parametrize("growth", [0.0, 1e-6, 0.01])
@pytest.mark.parametrize("span", [0.0, 0.05, 0.1, 1.0, 7.7])
def test_the_fewest_steps_that_last_a_span(span: float, growth: float) -> None:
    lasts = lambda n: n * 0.1 + growth * n * (n - 1) / 2  # noqa: E731
    steps = steps_to_reach(span, 0.1, growth)
    assert lasts(steps) >= span
    assert steps == 1 or lasts(steps - 1) < span
