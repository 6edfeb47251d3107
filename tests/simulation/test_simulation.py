from collections import Counter
from functools import cache

import pytest

from tests.simulation.world import World

SEEDS = 240
SEEDS_A_TEST = 20


@cache
def met_from(start: int) -> Counter[str]:
    """Runs some worlds, each of which checks itself; how often they met what."""
    met: Counter[str] = Counter()
    for seed in range(start, start + SEEDS_A_TEST):
        world = World(seed)
        world.run()
        met.update(world.met)
    return met


@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_A_TEST))
def test_every_request_ends_right_and_every_pool_returns_to_its_baseline(start):
    met_from(start)


def test_the_same_seed_gives_the_same_trace():
    first, second = World(7), World(7)
    first.run()
    second.run()
    assert first.events == second.events
    assert first.trace.digest() == second.trace.digest()


def test_worlds_meet_every_fault_and_steps_that_run_ahead_of_sequences_that_end():
    met: Counter[str] = Counter()
    for start in range(0, 3 * SEEDS_A_TEST, SEEDS_A_TEST):
        met.update(met_from(start))
    assert min(met.values()) > 20, met
