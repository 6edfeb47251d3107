"""What the controller makes of the instances' loads, and of moves that it is asked for."""

import asyncio

import pytest

from cluster.control.controller import owner_of
from cluster.control.moves import Moves
from engine.errors import BadRequest, DeadlineExceeded, NotFound, TransferError
from tests.cluster.serving import PATIENCE_S, settle
from tests.cluster.test_journal import listing


def listed(**states: str):
    names = {name.replace("_", "-"): state for name, state in states.items()}
    return {name: listing(name, 1, state) for name, state in names.items()}


@pytest.mark.parametrize(
    ("loads", "owner"),
    [
        (listed(decode_0="reserved", prefill_0="held"), "prefill-0"),
        (listed(decode_0="copying", decode_1="running"), "decode-1"),
        (listed(decode_0="committed", decode_1="running"), "decode-1"),
        (listed(decode_0="committed", decode_1="copying"), "decode-0"),
    ],
)
def test_a_request_is_moved_from_where_it_is_and_not_from_where_it_arrives(loads, owner):
    assert owner_of("r", loads) == owner


def test_a_request_that_arrives_somewhere_but_is_nowhere_is_not_found():
    with pytest.raises(NotFound):
        owner_of("r", listed(decode_0="offered"))


@pytest.fixture
def asked():
    """What owners have been asked for."""
    return []


def waiting(moves: Moves, asked: list, within_s: float = PATIENCE_S) -> asyncio.Task[None]:
    over = moves.over("r", "decode-1", lambda: asked.append("r"), within_s)
    return asyncio.create_task(over)


async def test_a_move_is_over_once_the_request_runs_at_its_target(asked):
    moves = Moves()
    move = waiting(moves, asked)
    await settle()
    moves.ended("r", "decode-2", "OutOfBlocks")
    moves.ended("other", "decode-1", "OutOfBlocks")
    moves.replayed("other")
    await settle()
    assert not move.done()
    moves.ended("r", "decode-1", "committed")
    await move
    assert asked == ["r"]


@pytest.mark.parametrize(
    ("outcome", "kind", "says"),
    [
        ("NotFound", NotFound, "any more"),
        ("OutOfBlocks", TransferError, "OutOfBlocks"),
        ("StaleEpoch", TransferError, "it has ended"),
    ],
)
async def test_a_move_that_comes_to_nothing_says_why(asked, outcome, kind, says):
    moves = Moves()
    move = waiting(moves, asked)
    await settle()
    moves.ended("r", "decode-1", outcome)
    with pytest.raises(kind, match=says):
        await move


async def test_a_move_is_over_when_its_request_is_computed_anew(asked):
    moves = Moves()
    move = waiting(moves, asked)
    await settle()
    moves.replayed("r")
    with pytest.raises(TransferError, match="anew elsewhere"):
        await move


async def test_the_same_move_is_not_asked_for_twice(asked):
    moves = Moves()
    first = waiting(moves, asked)
    await settle()
    with pytest.raises(BadRequest, match="already"):
        await waiting(moves, asked)
    moves.ended("r", "decode-1", "committed")
    await first
    assert asked == ["r"]


async def test_nobody_waits_for_a_move_for_ever(asked):
    moves = Moves()
    with pytest.raises(DeadlineExceeded, match="decode-1"):
        await waiting(moves, asked, within_s=0.0)
    moves.ended("r", "decode-1", "committed")
