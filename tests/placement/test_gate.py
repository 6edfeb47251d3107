"""Admission in virtual time: by the gateway's own rules, refused at once instead of served late."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.messages import Role
from engine.slo import Slo
from placement.latency.catalog import Link
from placement.latency.model import LatencyModel
from placement.routing.admission import AdmissionSettings
from placement.simulation.deployment import Deployment, InstanceModel
from placement.simulation.dynamics import Dynamics
from placement.simulation.simulator import simulate
from placement.workload import Workload

LINK = Link("slow", bytes_per_s=1e9, latency_s=0.0)
GATED = Dynamics(admission=AdmissionSettings(patience=1.0))


class Slow(LatencyModel):
    """A tenth of a second for a hundred tokens."""

    pair_s = read_s = 0.0

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.001 * tokens


def one_instance() -> Deployment:
    model = InstanceModel(Role.MIXED, Slow(), 100_000, LINK)
    return Deployment((model,), 1000, LINK, Slo(0.5, 0.1))


def arriving(count: int, gap_s: float) -> Workload:
    arrival_s = np.array([number * gap_s for number in range(count)])
    return Workload(arrival_s, np.full(count, 100), np.full(count, 3))


def test_all_are_let_in_where_all_are_in_time() -> None:
    load = arriving(30, 0.5)
    gated, free = simulate(one_instance(), load, dynamics=GATED), simulate(one_instance(), load)
    assert gated.refused == 0
    np.testing.assert_allclose(gated.finished_s, free.finished_s)


def test_what_would_be_late_is_refused_and_the_others_wait_less() -> None:
    load = arriving(100, 0.02)
    gated, free = simulate(one_instance(), load, dynamics=GATED), simulate(one_instance(), load)
    assert 0 < gated.refused < 100
    assert gated.refused == 100 - gated.finished.sum()
    assert np.nanmean(gated.ttft_s) < np.nanmean(free.ttft_s)


def test_nobody_is_refused_for_a_target_that_is_patient_enough() -> None:
    load = arriving(100, 0.02)
    patient = replace(GATED, admission=AdmissionSettings(patience=1000.0))
    assert simulate(one_instance(), load, dynamics=patient).refused == 0


def test_those_who_wait_for_others_ahead_are_all_let_in() -> None:
    one_by_one = AdmissionSettings(patience=1000.0, ahead_requests=1, ahead_tokens=1)
    narrow = replace(GATED, admission=one_by_one)
    outcome = simulate(one_instance(), arriving(40, 0.01), dynamics=narrow)
    assert outcome.finished.all()
    assert np.all(np.diff(outcome.first_token_s) > 0)


def test_a_request_with_a_target_of_its_own_is_held_to_it() -> None:
    load = replace(arriving(100, 0.02), slo_ttft_s=np.full(100, 0.5))
    patient = replace(GATED, admission=AdmissionSettings(patience=1000.0))
    assert simulate(one_instance(), load, dynamics=patient).refused > 0


def test_what_no_instance_can_hold_fails_and_lets_others_go_on() -> None:
    load = arriving(3, 0.01)
    load = replace(load, prompt_tokens=np.array([100, 200_000, 100]))
    one_by_one = AdmissionSettings(patience=1e6, ahead_requests=1, ahead_tokens=1)
    outcome = simulate(one_instance(), load, dynamics=replace(GATED, admission=one_by_one))
    assert outcome.finished.tolist() == [True, False, True]
    assert outcome.refused == 0
