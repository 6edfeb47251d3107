"""Answers to one prompt that move together bring its blocks once, and share them from then on."""

from __future__ import annotations

from random import Random

import pytest

from engine.blocks import blocks_for
from placement.routing.router import Route
from tests.simulation.scene import Scene

BLOCK_TOKENS = 4


def moving_together(count: int, prompt: int, at_index: int, tokens: int = 24) -> Scene:
    """So many siblings on decode-0, all told to move to decode-1 as one draws this token."""
    scene = Scene("decode-0", "decode-1", blocks={"decode-0": 128, "decode-1": 128})
    names = [f"a#{number}" for number in range(count)]
    for name in names:
        scene.ask(name, Route("decode-0"), prompt=prompt, tokens=tokens, sibling_of="a")

    def move() -> None:
        for name in names:
            scene.migrate(name, "decode-0", "decode-1")

    scene.at_token(names[-1], at_index, move)
    return scene


def test_four_siblings_that_move_together_copy_their_prompt_once():
    scene = moving_together(4, prompt=40, at_index=6)
    counts = []
    scene.at_token("a#0", 20, lambda: counts.append(scene.nodes["decode-1"].instance.pool.counts()))
    scene.play()
    assert scene.outcomes == ["committed"] * 4
    assert scene.prompt_blocks_copied("decode-1", "a#0") == 40 // BLOCK_TOKENS
    assert counts[0].owned <= 40 // BLOCK_TOKENS + 4 * blocks_for(24 + 2, BLOCK_TOKENS)


@pytest.mark.parametrize("seed", range(40))
def test_any_siblings_that_move_at_any_moment_bring_each_prompt_block_once(seed):
    rng = Random(seed)
    count, prompt = rng.randint(2, 5), rng.randint(BLOCK_TOKENS, 60)
    scene = moving_together(count, prompt, at_index=rng.randint(1, 8))
    scene.play()
    assert scene.outcomes == ["committed"] * count
    assert scene.prompt_blocks_copied("decode-1", "a#0") == prompt // BLOCK_TOKENS


def test_a_sibling_does_not_wait_for_one_whose_source_died():
    scene = moving_together(3, prompt=40, at_index=6)
    scene.pull_block_s = 0.05
    scene.happen(0.6, lambda: scene.end("decode-0"))
    scene.play()
    assert set(scene.finished) == {"a#0", "a#1", "a#2"}


def test_siblings_handed_off_together_bring_their_prompt_once():
    scene = Scene("prefill-0", "decode-0", blocks={"prefill-0": 128, "decode-0": 128})
    for number in range(4):
        scene.ask(f"a#{number}", Route("prefill-0", "decode-0"), prompt=42, sibling_of="a")
    scene.play()
    assert scene.prompt_blocks_copied("decode-0", "a#0") == 42 // BLOCK_TOKENS


def test_finished_kv_waits_for_a_slow_sibling_only_so_long():
    scene = Scene("prefill-0", "decode-0", blocks={"prefill-0": 128, "decode-0": 128})
    scene.pull_block_s = 0.4
    for number in range(2):
        scene.ask(f"a#{number}", Route("prefill-0", "decode-0"), prompt=40, sibling_of="a")
    scene.play()
    assert not scene.seen["Kept"]
