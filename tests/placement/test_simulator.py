"""The simulator: exact where it skips steps, empty at the end, and faithful to memory and links."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Chunk
from engine.blocks import BlockPool, blocks_for
from engine.messages import Role
from engine.request import Request, Sampling, start_sequence
from engine.slo import Slo
from placement.latency.catalog import Link, find_device, find_link, find_model
from placement.latency.model import LatencyModel, decode_step, prefill_step
from placement.latency.roofline import Roofline
from placement.role import RoleSettings
from placement.routing.router import RouterSettings
from placement.simulation.deployment import Deployment, InstanceModel, Overheads
from placement.simulation.instance import SimulatedInstance
from placement.simulation.outcome import Outcome, weighted_spread
from placement.simulation.simulator import Simulation, simulate
from placement.simulation.steady import ONLY_DECODES, SteadyBatcher
from placement.workload import PrefixTree, Workload

SLOW_LINK = Link("slow", bytes_per_s=1e9, latency_s=0.0)
KV_BYTES = 1000


class Flat(LatencyModel):
    """10 ms a pass, 10 us a token, 1 us per KV token read."""

    pair_s = 0.0
    read_s = 1e-6

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.01 + 1e-5 * tokens


def instance(role: Role, kv_tokens: int = 100_000, **fields: object) -> InstanceModel:
    base = InstanceModel(role, Flat(), kv_tokens, SLOW_LINK)
    return replace(base, **fields)  # type: ignore[arg-type]


def deployment(*roles: Role, kv_tokens: int = 100_000, **fields: object) -> Deployment:
    models = tuple(instance(role, kv_tokens) for role in roles)
    base = Deployment(models, KV_BYTES, SLOW_LINK, Slo(1.0, 0.1), block_tokens=16)
    return replace(base, **fields)  # type: ignore[arg-type]


def workload(count: int = 60, rate: float = 10.0, seed: int = 0, longest: int = 400) -> Workload:
    generator = np.random.default_rng(seed)
    return Workload(
        np.cumsum(generator.exponential(1 / rate, count)),
        generator.integers(1, longest, count),
        generator.integers(1, longest // 4, count),
    )


def lone(prompt: int, output: int) -> Workload:
    return Workload(np.array([0.0]), np.array([prompt]), np.array([output]))


def walked(target: Deployment, load: Workload, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Asking the batcher for every single step."""
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedInstance, "_start_steady", lambda self, now: False)
        patch.setattr(SimulatedInstance, "_try_steady", lambda self: None)
        return simulate(target, load)


@pytest.mark.parametrize("rate", [2.0, 20.0, 200.0])
@pytest.mark.parametrize("roles", [(Role.MIXED,), (Role.PREFILL, Role.DECODE)])
def test_skipping_steps_changes_nothing(
    roles: tuple[Role, ...], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, load = deployment(*roles), workload(rate=rate)
    skipped, every = simulate(target, load), walked(target, load, monkeypatch)
    np.testing.assert_allclose(skipped.first_token_s, every.first_token_s, atol=1e-4)
    np.testing.assert_allclose(skipped.finished_s, every.finished_s, atol=1e-4)


def test_a_lone_request_takes_its_passes() -> None:
    outcome = simulate(deployment(Role.MIXED), lone(100, 5))
    flat = Flat()
    prefill_s = flat.step_s(prefill_step([(100, 0)]))
    decode_s = sum(flat.step_s(decode_step([100 + i])) for i in range(4))
    assert outcome.ttft_s[0] == pytest.approx(prefill_s)
    assert outcome.e2e_s[0] == pytest.approx(prefill_s + decode_s)
    assert outcome.tpot_s[0] == pytest.approx(decode_s / 4)


def test_a_handoff_waits_for_what_of_the_copy_could_not_overlap() -> None:
    whole = deployment(Role.PREFILL, Role.DECODE, overheads=Overheads(layer_groups=1))
    halves = deployment(
        Role.PREFILL, Role.DECODE, overheads=Overheads(layer_groups=2, piece_bytes=100 * KV_BYTES)
    )
    small = replace(halves, overheads=replace(halves.overheads, piece_bytes=101 * KV_BYTES))
    copy_s = 200 * KV_BYTES / 1e9
    for target, visible_s in ((whole, copy_s), (halves, copy_s / 2), (small, copy_s)):
        outcome = simulate(target, lone(200, 3))
        transfer_s = outcome.transferred_s[0] - outcome.first_token_s[0]
        assert transfer_s == pytest.approx(visible_s)


def test_handoffs_share_a_link_one_after_another() -> None:
    target = deployment(Role.PREFILL, Role.DECODE, overheads=Overheads(layer_groups=1))
    remote = replace(target, router=RouterSettings(local_prompt_tokens=0))
    three = Workload(np.zeros(3), np.full(3, 300), np.full(3, 5))
    waits = np.sort(simulate(remote, three).parts_s()["transfer"])
    np.testing.assert_allclose(waits, np.array([1, 1, 2]) * 300 * KV_BYTES / 1e9)


def test_a_full_decode_pool_holds_handoffs_back_until_there_is_room() -> None:
    small = replace(
        deployment(Role.PREFILL),
        instances=(instance(Role.PREFILL), instance(Role.DECODE, kv_tokens=400)),
        router=RouterSettings(local_prompt_tokens=0),
    )
    load = Workload(np.zeros(4), np.full(4, 300), np.full(4, 50))
    outcome = simulate(small, load)
    assert outcome.finished.all()
    starts = np.sort(outcome.decode_started_s)
    ends = np.sort(outcome.finished_s)
    assert (starts[1:] >= ends[:-1]).all()


def test_a_request_that_no_pool_can_hold_fails_and_the_others_do_not() -> None:
    load = Workload(np.array([0.0, 0.1]), np.array([5000, 50]), np.array([5, 5]))
    outcome = simulate(deployment(Role.MIXED, kv_tokens=1000), load)
    assert outcome.finished.tolist() == [False, True]
    assert outcome.figures()["failed"] == 1


def test_shortage_preempts_and_everyone_still_finishes() -> None:
    load = Workload(np.linspace(0, 0.1, 12), np.full(12, 60), np.full(12, 120))
    simulation = Simulation(deployment(Role.MIXED, kv_tokens=1024), load)
    outcome = simulation.run()
    assert outcome.preemptions > 0
    assert outcome.finished.all()
    assert all(one.is_empty for one in simulation.instances.values())


def test_shared_prefixes_are_computed_once() -> None:
    count = 20
    alone = Workload(np.arange(count) * 1.0, np.full(count, 1000), np.full(count, 5))
    shared = replace(alone, prefix_id=np.zeros(count, dtype=int), prefix_tokens=np.full(count, 960))
    target = deployment(Role.MIXED)
    first, later = simulate(target, shared).ttft_s[[0, -1]]
    assert later < 0.6 * first
    assert simulate(target, alone).ttft_s[-1] == pytest.approx(first)


def test_prefixes_that_continue_others_are_computed_once() -> None:
    """Turns of a conversation, and then one that shares only its beginning."""
    tokens = np.array([1000, 2000, 3000, 2000])
    turns = Workload(
        np.arange(4.0),
        tokens + 16,
        np.full(4, 5),
        prefix_id=np.array([0, 1, 2, 3]),
        prefix_tokens=tokens,
        prefix_tree=PrefixTree(np.array([-1, 0, 1, 0]), 1000),
    )
    fresh = replace(turns, prefix_tree=None)
    nested, apart = (simulate(deployment(Role.MIXED), load).ttft_s for load in (turns, fresh))
    assert nested[0] == pytest.approx(apart[0])
    assert nested[1:] == pytest.approx(np.full(3, nested[0]), rel=0.1)
    assert (apart[1:] > 1.3 * nested[1:]).all()


def test_the_same_input_gives_the_same_outcome() -> None:
    target = deployment(Role.PREFILL, Role.DECODE, Role.MIXED)
    first, second = (simulate(target, workload(rate=50)) for _ in range(2))
    assert first.finished_s.tolist() == second.finished_s.tolist()


def test_stages_that_work_at_once_serve_more_prompts() -> None:
    shape, device = find_model("opt-66b"), find_device("a100-80gb")
    latency = Roofline(shape, device, find_link("nvlink3"), 2, 2)
    spans = []
    for pipelined in (False, True):
        model = instance(
            Role.MIXED,
            latency=latency,
            tensor_parallel=2,
            pipeline_parallel=2,
            pipelined=pipelined,
        )
        load = Workload(np.zeros(20), np.full(20, 1000), np.ones(20, dtype=int))
        spans.append(simulate(replace(deployment(Role.MIXED), instances=(model,)), load).duration_s)
    assert spans[1] < 0.65 * spans[0]


def test_hopeless_attainment_is_given_up_early() -> None:
    load = workload(count=300, rate=2000)
    outcome = simulate(replace(deployment(Role.MIXED), slo=Slo(0.02, 0.1)), load, 0.9)
    assert outcome.stopped
    assert outcome.attainment == 0.0
    assert not outcome.finished.all()


def test_figures_have_the_fields_of_the_contract() -> None:
    figures = simulate(deployment(Role.PREFILL, Role.DECODE), workload()).figures()
    assert {"requests", "finished", "failed", "duration_s", "rate_rps", "throughput_tokens_s",
            "attainment", "goodput_rps", "ttft_s", "tpot_s", "itl_s", "e2e_s",
            "ttft_parts_s"} == set(figures)  # fmt: skip
    parts = figures["ttft_parts_s"]
    assert set(parts) == {"queue", "prefill", "transfer", "decode_queue", "first_step"}
    assert all(value is not None and value >= 0 for value in parts.values())


def test_weighted_percentiles_count_each_value_as_often_as_it_stands_for() -> None:
    values, counts = np.array([3.0, 1.0, 2.0]), np.array([1.0, 97.0, 2.0])
    assert weighted_spread(values, counts) == {"mean": 1.04, "p50": 1.0, "p90": 1.0, "p99": 2.0}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    roles=st.sampled_from(
        [(Role.MIXED,), (Role.PREFILL, Role.DECODE), (Role.PREFILL, Role.DECODE, Role.MIXED)]
    ),
    kv_tokens=st.sampled_from([700, 1500, 20_000]),
    rate=st.sampled_from([1.0, 30.0, 1000.0]),
)
def test_every_request_ends_and_every_pool_is_empty_afterwards(
    seed: int, roles: tuple[Role, ...], kv_tokens: int, rate: float
) -> None:
    load = workload(count=40, rate=rate, seed=seed)
    simulation = Simulation(deployment(*roles, kv_tokens=kv_tokens), load)
    outcome = simulation.run()
    assert simulation.ledger.ended == len(load)
    assert outcome.finished.all()
    assert (outcome.ttft_s > 0).all()
    assert (outcome.e2e_s >= outcome.ttft_s).all()
    for one in simulation.instances.values():
        assert one.is_empty
        one.pool.check()


@pytest.mark.parametrize("kv_tokens", [900, 100_000])
def test_a_counted_pool_changes_nothing(kv_tokens: int) -> None:
    target = deployment(Role.PREFILL, Role.DECODE, kv_tokens=kv_tokens)
    target = replace(target, router=RouterSettings(local_prompt_tokens=0))
    load = workload(rate=80)
    alone = replace(
        load, prefix_id=np.full(len(load), -1), prefix_tokens=np.zeros(len(load), dtype=int)
    )
    counted, numbered = simulate(target, load), simulate(target, alone)
    np.testing.assert_array_equal(counted.finished_s, numbered.finished_s)


def test_what_is_learned_from_a_run_is_what_its_steps_would_have_taught() -> None:
    walked_through = SteadyBatcher(BlockPool(10, 16), RoleSettings())
    at_once = SteadyBatcher(BlockPool(10, 16), RoleSettings())
    for first_s, growth_s, steps in ((0.01, 1e-4, 7), (0.03, 0.0, 1), (0.02, 2e-3, 30)):
        for number in range(steps):
            walked_through.measured(ONLY_DECODES, first_s + number * growth_s)
        at_once.measured_run(first_s, growth_s, steps)
        assert at_once.decode_step_s == pytest.approx(walked_through.decode_step_s)


def test_prompts_come_back_after_a_run_in_as_small_a_batch_as_after_its_steps() -> None:
    beside = replace(ONLY_DECODES, prefills=(Chunk("early", (0,) * 400, 0, (), None),))
    taken = []
    for at_once in (False, True):
        batcher = SteadyBatcher(BlockPool(100, 16), RoleSettings(), tpot_s=1.0)
        batcher.measured(beside, 0.01)
        if at_once:
            batcher.measured_run(0.01, 0.0, 12)
        else:
            for _ in range(12):
                batcher.measured(ONLY_DECODES, 0.01)
        batcher.prefill.add(start_sequence(Request("late", (0,) * 1000, Sampling()), 0))
        (chunk,) = batcher.prompts_beside(1.0, 1).prefills
        taken.append(len(chunk.tokens))
    assert taken[0] == taken[1] < 1000


def test_looking_at_an_instance_in_the_midst_of_decodes_shows_how_far_they_are() -> None:
    left_alone = simulate(deployment(Role.MIXED), lone(100, 60))
    simulation = Simulation(deployment(Role.MIXED), lone(100, 60))
    (one,) = simulation.instances.values()
    first_s, end_s = left_alone.first_token_s[0], left_alone.finished_s[0]
    seen: list[tuple[int, int]] = []

    def look(_: None, now: float) -> None:
        load = one.whole_view(now).load
        seen.append((load.sequences[0].output_tokens, load.free_blocks))

    for share in (0.25, 0.5, 0.75):
        simulation.at(first_s + share * (end_s - first_s), look, None)
    outcome = simulation.run()
    assert outcome.finished_s[0] == pytest.approx(end_s)
    assert outcome.busy_s["mixed-0"] == pytest.approx(left_alone.busy_s["mixed-0"])
    assert [tokens for tokens, _ in seen] == [15, 30, 45]
    total = one.pool.total_blocks
    assert [total - free for _, free in seen] == [blocks_for(100 + n, 16) for n in (15, 30, 45)]
    assert one.is_empty
