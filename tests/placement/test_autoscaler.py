from dataclasses import replace

import pytest

from engine.messages import Role
from placement.scaling.allotment import Start, Stop, Switch, Wish, allot, steps
from placement.scaling.autoscaler import Autoscaler
from placement.scaling.forecast import forecast
from placement.scaling.policy import Forecast, Policy
from placement.scaling.signals import Observation, Phase, Unit
from tests.placement.fleet import busy, random_history, settle

PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED
ONE = dict.fromkeys(Role, 1)


def unit(name: str, use: float = 0.5, phase: Phase = Phase.READY) -> Unit:
    plain = Unit(name, Role(name.partition("-")[0]), 1, phase)
    return busy(plain, use) if phase is Phase.READY else plain


def pool(role: Role, count: int, use: float = 0.5) -> tuple[Unit, ...]:
    return tuple(unit(f"{role.value}-{n}", use) for n in range(count))


def policy(prefill=(1, 8), decode=(1, 8), budget: int = 16, **options) -> Policy:
    values = {
        "budget_accelerators": budget,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "cooldown_s": 0.0,
        "look_back_period_s": 2.0,
        "roles": {
            "prefill": {
                "min_replicas": prefill[0],
                "max_replicas": prefill[1],
                "signals": [{"signal": "queued_prompt_tokens", "target": 1000.0}],
            },
            "decode": {
                "min_replicas": decode[0],
                "max_replicas": decode[1],
                "signals": [{"signal": "batch", "target": 16.0}],
            },
        },
        **options,
    }
    return Policy.model_validate(values, strict=False)


def decide(scaler: Autoscaler, *units: Unit, now: float = 0.0, **seen):
    return scaler.decide(Observation(now, units, **seen)).actions


def test_at_its_target_nothing_changes():
    assert decide(Autoscaler(policy(), ONE), *pool(PREFILL, 2), *pool(DECODE, 2)) == ()


def test_twice_the_target_doubles_a_role():
    scaler = Autoscaler(policy(), ONE)
    actions = decide(scaler, *pool(PREFILL, 2, use=1.0), *pool(DECODE, 2))
    assert actions == (Start(PREFILL), Start(PREFILL))


def test_instances_that_start_are_not_asked_for_twice():
    scaler = Autoscaler(policy(), ONE)
    starting = [unit("prefill-2", phase=Phase.STARTING), unit("prefill-3", phase=Phase.STARTING)]
    assert decide(scaler, *pool(PREFILL, 2, 1.0), *starting, *pool(DECODE, 2)) == ()


def test_half_the_target_takes_one_away_at_a_time():
    scaler = Autoscaler(policy(), ONE)
    busiest, idlest = unit("prefill-0", 0.3), unit("prefill-1", 0.1)
    actions = decide(scaler, busiest, idlest, *pool(DECODE, 2))
    assert actions == (Stop("prefill-1", PREFILL),)


def test_growth_waits_for_its_delay_and_forgets_a_short_peak():
    scaler = Autoscaler(policy(upscale_delay_s=6.0, downscale_delay_s=6.0), ONE)
    calm, rush = pool(PREFILL, 2), pool(PREFILL, 2, 1.0)
    decode = pool(DECODE, 2)
    assert decide(scaler, *rush, *decode, now=0.0) == ()
    assert decide(scaler, *rush, *decode, now=3.0) == ()
    assert decide(scaler, *calm, *decode, now=5.5) == ()
    for now in (10.0, 12.0, 14.0):
        assert decide(scaler, *rush, *decode, now=now) == ()
    assert decide(scaler, *rush, *decode, now=17.0) == (Start(PREFILL), Start(PREFILL))


def test_a_role_does_not_turn_within_its_cool_down():
    scaler = Autoscaler(policy(cooldown_s=60.0, role_switch=False), ONE)
    decode = pool(DECODE, 2)
    assert decide(scaler, *pool(PREFILL, 2, 1.0), *decode, now=0.0)
    assert decide(scaler, *pool(PREFILL, 4, 0.1), *decode, now=10.0) == ()
    assert decide(scaler, *pool(PREFILL, 4, 0.1), *decode, now=59.0) == ()
    assert decide(scaler, *pool(PREFILL, 4, 0.1), *decode, now=61.0)


def test_a_role_with_too_many_gives_to_one_with_too_few():
    scaler = Autoscaler(policy(budget=6), ONE)
    actions = decide(scaler, *pool(PREFILL, 2, 1.0), *pool(DECODE, 4, 0.2))
    assert actions == (Switch("decode-0", DECODE, PREFILL),)


def test_switching_does_not_wait_for_the_delay_of_stopping():
    scaler = Autoscaler(policy(budget=6, downscale_delay_s=600.0), ONE)
    units = (*pool(PREFILL, 2, 1.0), *pool(DECODE, 4, 0.2))
    assert decide(scaler, *units) == (Switch("decode-0", DECODE, PREFILL),)


def test_without_role_switches_release_comes_before_acquiring():
    scaler = Autoscaler(policy(budget=6, role_switch=False), ONE)
    units = (*pool(PREFILL, 2, 1.0), *pool(DECODE, 4, 0.2))
    assert decide(scaler, *units, now=0.0) == (Stop("decode-0", DECODE),)
    draining = replace(unit("decode-0", 0.2), phase=Phase.DRAINING)
    left = (*pool(PREFILL, 2, 1.0), draining, *pool(DECODE, 4, 0.5)[1:])
    assert decide(scaler, *left, now=2.0) == ()
    assert Start(PREFILL) in decide(scaler, *pool(PREFILL, 2, 1.0), *left[3:], now=4.0)


def test_the_forecast_is_a_floor():
    given = policy(forecast={"horizon_s": 10.0, "headroom": 0.0})
    roles = given.roles.model_dump()
    roles["prefill"]["capacity_tokens_s"] = 100.0
    scaler = Autoscaler(Policy.model_validate({**given.model_dump(), "roles": roles}), ONE)
    units = (*pool(PREFILL, 2), *pool(DECODE, 2))
    assert decide(scaler, *units, now=0.0) == ()
    actions = decide(scaler, *units, now=10.0, prompt_tokens=4000)
    assert actions == (Start(PREFILL), Start(PREFILL))


def test_an_idle_role_goes_to_zero_after_its_own_delay_and_comes_back_for_a_request():
    given = policy(
        prefill=(0, 4), decode=(0, 4), downscale_delay_s=10.0, downscale_to_zero_delay_s=20.0
    )
    scaler = Autoscaler(given, ONE)
    units = (unit("prefill-0", 0.0), unit("decode-0", 0.0))
    for now in (0.0, 10.0, 18.0):
        assert decide(scaler, *units, now=now) == ()
    assert decide(scaler, *units, now=21.0) == (
        Stop("prefill-0", PREFILL),
        Stop("decode-0", DECODE),
    )
    assert decide(scaler, now=60.0) == ()
    woken = Autoscaler(given, ONE)
    assert decide(woken, now=60.0, waiting_requests=1) == (Start(PREFILL), Start(DECODE))


def test_a_role_whose_starts_fail_is_left_alone_for_a_while():
    scaler = Autoscaler(policy(placement_retries=1, placement_retry_s=30.0), ONE)
    units = (*pool(PREFILL, 2, 1.0), *pool(DECODE, 2))
    assert decide(scaler, *units, now=0.0)
    assert not scaler.failed(PREFILL, 1.0)
    assert decide(scaler, *units, now=2.0)
    assert scaler.failed(PREFILL, 3.0)
    assert decide(scaler, *units, now=32.0) == ()
    assert decide(scaler, *units, now=33.0)


def test_a_dry_run_decides_and_remembers_nothing():
    scaler = Autoscaler(policy(dry_run=True, cooldown_s=100.0, role_switch=False), ONE)
    assert decide(scaler, *pool(PREFILL, 2, 1.0), *pool(DECODE, 2), now=0.0)
    assert decide(scaler, *pool(PREFILL, 2, 0.1), *pool(DECODE, 2), now=10.0)


def test_the_percentile_of_an_attainment_decides():
    given = policy()
    roles = given.roles.model_dump()
    roles["decode"]["signals"] = [{"signal": "tpot_attainment", "target": 1.0, "percentile": 90.0}]
    values = {**given.model_dump(mode="json"), "roles": roles}
    units = (*pool(PREFILL, 2), *pool(DECODE, 2))
    for slow, grows in ((0, False), (1, False), (2, True)):
        scaler = Autoscaler(Policy.model_validate(values, strict=False), ONE)
        shares = (2.0,) * slow + (1.0,) * (10 - slow)
        assert (Start(DECODE) in decide(scaler, *units, tpot_shares=shares)) is grows


def latency_policy(**options) -> Policy:
    given = policy(look_back_period_s=10.0, **options)
    roles = given.model_dump(mode="json")["roles"]
    roles["decode"]["signals"] = [{"signal": "tpot_attainment", "target": 1.0}]
    return Policy.model_validate({**given.model_dump(mode="json"), "roles": roles}, strict=False)


def test_a_latency_far_beyond_its_target_asks_for_half_as_many_again():
    scaler = Autoscaler(latency_policy(), ONE)
    units = (*pool(PREFILL, 2), *pool(DECODE, 4))
    assert decide(scaler, *units, tpot_shares=(20.0,)) == (Start(DECODE), Start(DECODE))


def test_a_signal_is_heard_again_a_look_back_after_what_it_asked_for_serves():
    scaler = Autoscaler(latency_policy(), ONE)
    prefill, slow = pool(PREFILL, 2), {"tpot_shares": (1.5,)}
    assert decide(scaler, *prefill, *pool(DECODE, 2), now=0.0, **slow) == (Start(DECODE),)
    grown = (*prefill, *pool(DECODE, 3))
    assert decide(scaler, *grown, now=2.0, **slow) == ()
    assert decide(scaler, *grown, now=11.0, **slow) == ()
    assert decide(scaler, *grown, now=12.0, **slow) == (Start(DECODE), Start(DECODE))


def test_what_a_stop_does_is_seen_for_a_whole_look_back_before_the_next():
    scaler = Autoscaler(policy(downscale_delay_s=20.0, look_back_period_s=20.0), ONE)
    prefill = pool(PREFILL, 2)
    for now in (0.0, 10.0):
        assert decide(scaler, *prefill, *pool(DECODE, 6, 0.1), now=now) == ()
    assert decide(scaler, *prefill, *pool(DECODE, 6, 0.1), now=20.0)
    for now in (22.0, 30.0, 39.0):
        assert decide(scaler, *prefill, *pool(DECODE, 5, 0.1), now=now) == ()
    assert decide(scaler, *prefill, *pool(DECODE, 5, 0.1), now=40.0)


@pytest.mark.parametrize("budget", range(8))
def test_an_allotment_keeps_the_budget_and_the_minimums_if_they_fit(budget):
    wishes = [Wish(PREFILL, 2, 3, 4, 1), Wish(DECODE, 1, 1, 5, 2)]
    counts = allot(wishes, budget)
    assert counts[PREFILL] * 2 + counts[DECODE] <= budget
    if budget >= 4:
        assert counts[PREFILL] >= 1
        assert counts[DECODE] >= 2


def test_a_blocked_role_keeps_no_one_from_growing():
    wishes = [Wish(PREFILL, 1, 2, 6, 1, blocked=True), Wish(DECODE, 1, 2, 4, 1)]
    actions = steps(wishes, (*pool(PREFILL, 2), *pool(DECODE, 2)), 6, switch=False)
    assert actions == (Start(DECODE), Start(DECODE))


RISING = [10.0 * n for n in range(1, 41)]
DAYS = [100.0 + 50.0 * (n % 12 >= 6) for n in range(36)]


@pytest.mark.parametrize(
    ("samples", "options", "low", "high"),
    [
        (RISING, {"predictor": "constant"}, 400.0, 400.0),
        (RISING, {"predictor": "linear"}, 449.0, 451.0),
        (RISING, {"predictor": "kalman"}, 430.0, 470.0),
        (DAYS[:-8], {"predictor": "holt_winters", "season_s": 120.0}, 140.0, 155.0),
        ([], {"predictor": "linear"}, 0.0, 0.0),
        ([5.0], {"predictor": "linear"}, 5.0, 5.0),
        ([90.0, 50.0, 10.0], {"predictor": "linear"}, 0.0, 0.0),
    ],
)
def test_predictors_look_one_horizon_ahead(samples, options, low, high):
    given = {"horizon_s": 50.0, "sample_s": 10.0, "headroom": 0.0, **options}
    assert low <= forecast(samples, Forecast.model_validate(given, strict=False)) <= high


def test_headroom_is_added_to_the_forecast():
    given = Forecast(headroom=0.5)
    assert forecast([10.0], given) == 15.0


@pytest.mark.parametrize("block", range(10))
def test_random_histories_keep_the_budget_turn_seldom_and_never_deadlock(block):
    for seed in range(block * 8, block * 8 + 8):
        fleet, _ = random_history(seed)
        settle(fleet)


def test_a_history_is_the_same_from_the_same_seed():
    one, two = random_history(7)[0], random_history(7)[0]
    assert one.figures == two.figures


LATENCY = {
    "prefill": {"max_replicas": 8},
    "decode": {"max_replicas": 8, "signals": [{"signal": "tpot_attainment", "target": 0.9}]},
}
LOAD = {"signal": "kv_use", "target": 0.9}


def _with_fixed_pace(signals) -> Autoscaler:
    roles = LATENCY | {"decode": {"max_replicas": 8, "signals": signals}}
    return Autoscaler(policy(roles=roles), ONE)


def test_a_pace_that_no_instance_more_could_better_keeps_nobody_where_the_load_is_told():
    units = (*pool(PREFILL, 1), *pool(DECODE, 4, use=0.2))
    pace = LATENCY["decode"]["signals"]
    kept = decide(_with_fixed_pace(pace), *units, tpot_shares=(0.82,))
    let_go = decide(_with_fixed_pace([*pace, LOAD]), *units, tpot_shares=(0.82,))
    assert kept == ()
    assert let_go == (Stop("decode-0", DECODE),)


def test_a_pace_beyond_its_target_asks_for_more_whatever_the_load_says():
    units = (*pool(PREFILL, 1), *pool(DECODE, 4, use=0.2))
    scaler = _with_fixed_pace([*LATENCY["decode"]["signals"], LOAD])
    assert decide(scaler, *units, tpot_shares=(1.2,)) == (Start(DECODE), Start(DECODE))


def test_ongoing_requests_are_those_queued_and_running():
    roles = LATENCY | {"decode": {"max_replicas": 8, "target_ongoing_requests": 18.0}}
    # Half in use is two queued and sixteen running.
    for use, actions in ((0.5, ()), (1.0, (Start(DECODE), Start(DECODE)))):
        scaler = Autoscaler(policy(roles=roles), ONE)
        assert decide(scaler, *pool(PREFILL, 1), *pool(DECODE, 2, use)) == actions


def test_a_limit_that_decides_is_the_reason_given():
    idle = policy(prefill=(3, 8), decode=(1, 2))
    seen = Observation(0.0, (*pool(PREFILL, 2, 0.0), *pool(DECODE, 2, use=2.0)))
    wants = {want.role: want for want in Autoscaler(idle, ONE).decide(seen).wants}
    assert (wants[PREFILL].wanted, wants[PREFILL].why) == (3, "at least 3")
    assert wants[DECODE].why == "at most 2, for batch 64 of 16"


def test_steps_are_told_in_words():
    told = [str(one) for one in (Start(PREFILL), Stop("a", DECODE), Switch("b", PREFILL, MIXED))]
    assert told == ["start one more prefill", "stop a", "switch b from prefill to mixed"]
