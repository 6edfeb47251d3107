"""Prompts of exactly (token ids) or about (text) the wanted length, different from each other.

No two prompts share their first tokens by accident, so a server's prefix cache helps only
where the workload says that prefixes are shared. Another seed gives other prompts throughout, or
else a second run would find the first one's in that cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAD_TOKENS = 3
"""Leading tokens that number a prompt or a shared prefix."""
POOL_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a prompt begins or goes on with and shares with others of the same number."""

    number: int
    tokens: int


class TokenPrompts:
    """Token ids of `digits` digits cut from one random pool: rendering is a copy of bytes."""

    def __init__(self, digits: int = 3, seed: int = 0) -> None:
        self._digits, self._width = digits, digits + 1
        self._low, self._high = int(10 ** (digits - 1)), int(10**digits)
        ids = np.random.default_rng(seed).integers(self._low, self._high, POOL_TOKENS)
        self._pool = b"".join(b"%d," % one for one in ids)

    def reseeded(self, seed: int) -> TokenPrompts:
        return TokenPrompts(self._digits, seed)

    @property
    def highest_id(self) -> int:
        return self._high - 1

    def render(self, number: int, tokens: int, prefixes: Sequence[Prefix] = ()) -> bytes:
        """As JSON."""
        shared = b"".join(self._run(2 * one.number + 1, one.tokens) for one in prefixes)
        own = self._run(2 * number, tokens - len(shared) // self._width)
        return b"[" + (shared + own)[:-1] + b"]"

    def _run(self, number: int, tokens: int) -> bytes:
        """The first `tokens` ids of an endless text known by its number."""
        count = self._high - self._low
        lead = b"".join(
            b"%d," % (self._low + number // count**place % count) for place in range(LEAD_TOKENS)
        )
        start = number * 7919 % POOL_TOKENS * self._width
        wanted = tokens * self._width
        text = lead + self._pool[start : start + wanted]
        while len(text) < wanted:
            text += self._pool
        return text[:wanted]


WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
    "place", "case", "week", "company", "system", "program", "question", "work", "government",
    "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story",
    "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue",
    "side", "kind", "head", "house", "service", "friend", "father", "power", "hour", "game",
    "line", "end", "member", "law", "car", "city", "community", "name", "president", "team",
    "minute", "idea", "body", "information", "back", "parent", "face", "others", "level",
    "office", "door", "health", "person", "art", "war", "history",
)  # fmt: skip


class TextPrompts:
    """Common words; how many tokens one takes was measured on the server."""

    def __init__(self, tokens_per_word: float = 1.0, seed: int = 0) -> None:
        self._tokens_per_word, self._seed = tokens_per_word, seed

    def reseeded(self, seed: int) -> TextPrompts:
        return TextPrompts(self._tokens_per_word, seed)

    def text(self, number: int, tokens: int, prefixes: Sequence[Prefix] = ()) -> str:
        words = self._words_of(tokens)
        shared: list[str] = []
        for one in prefixes:
            shared += self._words(2 * one.number + 1, self._words_of(one.tokens))
        shared = shared[:words]
        return " ".join([*shared, *self._words(2 * number, words - len(shared))])

    def _words_of(self, tokens: int) -> int:
        return max(1, round(tokens / self._tokens_per_word))

    def _words(self, number: int, count: int) -> list[str]:
        """The first words of an endless text known by its number."""
        lead = [WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(LEAD_TOKENS)]
        drawn = np.random.default_rng((self._seed, number)).integers(0, len(WORDS), count)
        return (lead + [WORDS[one] for one in drawn])[:count]
