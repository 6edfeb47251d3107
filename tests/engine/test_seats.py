"""Which rows sequences get, and what is written of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.batch import UNREAD, Chunk, Draw
from engine.request import Sampling
from engine.seats import Seats

GREEDY = Sampling(temperature=0.0)


def chunk(name: str, token: int = 7, start: int = 4, blocks: tuple[int, ...] = (1, 2)) -> Chunk:
    return Chunk(name, (token,), start, blocks, Draw(GREEDY, start - 4, 4, ()))


def after(one: Chunk, token: int) -> Chunk:
    """The sequence's next chunk, once it has drawn `token`."""
    assert one.draw is not None
    draw = replace(one.draw, position=one.draw.position + 1)
    return replace(one, tokens=(token,), start=one.end, draw=draw)


def step(seats: Seats, taken: list[int], tokens: list[int]) -> None:
    """A step draws tokens that are read before anything else."""
    seats.learned(taken, seats.moved_on(taken), tokens)


@pytest.fixture
def seats() -> Seats:
    return Seats()


def test_newcomers_take_the_lowest_rows_and_are_written(seats: Seats) -> None:
    chunks = [chunk("b"), chunk("a"), chunk("c")]
    taken, written = seats.take(chunks, 4)
    assert taken == [0, 1, 2]
    assert written == list(enumerate(chunks))


def test_a_sequence_that_goes_on_with_what_was_drawn_is_not_written_again(seats: Seats) -> None:
    chunks = [chunk("a"), chunk("b")]
    taken, _ = seats.take(chunks, 2)
    step(seats, taken, [30, 31])
    on = [after(chunks[1], 31), after(chunks[0], 30)]
    assert seats.take(on, 2) == ([1, 0], [])


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (99,)},
        {"start": 9},
        {"blocks": (1, 2, 3)},
        {"blocks": (1, 5)},
        {"draw": Draw(GREEDY, 5, 4, ())},
        {"draw": Draw(Sampling(temperature=1.0), 1, 4, ())},
    ],
    ids=str,
)
def test_what_the_device_does_not_say_is_written(seats: Seats, change: dict[str, object]) -> None:
    taken, _ = seats.take([chunk("a"), chunk("b")], 2)
    step(seats, taken, [30, 30])
    other = replace(after(chunk("a"), 30), **change)  # type: ignore[arg-type]
    _, written = seats.take([other, after(chunk("b"), 30)], 2)
    assert written == [(0, other)]


def test_those_who_stay_keep_their_rows_and_who_left_is_emptied(seats: Seats) -> None:
    chunks = [chunk(name) for name in "abcd"]
    taken, _ = seats.take(chunks, 4)
    step(seats, taken, [9] * 4)
    taken, written = seats.take([after(chunks[0], 9), after(chunks[3], 9), chunk("e")], 4)
    assert taken == [0, 3, 1]
    assert written == [(1, chunk("e")), (2, None)]
    assert len(seats) == 3


def test_who_sits_above_fewer_rows_moves_down(seats: Seats) -> None:
    chunks = [chunk(name) for name in "abcd"]
    taken, _ = seats.take(chunks, 4)
    step(seats, taken, [9] * 4)
    on = [after(chunks[1], 9), after(chunks[3], 9)]
    assert seats.take(on, 2) == ([1, 0], [(0, on[1]), (2, None), (3, None)])


def test_nobody_sits_after_all_were_sent_away(seats: Seats) -> None:
    seats.take([chunk("a")], 1)
    seats.clear()
    assert len(seats) == 0
    assert seats.take([chunk("a")], 1) == ([0], [(0, chunk("a"))])


def test_a_row_whose_token_nobody_has_read_is_left_alone_until_it_has(seats: Seats) -> None:
    first = chunk("a")
    taken, _ = seats.take([first], 1)
    left = seats.moved_on(taken)
    second = after(first, UNREAD)
    assert seats.take([second], 1) == ([0], [])
    behind = seats.moved_on([0])
    seats.learned(taken, left, [30])
    third = after(second, UNREAD)
    assert seats.take([third], 1) == ([0], [])
    seats.learned([0], behind, [31])
    seats.learned([0], seats.moved_on([0]), [32])
    assert seats.take([after(third, 32)], 1) == ([0], [])


def test_a_row_with_an_unread_token_may_get_another_block(seats: Seats) -> None:
    first = chunk("a")
    seats.moved_on(seats.take([first], 1)[0])
    longer = replace(after(first, UNREAD), blocks=(1, 2, 3))
    assert seats.take([longer], 1) == ([0], [(0, longer)])


def test_what_was_read_late_is_not_said_of_who_has_the_row_by_now(seats: Seats) -> None:
    first, newcomer = chunk("a"), chunk("b")
    taken, _ = seats.take([first], 1)
    left = seats.moved_on(taken)
    assert seats.take([newcomer], 1) == ([0], [(0, newcomer)])
    seats.moved_on([0])
    seats.learned(taken, left, [30])
    assert seats.take([after(newcomer, UNREAD)], 1) == ([0], [])


@pytest.mark.parametrize(
    "wrong",
    [after(after(chunk("a"), 5), UNREAD), replace(chunk("a"), tokens=(UNREAD,)), chunk("b")],
    ids=["too far", "behind", "another"],
)
def test_an_unread_token_that_no_row_holds_is_a_mistake(seats: Seats, wrong: Chunk) -> None:
    seats.moved_on(seats.take([chunk("a")], 1)[0])
    with pytest.raises(AssertionError):
        seats.take([replace(wrong, tokens=(UNREAD,))], 1)


def test_who_would_have_to_move_is_told_before(seats: Seats) -> None:
    chunks = [chunk(name) for name in "abc"]
    seats.take(chunks, 4)
    assert seats.stay([chunks[0], chunk("newcomer")], 2)
    assert not seats.stay([chunks[2]], 2)
