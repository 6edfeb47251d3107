"""What steps of servers at work tell: how much longer passes take there, and what lies between."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.latency.at_work import (
    AtWork,
    BetweenPasses,
    StepsAtWork,
    Times,
    between_passes,
    cold_of,
    times_of,
    waits_of,
)
from placement.latency.machine import Waits
from placement.latency.model import LatencyModel, Step, decode_step, mixed_step, prefill_step

BETWEEN = BetweenPasses(0.0006, 0.0001, 0.0003)
COLD_S = 0.001


class Passes(LatencyModel):
    pair_s = 1e-7
    read_s = 1e-6
    mixed_s = 0.0005

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.002 + 1e-4 * tokens + 1e-5 * draws


STEPS = [
    prefill_step([(64, 0)]),
    prefill_step([(200, 0)]),
    decode_step([100]),
    decode_step([100] * 4),
    mixed_step([(80, 0)], [100, 120]),
]


def at_work(
    step: Step, times: Times, *, others: float = 0.0, cold: bool = False, waits: float = 0.0
) -> StepsAtWork:
    latency = AtWork(Passes(), times=times)
    computed_s = latency.step_s(step) + (COLD_S if cold else 0.0)
    then_s = BETWEEN.of_step(step.draws, prompts=step.tokens > step.draws)
    company = {"waited_s": waits * computed_s, "others": others}
    return StepsAtWork(10, step, computed_s, **company, cold=cold, followed=8, then_s=then_s)


def test_what_passes_take_longer_is_told_by_kind_and_company():
    alone, beside = Times(1.2, 1.05, 0.0002), Times(1.5, 1.3, 0.0004)
    steps = [at_work(step, alone) for step in STEPS]
    steps += [at_work(step, beside, others=1.0) for step in STEPS]
    steps += [at_work(step, Times(9.0, 9.0), cold=True) for step in STEPS]
    for times, company in ((alone, False), (beside, True)):
        found = times_of(steps, Passes(), beside=company)
        assert found == pytest.approx(times, rel=0.01)


def test_passes_of_which_nothing_was_seen_take_as_long_as_one_after_another():
    assert times_of([], Passes(), beside=False) == Times(1.0, 1.0)
    only_decodes = [at_work(decode_step([100]), Times(1.0, 1.4))]
    found = times_of(only_decodes, Passes(), beside=False)
    assert found == pytest.approx((1.0, 1.4, 0.0)), "of one at a time, so all is in proportion"


def test_what_lies_between_passes_grows_with_tokens_and_is_more_after_prompts():
    steps = [at_work(step, Times()) for step in (*STEPS, decode_step([50] * 9))]
    unlike = replace(steps[0], others=1.0, then_s=1.0)
    nothing_after = replace(steps[0], followed=0, then_s=0.0)
    found = between_passes([*steps, unlike, nothing_after])
    assert found.step_s == pytest.approx(BETWEEN.step_s)
    assert found.token_s == pytest.approx(BETWEEN.token_s)
    assert found.prompts_s == pytest.approx(BETWEEN.prompts_s)
    assert between_passes([]) == BetweenPasses()


def test_what_lies_between_passes_waits_for_processors_as_they_do():
    steps = [at_work(step, Times(), waits=0.25) for step in (*STEPS, decode_step([50] * 9))]
    assert between_passes(steps).step_s == pytest.approx(BETWEEN.step_s / 1.25)


def test_what_lies_between_passes_beside_others_is_told_by_steps_beside_others():
    several = (*STEPS, decode_step([50] * 9))
    alone = [at_work(step, Times()) for step in several]
    beside = [at_work(step, Times(), others=1.0, waits=0.5) for step in several]
    longer = [replace(one, then_s=3 * one.then_s) for one in beside]
    found = between_passes([*alone, *longer], beside=True)
    assert found.step_s == pytest.approx(2 * BETWEEN.step_s)
    assert found.prompts_s == pytest.approx(2 * BETWEEN.prompts_s)
    assert between_passes([*alone, *longer]).step_s == pytest.approx(BETWEEN.step_s)
    assert between_passes(alone, beside=True).step_s == pytest.approx(BETWEEN.step_s)


def test_waits_are_told_by_kind_and_company():
    seen = {(True, 0.0): 0.1, (True, 1.5): 0.6, (False, 0.0): 0.05, (False, 1.5): 0.3}
    steps = [
        at_work(step, Times(), others=others, waits=wait)
        for (prompts, others), wait in seen.items()
        for step in STEPS
        if (step.pairs > 0) is prompts
    ]
    waits = waits_of(steps)
    assert waits.slowed(0.0, prompts=True) == pytest.approx(1.1)
    assert waits.slowed(1.5, prompts=True) == pytest.approx(1.6)
    assert waits.slowed(9.0, prompts=True) == pytest.approx(1.6)
    assert waits.slowed(0.75, prompts=False) == pytest.approx(1.0 + (0.05 + 0.3) / 2)


def test_steps_beside_others_for_a_part_tell_of_both():
    """Long passes are hardly ever all alone, or never alone."""
    alone, beside = Times(1.2, 1.05, 0.0002), Times(1.5, 1.3, 0.0004)
    steps = []
    for part in (0.3, 0.7):
        between = Times(*(a + part * (b - a) for a, b in zip(alone, beside, strict=True)))
        steps += [at_work(step, between, others=part, waits=0.1 + part * 0.4) for step in STEPS]
    for times, company in ((alone, False), (beside, True)):
        assert times_of(steps, Passes(), beside=company) == pytest.approx(times, rel=0.01)
    waits = waits_of(steps)
    for wait in waits[:2]:
        assert wait == pytest.approx((0.1, 0.5), rel=0.01)


def test_where_nothing_tells_company_apart_both_are_the_same():
    alone = [at_work(step, Times(1.2, 1.1)) for step in STEPS]
    partly = [at_work(step, Times(1.2, 1.1), others=0.5, waits=0.3) for step in STEPS]
    for steps in (alone, partly):
        for company in (False, True):
            found = times_of(steps, Passes(), beside=company)
            assert found == pytest.approx((1.2, 1.1, 0.0), rel=0.01, abs=1e-6)
    assert waits_of(partly).prompts == pytest.approx((0.3, 0.3), rel=0.01)


def test_nobody_waits_of_whom_nothing_was_seen_and_as_alone_where_no_others_were():
    assert waits_of([]) == Waits()
    alone = waits_of([at_work(decode_step([100]), Times(), waits=0.2)])
    assert alone.slowed(3.0, prompts=False) == pytest.approx(1.2)
    assert alone.slowed(3.0, prompts=True) == 1.0


def test_a_rest_costs_what_passes_take_longer_after_it():
    times = Times(1.2, 1.1)
    steps = [at_work(step, times, cold=cold) for step in STEPS for cold in (False, True)]
    latency = AtWork(Passes(), BETWEEN, times)
    assert cold_of(steps, latency) == pytest.approx(COLD_S)
    assert cold_of(steps[::2], latency) == 0.0
    quicker = [replace(one, processor_s=one.processor_s / 2) for one in steps]
    assert cold_of(quicker, latency) == 0.0


def test_steps_at_work_are_passes_at_their_pace_and_what_lies_between():
    latency = AtWork(Passes(), BETWEEN, Times(1.5, 1.25, 0.0002))
    decodes = decode_step([300] * 4)
    assert latency.step_s(decodes) == pytest.approx(
        1.25 * Passes().step_s(decodes) + 0.0002 + BETWEEN.of_step(4, prompts=False)
    )
    one = decode_step([300])
    assert latency.step_s(one) == pytest.approx(
        1.25 * Passes().step_s(one) + BETWEEN.of_step(1, prompts=False)
    )
    prompt = prefill_step([(64, 0)])
    assert latency.step_s(prompt) == pytest.approx(
        1.5 * Passes().step_s(prompt) + BETWEEN.step_s + BETWEEN.token_s + BETWEEN.prompts_s
    )
    assert latency.decode_run_s(4, 1200, 20) == pytest.approx(
        sum(latency.decode_s([300 + step] * 4) for step in range(20))
    )
