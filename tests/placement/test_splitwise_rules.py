"""Splitwise's rules on traces small enough to follow by hand, and larger ones for invariants."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import BadConfig
from placement.published.splitwise_rules import Fleet, Trace, iteration_times, simulate

H100 = ("h100-80gb",)


def trace(*rows: tuple[float, int, int]) -> Trace:
    arrival, prompt, output = zip(*rows, strict=True)
    return Trace(np.array(arrival, float), np.array(prompt), np.array(output))


def busy_trace(count: int = 300, rate: float = 40.0, seed: int = 1) -> Trace:
    generator = np.random.default_rng(seed)
    return Trace(
        np.cumsum(generator.exponential(1 / rate, count)),
        generator.integers(50, 4000, count),
        generator.integers(2, 300, count),
    )


def test_a_lone_request_runs_its_prompt_then_its_tokens() -> None:
    outcome = simulate(Fleet("bloom-176b", H100), trace((1.0, 512, 11)))
    times = iteration_times("bloom-176b", "h100-80gb")
    assert outcome.ttft_s[0] == pytest.approx(times.prompt(512))
    assert outcome.e2e_s[0] == pytest.approx(times.prompt(512) + 10 * times.token(1))
    assert outcome.queue_s[0] == 0


def test_a_prompt_interrupts_tokens_at_the_next_iteration_and_shares_it() -> None:
    times = iteration_times("bloom-176b", "h100-80gb")
    first_prompt = times.prompt(512)
    arrives = first_prompt + 0.5 * times.token(1)
    outcome = simulate(Fleet("bloom-176b", H100), trace((0, 512, 100), (arrives, 512, 2)))
    starts = first_prompt + times.token(1)
    assert outcome.queue_s[1] == pytest.approx(starts - arrives)
    assert outcome.ttft_s[1] == pytest.approx(starts - arrives + times.mixed(513))


def test_split_machines_wait_for_the_kv() -> None:
    fleet = Fleet("bloom-176b", H100, H100)
    outcome = simulate(fleet, trace((0, 1000, 2)))
    times = iteration_times("bloom-176b", "h100-80gb")
    kv_s = 1000 * 2 * 14336 * 70 * 2 / (200 * 1024**3)
    assert outcome.e2e_s[0] - outcome.ttft_s[0] == pytest.approx(kv_s + times.token(1))


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet("bloom-176b", H100 * 2),
        Fleet("bloom-176b", H100 * 2, ("a100-80gb",)),
        Fleet("llama2-70b", H100, ("h100-80gb-pcap",) * 2),
    ],
)
def test_every_request_of_an_overload_ends(fleet: Fleet) -> None:
    overload = busy_trace()
    outcome = simulate(fleet, overload)
    assert (outcome.queue_s >= 0).all()
    assert (outcome.ttft_s > outcome.queue_s).all()
    assert (outcome.completed_s > overload.arrival_s + outcome.ttft_s).all()


def test_more_machines_do_not_lengthen_the_run() -> None:
    spans = [simulate(Fleet("bloom-176b", H100 * n), busy_trace()).makespan_s for n in (1, 2, 8)]
    assert spans == sorted(spans, reverse=True)


@pytest.mark.parametrize(
    ("fleet", "rows", "field"),
    [
        (Fleet("gpt-5", H100), (0, 10, 10), "model"),
        (Fleet("bloom-176b", ("abacus",)), (0, 10, 10), "hardware"),
        (Fleet("bloom-176b", ()), (0, 10, 10), "machines"),
        (Fleet("bloom-176b", H100), (0, 10, 1), "token_size"),
        (Fleet("bloom-176b", H100), (0, 90_000, 10), "context"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    fleet: Fleet, rows: tuple[float, int, int], field: str
) -> None:
    with pytest.raises(BadConfig) as refusal:
        simulate(fleet, trace(rows))
    assert refusal.value.field == field
