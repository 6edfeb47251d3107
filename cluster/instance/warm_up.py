"""What an instance runs before it takes requests, so that the first of them finds it warm."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine.batch import Batch, Chunk, Draw
from engine.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Executor

log = logging.getLogger(__name__)

TOKEN = 1
"""Any token of any vocabulary."""
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(temperature=1.0, top_p=0.9)
NARROWEST, WIDER = 64, 4
"""Blocks in the narrowest block tables that executors make ready for, and how many times wider each
next ones are."""


def warm_up(executor: Executor, batches: list[Batch], report: Callable[[int, int], None]) -> None:
    """The pool is nobody's yet: what these batches leave in its blocks is never read."""
    took_s = 0.0
    for number, batch in enumerate(batches, start=1):
        took_s += executor.execute(batch).duration_s
        report(number, len(batches))
    log.info("warmed up batches=%d duration_s=%.3f", len(batches), took_s)


def warm_up_batches(
    blocks: int, block_tokens: int, prompt_tokens: int, sequences: int, *, longest: int
) -> list[Batch]:
    """A prompt, decode steps from one sequence to many, and a step with both in it.

    Each step has twice the sequences of the last: as the sizes that executors make ready for. They
    come once for each width of block tables that contexts as long as the prompt need, with one
    sequence of that length among them: a step's tables are as wide as its longest. The model takes
    contexts of `longest` tokens.
    """
    if prompt_tokens == 0:
        return []
    prompt_tokens = min(prompt_tokens, longest, (blocks - 1) * block_tokens)
    first_free = -(-prompt_tokens // block_tokens)
    most = min(sequences, blocks - first_free)
    prompt = _chunk("prompt", prompt_tokens, tuple(range(first_free)), GREEDY)
    short = tuple(
        _chunk(f"decode-{n}", 1, (first_free + n,), DRAWN if n % 2 else GREEDY) for n in range(most)
    )
    firsts = [
        _chunk("decode-0", 1, (*range(before), first_free), GREEDY, start=before * block_tokens)
        for before in _shares(first_free)
    ]
    sizes = sorted({1 << n for n in range(most.bit_length())} | {most})
    decodes = [Batch((first, *short[1:size])) for first in firsts for size in sizes]
    return [Batch((prompt,)), *decodes, Batch((*short, prompt))]


def _shares(blocks: int) -> list[int]:
    """How many of a prompt's blocks come before one more, to make tables of each width."""
    found, width = [0], NARROWEST
    while width < blocks:
        found.append(width)
        width *= WIDER
    return found


def _chunk(
    name: str, tokens: int, blocks: tuple[int, ...], sampling: Sampling, *, start: int = 0
) -> Chunk:
    draw = Draw(sampling, 0, tokens, ())
    return Chunk(f"warm-up-{name}", (TOKEN,) * tokens, start, blocks, draw)
