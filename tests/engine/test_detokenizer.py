"""Text comes out in whole characters, and nothing of a stop string comes out too early."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer, StopStrings
from engine.tokenizer import Tokenizer
from tests.engine.spellings import write_byte_level, write_sentencepiece

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FEW = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module", params=[write_byte_level, write_sentencepiece])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.open(request.param(tmp_path_factory.mktemp("model")))


def cut(items: Sequence[int] | str, cuts: list[int]) -> list[Sequence[int] | str]:
    """The items in pieces that end at the cuts."""
    ends = [0, *sorted(end % (len(items) + 1) for end in cuts), len(items)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


@given(text=WORDS, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_pieces_join_to_the_text_in_whole_characters(
    tokenizer: Tokenizer, text: str, cuts: list[int]
) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [detokenizer.push(piece) for piece in cut(ids, cuts)]  # type: ignore[arg-type]
    assert "".join(pieces) in (text, f" {text}")
    assert detokenizer.flush() == ""
    assert ("\ufffd" in "".join(pieces)) == ("\ufffd" in text)


@given(ids=st.lists(st.integers(0, 350), max_size=40))
def test_any_tokens_at_all_give_the_same_text_in_one_piece_or_many(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    one, many = Detokenizer(tokenizer), Detokenizer(tokenizer)
    whole = one.push(ids) + one.flush()
    assert "".join(many.push([token]) for token in ids) + many.flush() == whole


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_byte_level_text_is_the_checkpoints_own_decoding(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int]
) -> None:
    tokenizer = byte_level(tmp_path_factory)
    ids = [token for token in ids if token < tokenizer.vocab_size]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids) + detokenizer.flush() == tokenizer.decode(ids)


def byte_level(factory: pytest.TempPathFactory) -> Tokenizer:
    folder = factory.getbasetemp() / "byte_level"
    if not folder.exists():
        write_byte_level(folder)
    return Tokenizer.open(folder)


@given(text=WORDS, at=st.integers(0, 100))
def test_replaying_the_first_tokens_rebuilds_the_state(
    tokenizer: Tokenizer, text: str, at: int
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    first, rest = cut(ids, [at])
    going, rebuilt = Detokenizer(tokenizer), Detokenizer(tokenizer)
    for token in first:
        going.push([token])  # type: ignore[list-item]
    rebuilt.push(first)  # type: ignore[arg-type]
    assert going.push(rest) == rebuilt.push(rest)  # type: ignore[arg-type]


def test_half_a_character_waits_for_the_other_half(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦊b", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push([token]) for token in ids]
    assert "🦊" in shown
    assert "".join(shown).strip() == "a🦊b"
    assert "" in shown


def test_a_character_that_never_ends_is_shown_as_unknown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é🦊", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids).strip() == "é"
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id is not None
    ids = [*tokenizer.encode("fox", add_special_tokens=False), tokenizer.eos_id]
    assert Detokenizer(tokenizer).push(ids).strip() == "fox"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids).strip() == "fox</s>"


def by_character(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The slow way: the first character that completes a stop string ends the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=FEW, stops=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_stops_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    expected, stopped = by_character(text, stops)
    watch = StopStrings(stops)
    shown = "".join(watch.push(str(piece)) for piece in cut(text, cuts)) + watch.flush()
    assert (shown, watch.stopped) == (expected, stopped)


@given(text=FEW, stops=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_the_stop_is_shown_if_it_is_to_be_included(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    expected, stopped = by_character(text, stops)
    watch = StopStrings(stops, include_stop=True)
    shown = "".join(watch.push(str(piece)) for piece in cut(text, cuts)) + watch.flush()
    assert shown == expected + (stopped or "")


@given(text=FEW, stops=STOPS)
def test_only_what_may_begin_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    watch = StopStrings(stops)
    shown = watch.push(text)
    if watch.stopped is None:
        held = text[len(shown) :]
        ends = [text[len(text) - n :] for n in range(len(text) + 1)]
        starts = [end for end in ends if any(stop.startswith(end) for stop in stops)]
        assert held == max(starts, key=len, default="")


def test_nothing_more_is_shown_after_a_stop() -> None:
    watch = StopStrings(["END"])
    assert watch.push("so E") == "so "
    assert watch.push("ND and on") == ""
    assert watch.stopped == "END"
    assert watch.push("more") + watch.flush() == ""


def test_a_stop_before_min_tokens_is_passed_over() -> None:
    watch = StopStrings(["x"])
    assert watch.push("axb", armed=False) == "axb"
    assert watch.push("cxd") == "c"
    assert watch.stopped == "x"
