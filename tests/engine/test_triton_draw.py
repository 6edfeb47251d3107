"""What rows of logits are followed by, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine import triton_draw
from engine.batch import UNREAD, Chunk, Draw
from engine.device_rows import DeviceRows
from engine.request import Sampling
from engine.sampler import Sampler
from tests.engine.judging import allows

BLOCK_TOKENS = 4
ROWS = 8
GREEDY = Sampling(temperature=0.0)


def chunk(row: int, sampling: Sampling, place: int = 3) -> Chunk:
    table = tuple(range(10 * row, 10 * row + 5))
    return Chunk(str(row), (row + 1,), 4 * row, table, Draw(sampling, place, 1, ()))


def rows_of(*samplings: Sampling) -> tuple[DeviceRows, list[Chunk]]:
    rows = DeviceRows(ROWS, 16, BLOCK_TOKENS, torch.device("cpu"))
    chunks = [chunk(row, sampling, place=7 * row) for row, sampling in enumerate(samplings)]
    rows.write(list(enumerate(chunks)))
    return rows, chunks


def drawn_by(rows: DeviceRows, count: int) -> tuple[list[int], list[int]]:
    """What the leading rows drew, and whether from finite logits."""
    drawn, sound = rows.results()[:, :count].tolist()
    return drawn, sound


def logits_of(rows: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(vocabulary)
    return torch.randn(rows, vocabulary, generator=random) * spread


SEEDS = (0, 1, 12345, -7, (1 << 63) + 5, (1 << 64) - 1, 1 << 32)


@pytest.mark.parametrize("vocabulary", [5, 1024, 2500])
def test_the_most_likely_token_is_the_first_of_the_highest(vocabulary: int) -> None:
    rows, chunks = rows_of(*[GREEDY] * ROWS)
    logits = logits_of(ROWS, vocabulary + 3)
    logits[:, vocabulary:] = 1e9  # past the vocabulary
    logits[0, [vocabulary // 2, vocabulary - 1]] = 50.0
    logits[1, :] = -2.0
    triton_draw.draw_rows(logits, rows, vocabulary)
    drawn, sound = drawn_by(rows, ROWS)
    wanted = Sampler(vocabulary).sample(
        logits, [c.draw for c in chunks if c.draw], [c.request_id for c in chunks]
    )
    assert drawn == [one.token for one in wanted]
    assert (drawn[0], drawn[1]) == (vocabulary // 2, 0)
    assert sound == [1] * ROWS


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [5, 1024, 2500])
def test_a_draw_falls_where_the_number_of_its_seed_and_place_says(
    vocabulary: int, temperature: float
) -> None:
    rows, chunks = rows_of(*[Sampling(temperature=temperature, seed=seed) for seed in SEEDS])
    logits = logits_of(len(chunks), vocabulary)
    triton_draw.draw_rows(logits, rows, vocabulary)
    drawn, _ = drawn_by(rows, len(chunks))
    for row, (one, token) in enumerate(zip(chunks, drawn, strict=True)):
        assert one.draw is not None
        assert allows(logits[row], one.draw, token)


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(ROWS)]
    rows, chunks = rows_of(*samplings)
    logits = torch.full((ROWS, 3000), float("-inf"))
    logits[:, [1, 1500, 2999]] = 0.0
    triton_draw.draw_rows(logits, rows, 3000)
    drawn, sound = drawn_by(rows, ROWS)
    assert set(drawn) <= {1, 1500, 2999}
    assert len(set(drawn)) > 1
    assert sound == [1] * len(chunks)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    rows, _ = rows_of(*[GREEDY] * 3)
    logits = logits_of(3, 2500)
    logits[1, 2000] = bad
    logits[2] = float("-inf")
    triton_draw.draw_rows(logits, rows, 2500)
    assert drawn_by(rows, 3)[1] == [1, 0, 0]


def test_rows_move_on_by_what_they_drew_and_empty_ones_stay() -> None:
    rows, chunks = rows_of(GREEDY, Sampling(temperature=1.0, seed=9))
    logits = logits_of(4, 300)
    triton_draw.draw_rows(logits, rows, 300)
    drawn, _ = drawn_by(rows, 2)
    assert rows.token_ids[:4].tolist() == [*drawn, 0, 0]
    assert rows.positions[:4].tolist() == [c.end for c in chunks] + [0, 0]
    assert rows.places[:4].tolist() == [1, 8, 0, 0]


def test_a_row_stands_in_the_block_of_its_position_and_an_empty_one_nowhere() -> None:
    rows, _ = rows_of(*[GREEDY] * 3)
    rows.write([(1, None)])
    triton_draw.place_rows(rows, 4, BLOCK_TOKENS)
    assert rows.slots[:4].tolist() == [0 * BLOCK_TOKENS, -1, 22 * BLOCK_TOKENS, -1]
    assert rows.contexts[:4].tolist() == [1, 0, 9, 0]


def test_what_is_written_over_a_row_is_all_that_it_says() -> None:
    rows, _ = rows_of(GREEDY, Sampling(temperature=0.5, seed=-1))
    rows.write([(1, chunk(4, Sampling(temperature=2.0, seed=3), place=5)), (0, None)])
    assert rows.present.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert (rows.token_ids[1], rows.positions[1], rows.places[1]) == (5, 16, 5)
    assert (rows.seeds[1], rows.heats[1]) == (3, 2.0)
    assert rows.tables[1, :5].tolist() == [40, 41, 42, 43, 44]
    rows.write([])
    rows.clear()
    assert not rows.present.any()


def test_a_row_whose_token_nobody_has_read_is_given_its_blocks_alone() -> None:
    rows, chunks = rows_of(*[GREEDY] * 3)
    unread = replace(chunks[1], tokens=(UNREAD,), start=99, blocks=(7, 8, 9, 10, 11, 12))
    rows.write([(2, None), (1, unread), (0, chunk(5, GREEDY))])
    assert rows.token_ids[:3].tolist() == [6, 2, 0]
    assert rows.positions[:3].tolist() == [20, 4, 0]
    assert rows.present[:3].tolist() == [1, 1, 0]
    assert rows.tables[1, :6].tolist() == [7, 8, 9, 10, 11, 12]
    assert rows.tables[0, :6].tolist() == [50, 51, 52, 53, 54, 0]


def test_what_a_step_drew_stays_when_the_next_one_draws() -> None:
    rows, _ = rows_of(GREEDY)
    logits = logits_of(1, 300)
    triton_draw.draw_rows(logits, rows, 300)
    first = rows.results()
    before = first[0, 0].item()
    triton_draw.draw_rows(-logits, rows, 300)
    assert first[0, 0].item() == before
    assert rows.results()[0, 0].item() != before
