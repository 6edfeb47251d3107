"""What a measured server tells of itself beyond its passes, and what a profile makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.errors import BadConfig
from placement.latency.model import LatencyModel
from placement.latency.profile_file import profile_from
from placement.latency.serving_costs import (
    DoorCosts,
    Machine,
    Served,
    WithServing,
    at_speed_of,
    fit_doors,
    fit_serving,
    handing_of,
)

ARRIVAL_S, STEP_S, TOKEN_S = 0.004, 0.0006, 0.0001
DOORS = DoorCosts(0.0005, 0.0002, 0.003)


class Passes(LatencyModel):
    pair_s = 0.0
    read_s = 1e-6

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.002 + 1e-4 * tokens


def served(users: int, instances: int = 1, latency: LatencyModel | None = None) -> Served:
    passes = latency or Passes()
    context = 64 + 64 // 2
    tpot_s = passes.decode_s([context] * users) + STEP_S + TOKEN_S * users
    ttft_s = passes.prefill_s([(64, 0)] * users) + STEP_S + ARRIVAL_S
    requests = 3 * users * instances
    doors_s = DOORS.step_s * requests * 64 / users + requests * DOORS.of_step(64, 1)
    doors_s -= DOORS.step_s * requests
    return Served(instances, users, 64, 64, ttft_s, tpot_s, requests, doors_s)


def test_what_passes_leave_unexplained_is_found() -> None:
    costs = fit_serving([served(users) for users in (1, 2, 4, 8)], Passes())
    assert costs.step_s == pytest.approx(STEP_S)
    assert costs.token_s == pytest.approx(TOKEN_S)


def test_a_server_quicker_than_its_passes_costs_nothing() -> None:
    quick = [one._replace(tpot_s=0.001, ttft_s=0.001) for one in map(served, (1, 4))]
    costs = fit_serving(quick, Passes())
    assert (costs.step_s, costs.token_s) == (0.0, 0.0)


def test_what_gateway_and_clients_take_is_told_apart_by_steps_tokens_and_requests() -> None:
    loops = [served(users) for users in (1, 4, 16)]
    short = served(8)._replace(output_tokens=4)
    tokens, steps = short.requests * 4, short.requests * 4 / short.users
    seconds = (steps, tokens, short.requests)
    costs = (DOORS.step_s, DOORS.token_s, DOORS.request_s)
    short = short._replace(doors_s=sum(a * b for a, b in zip(seconds, costs, strict=True)))
    found = fit_doors([*loops, short])
    assert found is not None
    assert found.step_s == pytest.approx(DOORS.step_s)
    assert found.token_s == pytest.approx(DOORS.token_s)
    assert found.request_s == pytest.approx(DOORS.request_s)


def test_what_a_handoff_takes_of_processors_is_told_by_the_same_loop_without_one() -> None:
    kept, others = served(1), [served(4), served(16)]
    handed = kept._replace(handed_off=True, loops_s=0.002 * kept.requests)
    handed = handed._replace(doors_s=handed.doors_s + 0.003 * kept.requests)
    found = fit_doors([kept, *others, handed])
    assert found is not None
    assert found.handoff_s == pytest.approx(0.005)
    assert found == replace(fit_doors([kept, *others]) or DOORS, handoff_s=found.handoff_s)
    assert found.of_step(3, 2, 1) == pytest.approx(found.of_step(3, 2) + 0.005)


def test_a_handoff_that_costs_less_than_keeping_it_costs_nothing() -> None:
    kept = served(1)
    handed = kept._replace(handed_off=True, doors_s=kept.doors_s / 2, ttft_s=kept.ttft_s / 2)
    found = fit_doors([kept, served(4), served(16), handed])
    assert found is not None
    assert found.handoff_s == handing_of([kept, handed]) == 0.0


def test_a_prompt_to_be_handed_off_takes_as_much_longer_as_its_first_token() -> None:
    kept = served(1)
    handed = kept._replace(handed_off=True, ttft_s=kept.ttft_s + 0.002)
    assert handing_of([kept, served(4), handed]) == pytest.approx(0.002)
    assert handing_of([served(4), handed]) == 0.0


def test_prompts_by_themselves_take_longer_than_one_of_many_alike() -> None:
    flowing = [served(users) for users in (1, 4, 16)]
    alone = [
        served(1)._replace(
            prompt_tokens=tokens,
            output_tokens=4,
            prefill_s=Passes().prefill_s([(tokens, 0)]) + STEP_S + TOKEN_S + 0.003 + 2e-5 * tokens,
        )
        for tokens in (16, 64, 256)
    ]
    costs = fit_serving([*flowing, *alone], Passes())
    assert costs.prompts_s == pytest.approx(0.003, rel=0.05)
    assert costs.prompt_token_s == pytest.approx(2e-5, rel=0.05)
    whole, bare = WithServing(Passes(), costs), Passes()
    assert whole.decode_s([100]) - bare.decode_s([100]) == pytest.approx(STEP_S + TOKEN_S)
    for one in alone:
        prompt = [(one.prompt_tokens, 0)]
        assert whole.prefill_s(prompt) == pytest.approx(one.prefill_s, rel=0.01)


def test_a_server_whose_passes_took_longer_is_told_at_the_speed_of_the_profile() -> None:
    flowing = [told(served(users)) for users in (1, 4, 16)]
    short = told(served(1)._replace(output_tokens=4))
    found = at_speed_of(Passes(), [one.lengthened(2.0) for one in (*flowing, short)])
    for one, then in zip(found, [*flowing, short], strict=True):
        assert one == pytest.approx(then)
    assert at_speed_of(Passes(), [served(1)]) == [served(1)]


def told(one: Served) -> Served:
    """With what its passes took."""
    rounds = one.requests / one.users
    prompts_s = Passes().prefill_s([(one.prompt_tokens, 0)] * one.users)
    decodes_s = (one.output_tokens - 1) * Passes().decode_s(one.contexts)
    return one._replace(passes_s=rounds * (prompts_s + decodes_s))


def test_gateway_and_clients_cost_nothing_where_they_were_not_measured() -> None:
    assert fit_doors([served(1)._replace(doors_s=0.0)]) is None


def test_a_machine_slows_down_once_more_is_asked_of_it_than_it_has() -> None:
    machine = Machine(2, 1, DoorCosts(0.0, 0.001, 0.0))
    one = machine.demand(0.01, 5, 0)
    assert one == pytest.approx(1.5)
    assert machine.slowed(one) == 1.0
    assert machine.slowed(2 * one) == pytest.approx(1.5)


def test_serving_lengthens_a_step_by_its_tokens() -> None:
    costs = fit_serving([served(users) for users in (1, 8)], Passes())
    whole, passes = WithServing(Passes(), costs), Passes()
    added_s = whole.decode_s([100] * 5) - passes.decode_s([100] * 5)
    assert added_s == pytest.approx(STEP_S + 5 * TOKEN_S)
    assert whole.decode_run_s(5, 500, 20) - passes.decode_run_s(5, 500, 20) == pytest.approx(
        20 * added_s
    )


def samples(times: float) -> dict[str, Any]:
    prompts = [
        {"tokens": n, "squares": n * n, "seconds": times * (0.002 + 1e-4 * n)}
        for n in (16, 64, 256, 1024)
    ]
    decodes = [
        {"batch": b, "context": c * b, "seconds": times * (0.002 + 1e-4 * b + 1e-6 * c * b)}
        for b in (1, 2, 8, 32)
        for c in (64, 1024)
    ]
    return {"prefill": prompts, "decode": decodes}


def document() -> dict[str, Any]:
    beside = {"neighbours": 1, **samples(2.0)}
    serving = [served(users)._asdict() for users in (1, 2, 4, 8)]
    return {
        "model": "demo",
        "device": "cpu-core",
        "runs": [{**samples(1.0), "beside": beside}],
        "serving": serving,
    }


def test_a_profile_knows_passes_beside_a_neighbour() -> None:
    profile = profile_from({**document(), "serving": []})
    (run,) = profile.runs
    crowded = profile.crowded(1, 1)
    assert run.neighbours == 1
    assert crowded is not None
    assert crowded.decode_s([300] * 4) == pytest.approx(2 * 0.0036, rel=0.02)
    assert profile.crowded(2, 1) is None
    assert profile.arrival_s == 0.0


def test_what_one_instance_costs_to_serve_counts_beside_neighbours_too() -> None:
    profile = profile_from(document())
    crowded = profile.crowded(1, 1)
    assert profile.arrival_s == pytest.approx(ARRIVAL_S, rel=0.2)
    assert isinstance(crowded, WithServing)
    assert crowded.costs.token_s == pytest.approx(TOKEN_S, rel=0.2)


def test_a_profile_knows_what_is_shared_of_a_machine_of_so_many_processors() -> None:
    assert profile_from(document()).machine(1, 1) is None
    machine = profile_from({**document(), "processors": 4, "threads": 2}).machine(2, 1)
    assert machine is not None
    assert (machine.processors, machine.threads) == (4, 4)
    assert machine.doors.token_s > 0.0


def test_a_handoff_costs_what_its_second_token_waits_longer() -> None:
    handed = served(1)._replace(handed_off=True, tpot_s=served(1).tpot_s + 0.01 / 63)
    both = document()
    both["serving"].append(handed._asdict())
    assert profile_from(document()).handoff_s == 0.0
    assert profile_from(both).handoff_s == pytest.approx(0.01, rel=0.2)


def test_the_way_of_a_request_is_what_its_prefill_leaves_of_its_first_tokens_time() -> None:
    both = document()
    for entry in both["serving"]:
        entry["prefill_s"] = entry["ttft_s"] - 0.007
    assert profile_from(both).arrival_s == pytest.approx(0.007)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"serving": [{"instances": 1}]}, "profile.serving[0].ttft_s"),
        ({"serving": [served(1)._replace(ttft_s=-1)._asdict()]}, "profile.serving[0].ttft_s"),
        ({"serving": [served(1)._replace(ttft_s=0)._asdict()]}, "profile.serving[0]"),
        ({"serving": 3}, "profile.serving"),
        ({"runs": [{**samples(1.0), "beside": {"prefill": []}}]}, "profile.runs[0].beside"),
    ],
)
def test_what_was_measured_badly_is_refused(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(BadConfig) as refusal:
        profile_from({**document(), **changed})
    assert refusal.value.field == field
