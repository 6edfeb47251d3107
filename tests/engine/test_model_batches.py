"""A sequence draws the same tokens however it is cut into batches and whoever shares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine.batch import Batch, Swap
from engine.checkpoint import open_checkpoint
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk, generate, step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = tiny.prompt(21)
TABLE = (3, 9, 1, 14, 6, 11, 2, 8)
OTHER_TABLE = (10, 4, 13, 5, 7, 12, 0, 15)
STEPS = 9

families = pytest.mark.parametrize("name", tiny.TINY)


@pytest.fixture
def runner(name: str, tiny_checkpoint: Callable[[str], Path]) -> Runner:
    checkpoint = open_checkpoint(str(tiny_checkpoint(name)))
    return Runner(checkpoint, sampler=Greedy(), blocks=24, block_tokens=4, host_slots=8)


def continue_from(runner: Runner, first: int, table: tuple[int, ...]) -> list[int]:
    """The output that follows a first drawn token, one token a step."""
    tokens = [first]
    while len(tokens) < STEPS:
        tokens += step(runner, chunk("a", tokens[-1:], len(PROMPT) + len(tokens) - 1, table))
    return tokens


@families
def test_chunked_prefill(runner: Runner) -> None:
    wanted = generate(runner, PROMPT, STEPS, TABLE)
    for start, end in ((0, 3), (3, 11), (11, 12)):
        piece = chunk("a", PROMPT[start:end], start, OTHER_TABLE, draw=False)
        assert step(runner, piece) == []
    (first,) = step(runner, chunk("a", PROMPT[12:], 12, OTHER_TABLE))
    assert continue_from(runner, first, OTHER_TABLE) == wanted


@families
def test_a_cached_prefix_in_another_sequences_table(runner: Runner) -> None:
    wanted = generate(runner, PROMPT, STEPS, TABLE)
    shared = (*TABLE[:4], *OTHER_TABLE[4:])
    (first,) = step(runner, chunk("b", PROMPT[16:], 16, shared))
    assert continue_from(runner, first, shared) == wanted


@families
def test_a_ragged_mix_of_chunks_and_decodes(runner: Runner) -> None:
    wanted = generate(runner, PROMPT, STEPS, TABLE)
    neighbour = tiny.prompt(13, seed=1)
    (alone,) = step(runner, chunk("n", neighbour, 0, OTHER_TABLE[4:]))
    step(runner, chunk("a", PROMPT[:9], 0, TABLE, draw=False))
    mixed = step(
        runner,
        chunk("n", neighbour[:5], 0, OTHER_TABLE[:4], draw=False),
        chunk("a", PROMPT[9:], 9, TABLE),
        chunk("d", neighbour[-1:], 12, OTHER_TABLE[4:]),
    )
    assert mixed == [wanted[0], alone]
    mixed = step(
        runner,
        chunk("a", wanted[:1], len(PROMPT), TABLE),
        chunk("n", neighbour[5:], 5, OTHER_TABLE[:4]),
    )
    assert mixed == [wanted[1], alone]


@pytest.mark.parametrize("name", ["llama3"])
def test_blocks_swapped_out_and_back_in_elsewhere(runner: Runner) -> None:
    wanted = generate(runner, PROMPT, STEPS, TABLE)
    (first,) = step(runner, chunk("a", PROMPT, 0, TABLE))
    slots = (0, 1, 2, 5, 4, 7)
    runner.execute(Batch(swaps=(Swap("a", TABLE[:6], slots, to_host=True),)))
    generate(runner, tiny.prompt(30, seed=2), 2, TABLE)
    runner.execute(Batch(swaps=(Swap("a", OTHER_TABLE[:6], slots, to_host=False),)))
    assert continue_from(runner, first, OTHER_TABLE) == wanted
