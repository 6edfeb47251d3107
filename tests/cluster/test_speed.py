"""How fast a machine is, by a process that looks at it now and then."""

import json

import pytest

from cluster.profiling.one_rank import RankSettings
from cluster.profiling.speed import (
    CODE,
    ENOUGH,
    PACES,
    PERIOD_S,
    Company,
    Reading,
    Speed,
    SpeedProbe,
    lengthened,
    speed_of,
)
from engine.errors import InstanceLost

DECODES_S, PROMPTS_S, SMALL_S = 0.002, 0.003, 0.001


def reading(at_s, pace, company=0):
    return Reading(at_s, company, (DECODES_S * pace, PROMPTS_S * pace, SMALL_S * pace))


def readings(*paces):
    """Of a machine that keeps each pace for a second."""
    moments = [number * PERIOD_S for number in range(round(len(paces) / PERIOD_S))]
    return [reading(at_s, paces[int(at_s)]) for at_s in moments]


def speed(*company):
    return Speed(company, ())


def test_a_steady_machine_keeps_one_pace():
    seen = speed_of(readings(1.0, 1.0))
    (alone,) = seen.readings
    assert alone.company == 0
    assert alone.means_s == pytest.approx((DECODES_S, PROMPTS_S, SMALL_S))
    assert seen.paces == pytest.approx([1.0] * PACES)


def test_an_unsteady_machine_has_paces_around_its_mean():
    seen = speed_of(readings(0.5, 1.5, 0.5, 1.5))
    assert seen.readings[0].means_s[0] == pytest.approx(DECODES_S)
    assert seen.paces[0] == pytest.approx(0.5, abs=0.02)
    assert seen.paces[-1] == pytest.approx(1.5, abs=0.02)
    assert sum(seen.paces) == pytest.approx(PACES)


def test_what_runs_beside_readings_is_no_pace_of_the_machine():
    moments = [number * PERIOD_S for number in range(20)]
    seen = speed_of([reading(at_s, 1.0 + (at_s > 2.0), 2 * (at_s > 2.0)) for at_s in moments])
    assert [one.company for one in seen.readings] == [0, 2]
    assert seen.paces == pytest.approx([1.0] * PACES)


def test_kinds_of_code_are_compared_apart():
    now = speed(Company(0, 10, (0.003, 0.002, 0.001)))
    then = speed(Company(0, 10, (0.002, 0.002, 0.004)))
    assert now.slower_than(then) == dict(zip(CODE, (1.5, 1.0, 0.25), strict=True))
    assert Speed.of(now.described()) == now
    assert json.loads(json.dumps(now.described())) == now.described()


def test_readings_are_compared_in_like_company():
    """A server that is busier has more of them with company, which takes twice as long."""
    idle = speed(Company(0, 90, (1.0, 1.0, 1.0)), Company(2, 10, (2.0, 2.0, 2.0)))
    busy = speed(Company(0, 10, (1.1, 1.1, 1.1)), Company(2, 90, (2.2, 2.2, 2.2)))
    assert busy.slower_than(idle) == pytest.approx(dict.fromkeys(CODE, 1.1))


def test_where_there_are_enough_in_little_company_others_do_not_count():
    """What a server runs beside a reading is not the same at every rate."""
    idle = speed(Company(0, ENOUGH, (1.0,) * 3), Company(4, 900, (2.0,) * 3))
    busy = speed(Company(0, ENOUGH, (1.1,) * 3), Company(4, 900, (3.0,) * 3))
    assert busy.slower_than(idle) == pytest.approx(dict.fromkeys(CODE, 1.1))


def test_readings_in_unlike_company_are_compared_where_there_are_no_others():
    alone, beside = speed(Company(0, 3, (1.0,) * 3)), speed(Company(2, 3, (2.0,) * 3))
    assert beside.slower_than(alone) == pytest.approx(dict.fromkeys(CODE, 2.0))


def test_a_process_takes_readings_until_the_end():
    with SpeedProbe(RankSettings("demo")) as probe:
        several = [*probe.readings(), *probe.readings()]
    assert len(several) >= 2
    assert min(speed_of(several).paces) > 0.0
    with pytest.raises((InstanceLost, OSError)):
        probe.readings()


def test_what_takes_how_much_longer_is_told_by_its_name():
    decodes, prompts = {"batch": 3, "seconds": 1.0}, {"prompts": 2, "seconds": 1.0}
    profile = {"runs": [decodes, prompts], "way_s": 1.0, "cold": True}
    slower = lengthened(profile, {"decodes": 2.0, "prompts": 4.0, "small": 3.0})
    assert slower == {
        "runs": [{"batch": 3, "seconds": 2.0}, {"prompts": 2, "seconds": 4.0}],
        "way_s": 3.0,
        "cold": True,
    }
