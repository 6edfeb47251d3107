from collections import Counter

import pytest

from tests.simulation.world import World

SEEDS = 240
SEEDS_A_TEST = 20


@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_A_TEST))
def test_every_request_ends_right_and_every_pool_returns_to_its_baseline(start):
    for seed in range(start, start + SEEDS_A_TEST):
        World(seed).run()


def test_the_same_seed_gives_the_same_trace():
    first, second = World(7), World(7)
    first.run()
    second.run()
    assert first.events == second.events
    assert first.trace.digest() == second.trace.digest()


def test_worlds_meet_hand_offs_migrations_preemptions_swaps_deaths_poison_and_altered_copies():
    met: Counter[str] = Counter()
    for seed in range(40):
        world = World(seed)
        world.run()
        met.update(world.met)
    assert min(met.values()) > 20, met
