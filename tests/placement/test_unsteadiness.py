"""Machines that others share, unseen: their paces, and what simulated instances make of them."""

from __future__ import annotations

import numpy as np
import pytest

from engine.messages import Role
from engine.slo import Slo
from placement.latency.catalog import Link
from placement.latency.machine import WINDOW_S, Machine, Waits
from placement.latency.model import LatencyModel
from placement.simulation.deployment import Deployment, InstanceModel
from placement.simulation.simulator import simulate
from placement.simulation.unsteadiness import unsteadiness
from placement.workload import Workload


def machine(*paces: float, cold_s: float = 0.0) -> Machine:
    return Machine(Waits(), cold_s=cold_s, paces=paces)


class Passes(LatencyModel):
    pair_s = 0.0
    read_s = 0.0

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.001


def deployment(shared: Machine | None) -> Deployment:
    link = Link("slow", bytes_per_s=1e9, latency_s=0.0)
    model = InstanceModel(Role.MIXED, Passes(), 1_000_000, link, machine=shared)
    return Deployment((model,), 1000, link, Slo(1.0, 0.1))


def one_by_one(count: int, output: int = 400) -> Workload:
    return Workload(np.arange(count) * 2.0, np.full(count, 16), np.full(count, output))


def test_a_steady_machine_has_no_paces():
    assert unsteadiness("mixed-0", None) is None
    assert unsteadiness("mixed-0", machine()) is None


def test_steps_keep_a_pace_until_it_may_change():
    paces = unsteadiness("mixed-0", machine(0.5, 2.0))
    assert paces is not None
    for window in range(50):
        now = (window + 0.25) * WINDOW_S
        first_s, growth_s, steps = paces.go(0.001, 0.0001, 10_000, now)
        pace = first_s / 0.001
        assert pace in (pytest.approx(0.5), pytest.approx(2.0))
        assert growth_s == pytest.approx(0.0001 * pace)
        end_s = now + steps * first_s + growth_s * steps * (steps - 1) / 2
        assert end_s >= (window + 1) * WINDOW_S > end_s - first_s - growth_s * steps
        assert paces.go(0.001, 0.0, 1, now) == (first_s, 0.0, 1)


def test_instances_have_paces_of_their_own_and_always_the_same():
    def drawn(name: str) -> list[float]:
        paces = unsteadiness(name, machine(0.5, 1.0, 2.0))
        assert paces is not None
        return [paces.go(1.0, 0.0, 1, (n + 0.5) * WINDOW_S)[0] for n in range(200)]

    assert drawn("mixed-0") == drawn("mixed-0")
    assert drawn("mixed-0") != drawn("mixed-1")
    assert sorted(set(drawn("mixed-0"))) == [0.5, 1.0, 2.0]


def test_answers_on_an_unsteady_machine_are_spread():
    """In its quick windows more tokens come: their mean is that of the paces' inverses."""
    steady = simulate(deployment(machine()), one_by_one(100)).tpot_s
    unsteady = simulate(deployment(machine(0.5, 1.5)), one_by_one(100)).tpot_s
    assert np.ptp(steady) == pytest.approx(0.0, abs=1e-12)
    assert 0.7 < unsteady.mean() / steady.mean() < 1.0
    assert 0.05 < unsteady.std() / unsteady.mean() < 0.5


def test_the_first_pass_after_a_rest_and_the_first_decode_after_prompts_take_longer():
    cold = simulate(deployment(machine(cold_s=0.003)), one_by_one(3, output=401))
    steady = simulate(deployment(machine()), one_by_one(3, output=401))
    assert (cold.ttft_s - steady.ttft_s).tolist() == pytest.approx([0.003] * 3)
    assert (400 * (cold.tpot_s - steady.tpot_s)).tolist() == pytest.approx([0.003] * 3)
