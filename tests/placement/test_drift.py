"""Drift: noticed where a workload changes, and not where it only fluctuates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.scaling.drift import (
    DriftSettings,
    Profiled,
    Profiler,
    Shape,
    compare,
    compare_rates,
    drift,
    kolmogorov_tail,
)

SETTINGS = DriftSettings()


def requests(seed: int, count: int = 400, prompt: float = 5.5, output: float = 4.0) -> list[Shape]:
    generator = np.random.default_rng(seed)
    lengths = [generator.lognormal(mean, 0.7, count).astype(int) + 1 for mean in (prompt, output)]
    return [Shape(int(p), int(o)) for p, o in zip(*lengths, strict=True)]


def profiled(seed: int, lasted_s: float = 100.0, **shape: float) -> Profiled:
    return Profiled(tuple(requests(seed, **shape)), lasted_s)


def quantities(before: Profiled, after: Profiled) -> set[str]:
    return {one.quantity for one in drift(before, after, SETTINGS)}


def test_a_workload_that_only_fluctuates_has_not_drifted() -> None:
    found = [quantities(profiled(seed), profiled(seed + 1000)) for seed in range(100)]
    assert sum(map(bool, found)) <= 2


@pytest.mark.parametrize(
    ("changed", "quantity"),
    [
        (profiled(1, prompt=6.0), "prompt_tokens"),
        (profiled(1, output=3.0), "output_tokens"),
        (profiled(1, lasted_s=60.0), "rate"),
        (profiled(1, lasted_s=160.0), "rate"),
    ],
)
def test_each_quantity_is_noticed_and_named(changed: Profiled, quantity: str) -> None:
    assert quantities(profiled(0), changed) == {quantity}


def test_prefixes_that_are_no_longer_hit_are_noticed() -> None:
    cached = tuple(replace(one, cached_tokens=one.prompt_tokens // 2) for one in requests(0))
    assert quantities(Profiled(cached, 100.0), profiled(1)) == {"cached_tokens"}


def test_what_is_significant_but_small_does_not_matter() -> None:
    before, after = profiled(0, count=20_000), profiled(1, count=20_000, prompt=5.6)
    found = compare("p", *(np.array([r.prompt_tokens for r in p.requests], dtype=float)
                           for p in (before, after)))  # fmt: skip
    assert found.chance < SETTINGS.significance
    assert quantities(before, after) == set()


def test_too_few_requests_say_nothing() -> None:
    assert quantities(profiled(0), profiled(1, count=150, prompt=8.0)) == set()


def test_the_distribution_is_kolmogorovs() -> None:
    """Its textbook quantiles: 1.358 at 5%, 1.628 at 1%."""
    assert kolmogorov_tail(1.358) == pytest.approx(0.05, abs=2e-4)
    assert kolmogorov_tail(1.628) == pytest.approx(0.01, abs=1e-4)
    assert kolmogorov_tail(0.0) == 1.0


def test_chances_of_equal_samples_are_spread_evenly() -> None:
    generator = np.random.default_rng(0)
    chances = np.array(
        [compare("x", *generator.exponential(1.0, (2, 300))).chance for _ in range(400)]
    )
    for share in (0.1, 0.5, 0.9):
        assert (chances < share).mean() == pytest.approx(share, abs=0.06)
    counts = generator.poisson(400, (400, 2))
    rates = np.array([
        compare_rates(Profiled((Shape(1, 1),) * a, 50.0), Profiled((Shape(1, 1),) * b, 50.0)).chance
        for a, b in counts.tolist()
    ])  # fmt: skip
    assert (rates < 0.1).mean() == pytest.approx(0.1, abs=0.06)


def test_a_profiler_compares_with_its_first_full_window_until_it_is_settled() -> None:
    profiler = Profiler(100.0, DriftSettings(least_requests=100))
    for second in range(101):
        profiler.add(requests(second, count=4), float(second))
        assert profiler.drifted(float(second)) == ()
    for second in range(101, 250):
        profiler.add(requests(second, count=4, output=5.0), float(second))
    (found,) = profiler.drifted(249.0)
    assert found.quantity == "output_tokens"
    assert found.after > found.before
    assert "output_tokens" in str(found)
    profiler.settle(profiler.window(249.0))
    assert profiler.drifted(249.0) == ()


def test_a_window_forgets_what_is_older_and_knows_its_rate() -> None:
    profiler = Profiler(10.0, SETTINGS)
    for second in range(50):
        profiler.add(requests(second, count=3), float(second))
    assert profiler.window(49.0).rate_rps == pytest.approx(3.0, rel=0.15)
    assert len(profiler.window(49.0).requests) <= 33
