"""What reports draw: deployments over rates, and how busy they are over time."""

from __future__ import annotations

import numpy as np
import pytest

from engine.messages import Role
from placement.latency.catalog import find_model, one_kind
from placement.planning.candidate import Candidate, deployment_of
from placement.planning.costbook import CostBook, Cut
from placement.planning.exploration import WINDOWS, over_rates, watched
from placement.planning.plan import PoolPlan, Target
from placement.routing.admission import AdmissionSettings
from placement.simulation.deployment import Deployment, Overheads
from placement.simulation.dynamics import Dynamics
from placement.simulation.simulator import simulate
from placement.workload import Arrivals, Workload, fixed_lengths


def pair() -> Deployment:
    book = CostBook(find_model("llama-3.1-8b"), one_kind("l4", 1, 2))
    pools = tuple(PoolPlan(role, 1, Cut("l4")) for role in (Role.PREFILL, Role.DECODE))
    return deployment_of(book, Candidate(pools, 2048), Target(1.0, 0.1), Overheads())


def load(rate_rps: float) -> Workload:
    times = Arrivals(np.random.default_rng(0)).times(120, rate_rps)
    return fixed_lengths(600, 40, times)


def test_more_load_never_meets_more_of_the_targets() -> None:
    points = over_rates(pair(), load(1.0), (0.5, 4.0, 40.0))
    shares = [point.attainment for point in points]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
    assert shares[-1] < 0.5


def test_watching_a_simulation_changes_nothing_and_accounts_for_all_its_work() -> None:
    outcome, busy = watched(pair(), load(4.0))
    alone = simulate(pair(), load(4.0))
    assert outcome.figures() == alone.figures()
    window_s = float(np.diff(busy.ends_s)[0])
    for role, shares in busy.by_role.items():
        assert ((shares >= 0) & (shares <= 1)).all()
        assert shares.sum() * window_s == pytest.approx(alone.busy_s[f"{role}-0"], rel=0.05)


def test_a_long_answer_after_the_last_arrival_is_watched_at_few_points() -> None:
    lone = fixed_lengths(600, 4000, np.zeros(1))
    outcome, busy = watched(pair(), lone)
    assert WINDOWS <= len(busy.ends_s) < 2 * WINDOWS
    window_s = float(busy.ends_s[0])
    np.testing.assert_allclose(np.diff(busy.ends_s), window_s)
    assert 0 <= busy.ends_s[-1] - outcome.duration_s <= window_s
    worked_s = outcome.busy_s["decode-0"]
    assert busy.by_role["decode"].sum() * window_s == pytest.approx(worked_s, rel=0.05)


def test_what_is_drawn_is_what_was_simulated() -> None:
    dynamics = Dynamics(admission=AdmissionSettings(patience=1.0))
    crowded = load(60.0)
    alone = simulate(pair(), crowded, dynamics=dynamics)
    outcome, _ = watched(pair(), crowded, dynamics)
    (point,) = over_rates(pair(), crowded, [crowded.rate_rps], dynamics)
    assert outcome.refused == alone.refused > 0
    assert outcome.figures() == alone.figures()
    assert point.attainment == pytest.approx(alone.attainment, abs=0.02)
    (let_in,) = over_rates(pair(), crowded, [crowded.rate_rps])
    assert point.ttft_p90_s < let_in.ttft_p90_s
