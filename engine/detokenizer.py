"""Tokens to text as they come: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from engine.tokenizer import Tokenizer


class Detokenizer:
    """Holds back at most the bytes of one unfinished character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[int]) -> str:
        """The characters these tokens complete; replaying the same tokens gives the same state."""
        shown = (token for token in tokens if token not in self._hidden)
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Lets text through up to the first stop string, whatever pieces it comes in.

    The stop string that is complete first wins, and of those complete at once the longest.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string stops everything"
        self._stops = sorted(stops, key=lambda stop: (-len(stop), stop))
        self._include_stop = include_stop
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was found."""

    def push(self, text: str, *, armed: bool = True) -> str:
        """What may be shown now. `armed` is False while min_tokens forbids to stop."""
        if self.stopped is not None:
            return ""
        text, self._held = self._held + text, ""
        if not armed or not self._stops:
            return text
        found = self._first(text)
        if found is None:
            return self._hold_back(text)
        end, self.stopped = found
        return text[: end if self._include_stop else end - len(self.stopped)]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string to be complete ends."""
        ends = [
            (start + len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(ends, key=lambda found: found[0], default=None)

    def _hold_back(self, text: str) -> str:
        count = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - count
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
