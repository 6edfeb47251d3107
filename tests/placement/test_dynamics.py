"""What acts on simulated instances by itself: moves, failures and the autoscaler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import InstanceState, Role
from engine.slo import Slo
from placement.balancing.balancer import Move
from placement.balancing.settings import BalancerSettings
from placement.latency.catalog import Link
from placement.latency.model import LatencyModel
from placement.routing.router import RouterSettings
from placement.scaling.policy import Policy
from placement.simulation.deployment import Deployment, InstanceModel
from placement.simulation.dynamics import Dynamics, Failure
from placement.simulation.simulator import Simulation
from placement.workload import Workload

LINK = Link("slow", bytes_per_s=1e9, latency_s=0.0)


class Flat(LatencyModel):
    """10 ms a pass, 10 us a token, 1 us per KV token read."""

    pair_s = 0.0
    read_s = 1e-6

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.01 + 1e-5 * tokens


def deployment(*roles: Role, kv_tokens: int = 20_000) -> Deployment:
    models = tuple(InstanceModel(role, Flat(), kv_tokens, LINK) for role in roles)
    return Deployment(models, 10_000, LINK, Slo(1.0, 0.1), block_tokens=16)


def workload(count: int = 60, rate: float = 20.0, seed: int = 0) -> Workload:
    generator = np.random.default_rng(seed)
    return Workload(
        np.cumsum(generator.exponential(1 / rate, count)),
        generator.integers(1, 400, count),
        generator.integers(1, 200, count),
    )


def lone(prompt: int = 1000, output: int = 100) -> Workload:
    return Workload(np.array([0.0]), np.array([prompt]), np.array([output]))


def policy(**changes: object) -> Policy:
    values: dict[str, object] = {
        "budget_accelerators": 6,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 3.0,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 3.0,
        "cooldown_s": 3.0,
        "roles": {
            "prefill": {"max_replicas": 4, "signals": [_signal("queued_prompt_tokens", 300.0)]},
            "decode": {"max_replicas": 4, "signals": [_signal("batch", 6.0)]},
        },
    }
    return Policy.model_validate({**values, **changes}, strict=False)


def _signal(name: str, target: float) -> dict[str, object]:
    return {"signal": name, "target": target}


def run(target: Deployment, load: Workload, dynamics: Dynamics) -> Simulation:
    """A simulation that has ended well: everything answered, every pool empty."""
    simulation = Simulation(target, load, dynamics=dynamics)
    outcome = simulation.run()
    assert outcome.finished.all()
    for one in simulation.instances.values():
        assert one.is_empty, one.name
        one.pool.check()
    return simulation


def test_dynamics_in_which_nothing_happens_change_nothing() -> None:
    target, load = deployment(Role.PREFILL, Role.DECODE), workload()
    plain = Simulation(target, load).run()
    living = run(target, load, Dynamics())
    np.testing.assert_array_equal(living.ledger.moments["finished_s"], plain.finished_s)


def moved_once(load: Workload, at_s: float) -> Simulation:
    target = deployment(Role.DECODE, Role.DECODE)
    target = replace(target, router=RouterSettings(local_prompt_tokens=100_000))
    simulation = Simulation(target, load, dynamics=Dynamics())
    migrations = simulation._living.migrations
    move = Move("0", "decode-0", "decode-1", "balance")
    simulation.at(at_s, lambda _, now: migrations.ask(move, now), None)
    simulation.run()
    assert all(one.is_empty for one in simulation.instances.values())
    return simulation


class Counted(Simulation):
    """Counts what is to happen."""

    events = 0

    def at(self, *arguments: object) -> None:
        self.events += 1
        super().at(*arguments)  # type: ignore[arg-type]


def test_nothing_looks_after_a_fleet_that_nobody_asks_anything() -> None:
    """Two requests with a year between them take no more looks than two at once."""
    events = []
    for gap_s in (0.0, 3.2e7):
        load = Workload(np.array([0.0, gap_s]), np.array([100, 100]), np.array([50, 50]))
        pair = deployment(Role.MIXED, Role.MIXED)
        simulation = Counted(pair, load, dynamics=Dynamics(balance=True))
        assert simulation.run().finished.all()
        events.append(simulation.events)
    assert events[1] < 2 * events[0]


def test_a_migration_copies_while_the_source_decodes_and_pauses_for_the_rest() -> None:
    stays = Simulation(deployment(Role.MIXED), lone()).run()
    simulation = moved_once(lone(), at_s=0.2)
    record = simulation.record
    assert (record.migrations, record.failed_migrations) == (1, 0)
    (pause_s,) = record.pauses_s
    copy_s = 1000 * 10_000 / 1e9
    assert 0 < pause_s < copy_s / 10
    late_s = simulation.ledger.moments["finished_s"][0] - stays.finished_s[0]
    assert 0 < late_s < pause_s + 0.015
    assert simulation.instances["decode-1"].busy_s > 0.5


def test_a_request_that_ends_while_it_is_copied_ends_once_and_frees_both_sides() -> None:
    load = lone(prompt=10_000, output=2)
    record = moved_once(load, at_s=0.115).record
    assert (record.migrations, record.failed_migrations) == (0, 1)


def test_requests_of_a_failed_instance_go_on_elsewhere_after_what_was_delivered() -> None:
    target, load = deployment(Role.MIXED, Role.MIXED), lone(prompt=100, output=200)
    undisturbed = Simulation(target, load).run().finished_s[0]
    simulation = run(target, load, Dynamics(failures=(Failure(1.0, "mixed-0"),), notice_s=1.0))
    assert (simulation.record.losses, simulation.record.replays) == (1, 1)
    late_s = simulation.ledger.moments["finished_s"][0] - undisturbed
    assert 1.0 < late_s < 1.1


def test_what_a_policy_asks_for_starts_serves_and_goes_within_the_budget() -> None:
    busy = workload(count=400, rate=40.0)
    quiet = workload(count=20, rate=0.5, seed=1)
    last_s = busy.arrival_s[-1]
    load = Workload(
        np.concatenate([busy.arrival_s, quiet.arrival_s + last_s]),
        np.concatenate([busy.prompt_tokens, quiet.prompt_tokens]),
        np.concatenate([busy.output_tokens, quiet.output_tokens]),
    )
    target = deployment(Role.PREFILL, Role.DECODE)
    record = run(target, load, Dynamics(policy=policy(), start_s=2.0)).record
    assert record.starts > 0
    assert record.stops > 0
    assert record.most_accelerators <= 6
    assert record.accelerator_hours < 6 * record.lasted_s / 3600
    assert record.timeline[-1][1] == {"prefill": 1, "decode": 1}


def test_accelerators_are_accounted_for_until_the_last_request_ends() -> None:
    full = Dynamics(policy=policy(budget_accelerators=2))
    record = run(deployment(Role.PREFILL, Role.DECODE), lone(), full).record
    assert 0.1 < record.lasted_s < 10.0 < full.patience_s
    assert sum(record.accelerator_s.values()) == pytest.approx(2 * record.lasted_s)


def test_a_switched_decode_instance_hands_its_requests_to_the_others() -> None:
    target = deployment(Role.PREFILL, Role.DECODE, Role.DECODE)
    load = workload(count=30, rate=100.0)
    simulation = Simulation(target, load, dynamics=Dynamics())

    def turn(_: None, now: float) -> None:
        simulation.instances["decode-0"].turn(Role.PREFILL)

    simulation.at(0.6, turn, None)
    assert simulation.run().finished.all()
    assert simulation.record.migrations > 0
    assert all(one.is_empty for one in simulation.instances.values())


def test_a_draining_instance_takes_nothing_new() -> None:
    target = deployment(Role.MIXED, Role.MIXED)
    simulation = Simulation(target, workload(), dynamics=Dynamics())
    simulation.instances["mixed-0"].become(InstanceState.DRAINING)
    assert simulation.run().finished.all()
    assert simulation.instances["mixed-0"].busy_s == 0


def test_a_draining_instance_stays_for_what_is_yet_to_be_handed_to_it() -> None:
    target = replace(
        deployment(Role.PREFILL, Role.DECODE), router=RouterSettings(local_prompt_tokens=0)
    )
    simulation = Simulation(target, lone(), dynamics=Dynamics())
    fleet, drained = simulation._living.fleet, simulation.instances["decode-0"]

    def drain(_: None, now: float) -> None:
        drained.become(InstanceState.DRAINING)
        fleet._sweep(now)

    simulation.at(0.01, drain, None)
    assert simulation.run().finished.all()
    assert simulation.instances["decode-0"] is drained
    assert drained.busy_s > 0
    fleet._sweep(10.0)
    assert "decode-0" not in simulation.instances


def test_requests_wait_for_an_instance_and_fail_when_none_ever_comes() -> None:
    target, load = deployment(Role.MIXED), workload(count=10)
    failures = (Failure(0.0, "mixed-0"),)
    waited = run(target, load, Dynamics(failures=failures, start_s=30.0))
    assert waited.ledger.moments["first_token_s"][9] > 30.0
    never = Dynamics(failures=failures, restart=False, patience_s=60.0)
    outcome = Simulation(target, load, dynamics=never).run()
    assert not outcome.finished.any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kv_tokens=st.sampled_from([800, 2000, 20_000]),
    rate=st.sampled_from([5.0, 50.0]),
    failing=st.lists(
        st.tuples(st.floats(0.0, 8.0), st.sampled_from(["prefill-0", "decode-0", "decode-1"])),
        max_size=3,
    ),
    scaled=st.booleans(),
)
def test_every_request_ends_whatever_moves_fails_and_scales(
    seed: int, kv_tokens: int, rate: float, failing: list[tuple[float, str]], *, scaled: bool
) -> None:
    target = deployment(Role.PREFILL, Role.DECODE, Role.DECODE, kv_tokens=kv_tokens)
    dynamics = Dynamics(
        policy=policy() if scaled else None,
        balance=True,
        balancer=BalancerSettings(low_steps=200, high_steps=300, least_gain=0.0),
        look_s=0.2,
        start_s=1.0,
        unplaced_share=0.3,
        failures=tuple(Failure(*one) for one in failing),
        seed=seed,
    )
    load = workload(count=50, rate=rate, seed=seed)
    first, second = run(target, load, dynamics), run(target, load, dynamics)
    assert first.ledger.moments["finished_s"] == second.ledger.moments["finished_s"]
    assert first.record == second.record


def test_balancing_relieves_an_instance_that_runs_short() -> None:
    target = deployment(Role.PREFILL, Role.DECODE, Role.DECODE, kv_tokens=6000)
    target = replace(target, router=RouterSettings(local_prompt_tokens=0))
    generator = np.random.default_rng(3)
    outputs = np.where(generator.random(80) < 0.15, 1500, 30)
    load = Workload(np.cumsum(generator.exponential(0.1, 80)), np.full(80, 200), outputs)
    small = BalancerSettings(newcomer_share=0.1)
    balanced = run(target, load, Dynamics(balance=True, balancer=small, look_s=0.5))
    left = run(target, load, Dynamics())
    assert balanced.record.migrations > 0
    assert left.record.migrations == 0


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_lost_side_of_a_handoff_loses_no_request(role: Role) -> None:
    target = replace(
        deployment(Role.PREFILL, Role.DECODE, Role.PREFILL, Role.DECODE),
        kv_bytes_per_token=1_000_000,
        router=RouterSettings(local_prompt_tokens=0),
    )
    failures = (Failure(0.25, f"{role.value}-0"),)
    simulation = run(target, workload(count=8, rate=1000.0), Dynamics(failures=failures))
    assert simulation.record.losses == 1
