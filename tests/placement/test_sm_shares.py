"""When a role of a shared GPU gets more of its multiprocessors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.messages import Role
from placement.scaling.share_policy import SmShares
from placement.scaling.signals import Observation, Phase, Unit
from placement.scaling.sm_shares import ShareSteering

SETTINGS = SmShares(step=0.1, least=0.2, delay_s=20.0, interval_s=100.0)
LOOK_S = 10.0
UNITS = tuple(Unit(f"{role.value}-0", role, 1, Phase.READY) for role in (Role.PREFILL, Role.DECODE))
EVEN = {Role.PREFILL: 0.5, Role.DECODE: 0.5}


def steering(settings: SmShares = SETTINGS) -> ShareSteering:
    return ShareSteering(settings, look_back_s=LOOK_S, hysteresis=0.1)


def seen(now_s: float, ttft: float | None, tpot: float | None, units=UNITS) -> Observation:
    shares = [() if one is None else (one,) * 5 for one in (ttft, tpot)]
    return Observation(now_s, units, ttft_shares=shares[0], tpot_shares=shares[1])


def looked_at(one: ShareSteering, looks: range, ttft, tpot, shares=EVEN):
    """Every shift, with its time."""
    found = [(now, one.decide(seen(now, ttft, tpot), shares)) for now in looks]
    return [(now, shift) for now, shift in found if shift is not None]


def test_a_role_that_misses_its_target_long_enough_is_given_a_step():
    ((at, shift),) = looked_at(steering(), range(0, 60, 5), 1.5, 0.5)
    assert at == 20
    assert shift.shares == ((Role.DECODE, 0.4), (Role.PREFILL, 0.6))
    assert str(shift) == "decode 0.4, prefill 0.6"
    assert "ttft_attainment 1.5" in shift.why
    ((_, back),) = looked_at(steering(), range(0, 60, 5), 0.5, 1.5)
    assert back.shares == ((Role.PREFILL, 0.4), (Role.DECODE, 0.6))


@pytest.mark.parametrize(
    ("ttft", "tpot"), [(1.05, 0.5), (1.5, 1.5), (1.5, 0.75), (0.5, 0.5), (None, None)]
)
def test_nothing_moves_within_the_band_or_where_the_other_has_no_room(ttft, tpot):
    """0.75 of the target with 0.5 of the device would be 0.94 of it with 0.4."""
    assert looked_at(steering(), range(0, 600, 5), ttft, tpot) == []


def test_nobody_is_left_with_less_than_the_least():
    shares = {Role.PREFILL: 0.75, Role.DECODE: 0.25}
    assert looked_at(steering(), range(0, 200, 5), 3.0, 0.1, shares) == []


def test_moves_keep_their_distance():
    found = looked_at(steering(), range(0, 300, 5), 1.5, 0.2)
    assert [at for at, _ in found] == [20, 120, 220]


def test_a_short_burst_moves_nothing():
    one = steering()
    for begin in range(0, 400, 40):
        assert looked_at(one, range(begin, begin + 10, 5), 2.0, 0.5) == []
        assert looked_at(one, range(begin + 10, begin + 40, 5), 0.5, 0.5) == []


def test_what_starts_or_drains_tells_nothing():
    one = steering()
    starting = (UNITS[0], replace(UNITS[1], phase=Phase.STARTING))
    for now in range(0, 100, 5):
        assert one.decide(seen(now, 2.0, 0.5, starting), EVEN) is None


@pytest.mark.parametrize(("work", "rests_at"), [((0.6, 0.1), 0.6), ((0.1, 0.6), 0.4)])
def test_latencies_that_follow_shares_come_to_rest(work, rests_at):
    """Each role's latency is its work over its share: it settles, and never turns back."""
    one, shares, went = steering(), dict(EVEN), []
    for now in range(0, 3000, 5):
        latencies = [load / shares[role] for load, role in zip(work, EVEN, strict=True)]
        shift = one.decide(seen(now, *latencies), shares)
        if shift is not None:
            shares = dict(shift.shares)
            went.append(shift.target)
    assert shares[Role.PREFILL] == pytest.approx(rests_at)
    assert len(set(went)) == 1
