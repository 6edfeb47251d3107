"""Neighbours on one machine: slower while both compute, and not a moment longer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from engine.messages import Role
from engine.slo import Slo
from placement.latency.catalog import Link
from placement.latency.machine import Machine, Wait, Waits
from placement.latency.model import LatencyModel
from placement.routing.router import Policy, RouterSettings
from placement.simulation.deployment import Deployment, InstanceModel, Overheads
from placement.simulation.dynamics import Dynamics, Failure
from placement.simulation.instance import SimulatedInstance
from placement.simulation.simulator import simulate
from placement.workload import Workload

if TYPE_CHECKING:
    from placement.simulation.outcome import Outcome

LINK = Link("slow", bytes_per_s=1e9, latency_s=0.0)


class Paced(LatencyModel):
    """10 ms a pass, 10 us a token, 1 us per KV token read, so many times over."""

    pair_s = 0.0

    def __init__(self, times: float = 1.0) -> None:
        self._times = times

    @property
    def read_s(self) -> float:
        return 1e-6 * self._times

    def fixed_s(self, tokens: int, draws: int) -> float:
        return (0.01 + 1e-5 * tokens) * self._times


def pair(crowded: LatencyModel | None = None, **fields: object) -> Deployment:
    """Two instances of one machine, who take requests in turn."""
    model = InstanceModel(Role.MIXED, Paced(), 100_000, LINK, crowded=crowded)
    turns = RouterSettings(policy=Policy.ROUND_ROBIN)
    base = Deployment((model, model), 1000, LINK, Slo(1.0, 0.1), router=turns)
    return replace(base, **fields)  # type: ignore[arg-type]


def arriving(*seconds: float, tokens: int = 100) -> Workload:
    count = len(seconds)
    return Workload(np.array(seconds), np.full(count, 64), np.full(count, tokens))


def test_an_instance_by_itself_is_not_slowed_down() -> None:
    load = arriving(0.0)
    crowded, apart = simulate(pair(Paced(2.0)), load), simulate(pair(), load)
    np.testing.assert_allclose(crowded.finished_s, apart.finished_s)


def test_two_who_compute_all_the_time_take_as_long_as_was_measured() -> None:
    load = arriving(0.0, 0.0)
    crowded, apart = simulate(pair(Paced(2.0)), load), simulate(pair(), load)
    np.testing.assert_allclose(crowded.finished_s, 2 * apart.finished_s)
    np.testing.assert_allclose(crowded.tpot_s, 2 * apart.tpot_s)


def test_the_pace_changes_when_a_neighbour_comes_and_when_it_goes() -> None:
    alone_s = simulate(pair(), arriving(0.0)).finished_s[0]
    outcome = simulate(pair(Paced(2.0)), arriving(0.0, alone_s / 2))
    first_s, second_s = outcome.finished_s
    assert first_s == pytest.approx(alone_s / 2 + 2 * (alone_s / 2))
    assert second_s == pytest.approx(first_s + alone_s - (first_s - alone_s / 2) / 2)


def test_those_on_other_machines_are_no_neighbours() -> None:
    near = pair(Paced(2.0)).instances[0]
    spread = pair(instances=(near, replace(near, node="node-1")))
    load = arriving(0.0, 0.0)
    np.testing.assert_allclose(simulate(spread, load).finished_s, simulate(pair(), load).finished_s)


def test_fewer_neighbours_than_were_measured_slow_down_less() -> None:
    near = replace(pair(Paced(3.0)).instances[0], neighbours=2)
    load = arriving(0.0, 0.0)
    half = simulate(pair(instances=(near, near)), load)
    np.testing.assert_allclose(half.finished_s, 2 * simulate(pair(), load).finished_s)


def test_busy_time_is_what_passed() -> None:
    outcome = simulate(pair(Paced(2.0)), arriving(0.0, 0.3))
    for name, index in (("mixed-0", 0), ("mixed-1", 1)):
        assert outcome.busy_s[name] == pytest.approx(outcome.e2e_s[index])


def waiting(prompts: Wait, decodes: Wait, **fields: Any) -> Deployment:
    """A pair whose passes wait for processors."""
    machine = Machine(Waits(prompts, decodes))
    shared = tuple(replace(one, machine=machine) for one in pair().instances)
    return pair(instances=shared, **fields)


def test_passes_wait_for_processors_alone_and_more_beside_others() -> None:
    crowded = waiting(Wait(0.1, 0.5), Wait(0.2, 1.0))
    apart, alone = (simulate(one, arriving(0.0)) for one in (pair(), crowded))
    assert alone.ttft_s[0] == pytest.approx(1.1 * apart.ttft_s[0])
    assert alone.tpot_s[0] == pytest.approx(1.2 * apart.tpot_s[0])
    both = simulate(crowded, arriving(0.0, 0.0))
    np.testing.assert_allclose(both.ttft_s, 1.5 * apart.ttft_s[0])
    np.testing.assert_allclose(both.tpot_s, 2.0 * apart.tpot_s[0])


def test_an_instance_as_wide_as_the_machine_is_never_alone() -> None:
    wide = Machine(Waits(Wait(0.1, 0.5), Wait(0.2, 1.0)), width=2)
    model = replace(pair().instances[0], machine=wide, tensor_parallel=2)
    apart = simulate(pair(), arriving(0.0))
    found = simulate(pair(instances=(model,)), arriving(0.0))
    assert found.ttft_s[0] == pytest.approx(1.5 * apart.ttft_s[0])
    assert found.tpot_s[0] == pytest.approx(2.0 * apart.tpot_s[0])


def test_a_request_is_longer_on_its_way_while_others_compute() -> None:
    twice = Wait(1.0, 1.0)
    crowded = waiting(twice, twice, overheads=Overheads(arrival_s=0.01))
    outcome = simulate(crowded, arriving(0.0, 0.0, 0.2))
    waits_s = outcome.prefill_started_s - outcome.arrived_s
    assert waits_s[:2].tolist() == pytest.approx([0.01, 0.01])
    assert 0.02 <= waits_s[2] < 0.05
    apart = simulate(pair(overheads=Overheads(arrival_s=0.01)), arriving(0.0, 0.1))
    assert apart.ttft_s[1] == pytest.approx(apart.ttft_s[0])


def test_a_neighbour_that_fails_slows_nobody_down_any_more() -> None:
    alone_s = simulate(pair(), arriving(0.0)).finished_s[0]
    failing = Dynamics(failures=(Failure(0.0005, "mixed-1"),), restart=False)
    waiting = simulate(pair(Paced(2.0)), arriving(0.0, 0.0), dynamics=failing)
    assert waiting.finished_s[0] < 2 * alone_s


def walked(target: Deployment, load: Workload, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedInstance, "_start_steady", lambda self, now: False)
        patch.setattr(SimulatedInstance, "_try_steady", lambda self: None)
        return simulate(target, load)


def test_skipping_steps_changes_nothing_among_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    load = Workload(
        np.cumsum(generator.exponential(0.2, 50)),
        generator.integers(1, 400, 50),
        generator.integers(2, 100, 50),
    )
    target = pair(Paced(1.7))
    skipped, every = simulate(target, load), walked(target, load, monkeypatch)
    np.testing.assert_allclose(skipped.first_token_s, every.first_token_s, atol=1e-4)
    np.testing.assert_allclose(skipped.finished_s, every.finished_s, atol=1e-4)
