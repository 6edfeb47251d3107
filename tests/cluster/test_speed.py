"""How fast a machine is, by a process that looks at it now and then."""

import pytest

from cluster.profiling.speed import (
    PACES,
    PERIOD_S,
    Reading,
    Speed,
    SpeedProbe,
    lengthened,
    speed_of,
)
from engine.errors import InstanceLost


def readings(*paces):
    """Of a machine that keeps each pace for a second."""
    moments = [number * PERIOD_S for number in range(round(len(paces) / PERIOD_S))]
    times = [(at_s, paces[int(at_s)]) for at_s in moments]
    return [Reading(at_s, 0.002 * pace, 0.001 * pace) for at_s, pace in times]


def test_a_steady_machine_keeps_one_pace():
    speed = speed_of(readings(1.0, 1.0))
    assert speed.product_s == pytest.approx(0.002)
    assert speed.python_s == pytest.approx(0.001)
    assert speed.paces == pytest.approx([1.0] * PACES)


def test_an_unsteady_machine_has_paces_around_its_mean():
    speed = speed_of(readings(0.5, 1.5, 0.5, 1.5))
    assert speed.product_s == pytest.approx(0.002)
    assert speed.paces[0] == pytest.approx(0.5, abs=0.02)
    assert speed.paces[-1] == pytest.approx(1.5, abs=0.02)
    assert sum(speed.paces) == pytest.approx(PACES)


def test_kinds_of_code_are_compared_apart():
    now, then = Speed(0.003, 0.001, ()), Speed(0.002, 0.004, ())
    assert now.slower_than(then) == {"product": 1.5, "python": 0.25}
    assert Speed(**now.described()) == now._replace(paces=[])


def test_a_process_takes_readings_until_the_end():
    with SpeedProbe() as probe:
        several = [*probe.readings(), *probe.readings()]
    assert len(several) >= 2
    assert min(speed_of(several).paces) > 0.0
    with pytest.raises((InstanceLost, OSError)):
        probe.readings()


def test_what_takes_how_much_longer_is_told_by_its_name():
    profile = {"runs": [{"seconds": 1.0, "tokens": 3}], "way_s": 1.0, "cold": True}
    slower = lengthened(profile, {"product": 2.0, "python": 3.0})
    assert slower == {"runs": [{"seconds": 2.0, "tokens": 3}], "way_s": 3.0, "cold": True}
