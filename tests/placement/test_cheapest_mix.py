"""The cheapest mix, against what a person would choose."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import NoFeasiblePlan
from placement.planning.cheapest_mix import (
    Bucket,
    InstanceType,
    cheapest_mix,
    fullest_mix,
    size_buckets,
)
from placement.workload import Workload

SMALL, LARGE = Bucket(10.0, 100, 50), Bucket(4.0, 4000, 500)


def small(most: int = 9, large_rps: float = 0.0) -> InstanceType:
    return InstanceType("small", 1.0, most, (5.0, large_rps))


def large(most: int = 9) -> InstanceType:
    return InstanceType("large", 6.0, most, (12.0, 4.0))


def test_each_size_goes_where_it_is_cheap() -> None:
    mix = cheapest_mix([small(), large()], [SMALL, LARGE])
    assert mix.counts == {"small": 2, "large": 1}
    assert mix.price == 8.0
    assert mix.shares["large", 1] == pytest.approx(1.0)


def test_spare_time_of_the_large_saves_a_small() -> None:
    half = Bucket(2.0, 4000, 500)
    mix = cheapest_mix([small(), large()], [SMALL, half])
    assert mix.counts == {"small": 1, "large": 1}
    assert mix.shares["small", 0] + mix.shares["large", 0] == pytest.approx(1.0)


def test_sizes_that_nothing_serves_are_named() -> None:
    with pytest.raises(NoFeasiblePlan, match="no instance type meets") as refusal:
        cheapest_mix([small()], [SMALL, LARGE])
    assert "4000 prompt" in str(refusal.value.value)


def test_too_few_instances_say_how_much_they_carry() -> None:
    with pytest.raises(NoFeasiblePlan, match="carry about 5 requests/s of 10"):
        cheapest_mix([InstanceType("small", 1.0, 1, (5.0,))], [SMALL])


def test_buckets_split_the_rate_by_size() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(5, 1, (2, 900)).astype(int) + 1
    buckets = size_buckets(Workload(np.arange(900.0), lengths[0], lengths[1]), 30.0)
    assert sum(bucket.rate_rps for bucket in buckets) == pytest.approx(30.0)
    assert len(buckets) == 9


def test_kinds_that_share_devices_take_no_more_than_there_are() -> None:
    pair = InstanceType("pair", 2.0, 9, (7.0, 0.0), {"gpu": 2})
    one = InstanceType("one", 2.5, 9, (3.0, 0.0), {"gpu": 1})
    load = Bucket(10.0, 100, 50)
    assert cheapest_mix([pair, one], [load], {"gpu": 4}).counts == {"pair": 2, "one": 0}
    assert cheapest_mix([pair, one], [load], {"gpu": 3}).counts == {"pair": 1, "one": 1}
    with pytest.raises(NoFeasiblePlan):
        cheapest_mix([pair, one], [load], {"gpu": 2})


def test_the_fullest_mix_leaves_no_device_idle_that_could_serve() -> None:
    pair = InstanceType("pair", 2.0, 9, (7.0,), {"fast": 2, "power_w": 600})
    slow = InstanceType("slow", 1.0, 9, (1.0,), {"slow": 1, "power_w": 70})
    limits = {"fast": 5, "slow": 3}
    assert fullest_mix([pair, slow], limits).counts == {"pair": 2, "slow": 3}
    assert fullest_mix([pair, slow], {**limits, "power_w": 1300}).counts == {"pair": 2, "slow": 1}
