"""Prompts of one seed are told apart by their number, and of two seeds share nothing."""

from __future__ import annotations

import json

import pytest

from cluster.bench.arrange import Arrangement, Synthetic, draw
from cluster.bench.goodput import Search
from cluster.bench.http import parse_target
from cluster.bench.prompts import LEAD_TOKENS, Prefix, TextPrompts, TokenPrompts
from cluster.bench.run import Bench, Plan
from cluster.bench.server import Settings
from tests.cluster.bench.simulated import Behaviour, Latency, SimulatedServer

BLOCK = 16


def ids(seed: int, number: int) -> list[int]:
    found: list[int] = json.loads(TokenPrompts(3, seed).render(number, 64))
    return found


def blocks(seed: int, *prefixes: Prefix) -> set[tuple[int, ...]]:
    prompts = TokenPrompts(3, seed)
    texts = [prompts.render(number, 64, prefixes) for number in range(500)]
    return {tuple(json.loads(text)[:BLOCK]) for text in texts}


def test_two_seeds_share_no_block_of_a_prefix_cache() -> None:
    first, second = blocks(1), blocks(2)
    assert len(first) == len(second) == 500
    assert not first & second
    shared = Prefix(0, 32)
    assert len(blocks(1, shared)) == 1
    assert blocks(1, shared) != blocks(2, shared)


def test_one_seed_gives_the_same_prompts_again() -> None:
    assert ids(7, 3) == ids(7, 3)
    assert TextPrompts(seed=7).text(3, 40) == TextPrompts(seed=9).reseeded(7).text(3, 40)


def test_texts_of_two_seeds_part_after_their_number() -> None:
    one, other = (TextPrompts(seed=seed).text(3, 40).split() for seed in (1, 2))
    assert one[:LEAD_TOKENS] == other[:LEAD_TOKENS]
    assert one[LEAD_TOKENS:BLOCK] != other[LEAD_TOKENS:BLOCK]


@pytest.mark.parametrize("search", [None, Search(100.0, 0.9, probe_s=0.1, highest_rps=300.0)])
async def test_a_run_says_its_seed_and_probes_never_meet_their_own_prompts(search) -> None:
    server = SimulatedServer(Behaviour(Latency(ttft_median_s=0.001, gap_s=(0.0001, 0.0002))))
    recipe = Synthetic(requests=10, rate_rps=200.0, prompt_tokens=32, output_tokens=3)
    plan = Plan(
        Arrangement(draw(recipe)), search=search, warm_up=0, settings=Settings(prompt_seed=5)
    )
    (measured,) = await Bench(plan).run([parse_target(await server.start())])
    server.close()
    assert measured.notes == ["prompt seed 5"]
    prompts = [tuple(one["prompt"]) for one in server.bodies if len(one["prompt"]) == 32]
    assert len(prompts) >= 10
    assert len(set(prompts)) == len(prompts)


def test_prompts_share_as_many_texts_as_their_prefixes_have_in_common() -> None:
    short, long = (Prefix(0, 16),), (Prefix(0, 16), Prefix(1, 16))
    first, second, third = (
        json.loads(TokenPrompts().render(number, 48, prefixes))
        for number, prefixes in enumerate((short, long, long))
    )
    assert first[:16] == second[:16]
    assert second[:32] == third[:32]
    assert first[16:32] != second[16:32]
    assert second[32:] != third[32:]
    assert len(first) == len(second) == 48
    words = [TextPrompts().text(number, 48, long).split() for number in range(2)]
    assert words[0][:32] == words[1][:32]
    assert words[0][32:] != words[1][32:]
