"""The forward passes that a profile times: prompts, decodes, and both together."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from placement.latency.model import pairs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROMPTS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = (256, 1024, 3072)
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 128)
DECODE_CONTEXTS = (32, 256, 1024)
QUICK_PROMPTS, QUICK_CONTEXTS = (16, 64, 256, 1024), (1024,)
QUICK_BATCHES, QUICK_DECODE_CONTEXTS = (1, 2, 3, 4, 16, 64), (32, 512)
BESIDE, QUICK_BESIDE, BESIDE_BATCHES = (4, 16, 64, 256, 1024), (4, 16, 64), (2, 4, 16)
"""Prompts beside decodes: the smaller ones are chunks that leave a TPOT target its time."""


class Pass(NamedTuple):
    """Prompt chunks as (tokens, context), and the contexts of decoding sequences."""

    prompts: tuple[tuple[int, int], ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(tokens to compute, tokens already there) of every sequence."""
        return [*self.prompts, *((1, context) for context in self.contexts)]

    @property
    def kind(self) -> str:
        if not self.contexts:
            return "prefill"
        return "mixed" if self.prompts else "decode"


def passes_of(max_length: int, *, quick: bool) -> Iterator[Pass]:
    """Prompts alone, after others and several at once; decodes; and both together."""
    longest = max_length - 1
    prompts = [n for n in (QUICK_PROMPTS if quick else PROMPTS) if n <= longest]
    for tokens in prompts:
        yield Pass(((tokens, 0),))
    for tokens in prompts[1:-1]:
        yield Pass(((tokens, 0),) * 4)
        for context in QUICK_CONTEXTS if quick else CONTEXTS:
            if tokens + context <= longest:
                yield Pass(((tokens, context),))
    for batch in QUICK_BATCHES if quick else BATCHES:
        for context in QUICK_DECODE_CONTEXTS if quick else DECODE_CONTEXTS:
            if context <= longest:
                yield Pass(contexts=(context,) * batch)
    yield from _both(longest, QUICK_BESIDE if quick else BESIDE)


def _both(longest: int, prompts: Sequence[int]) -> Iterator[Pass]:
    for tokens in prompts:
        for batch in BESIDE_BATCHES:
            if tokens <= longest:
                yield Pass(((tokens, 0),), (min(256, longest),) * batch)


def usual(seconds: Sequence[float]) -> float:
    """The mean of the middle half: what is slow half of the time is so in service, too."""
    outer = len(seconds) // 4
    return statistics.fmean(sorted(seconds)[outer : len(seconds) - outer])


def profile_entry(one: Pass, seconds: float) -> dict[str, float]:
    """`squares` so that half of it and the tokens are the query-key pairs."""
    tokens = sum(count for count, _ in one.prompts)
    pairs = sum(pairs_of(count, context) for count, context in one.prompts)
    entry: dict[str, float] = {}
    if one.prompts:
        entry |= {"tokens": tokens, "squares": 2 * pairs - tokens, "prompts": len(one.prompts)}
    if one.contexts:
        entry["batch"] = len(one.contexts)
    context = sum(one.contexts) + sum(before for _, before in one.prompts)
    return {**entry, "context": context, "seconds": seconds}
