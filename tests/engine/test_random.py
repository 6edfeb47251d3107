"""The generator is Philox, and a draw depends on its (seed, position) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.random import philox, uniforms

PUBLISHED = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_the_words_are_those_published_for_philox(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    def as_words(values: list[int]) -> list[np.ndarray]:
        return [np.array([value], dtype=np.uint64) for value in values]

    assert [int(word[0]) for word in philox(as_words(counter), as_words(key))] == words


@given(st.lists(st.tuples(st.integers(), st.integers(0, 2**40)), min_size=1, max_size=40))
def test_a_draw_is_the_same_alone_and_in_any_batch(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = zip(*pairs, strict=True)
    together = uniforms(seeds, positions)
    alone = [uniforms([seed], [position])[0] for seed, position in pairs]
    assert together.tolist() == alone
    assert all(0.0 <= draw < 1.0 for draw in together)


def test_draws_look_uniform_and_independent_along_both_keys() -> None:
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200))
    draws = uniforms(seeds.ravel().tolist(), positions.ravel().tolist())
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = len(draws) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50
    grid = draws.reshape(200, 200)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert len(np.unique(draws)) == len(draws)


def test_no_rows_give_no_draws() -> None:
    assert uniforms([], []).shape == (0,)
