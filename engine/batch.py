"""What one forward pass computes, and what came of it: plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.request import Sampling, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    Collect = Callable[[], "StepResult"]
    """Waits for a batch that was launched."""
    Launch = Callable[["Batch"], Collect | None]
    """Begins with single tokens that all draw, and returns before they are drawn; None for a batch
    that cannot begin now. Batches are collected as they were launched, one behind another at most,
    and unread tokens are those of the batch that was launched last."""

UNREAD = -1
"""Stands for the token that the batch before this one draws, before anybody has read it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The token to sample after a chunk. Its random number is keyed by (seed, position)."""

    sampling: Sampling
    position: int
    """Index of the drawn token in the output."""
    prompt_tokens: int
    history: tuple[int, ...]
    """Prompt and output so far; empty unless `sampling.reads_history`."""

    def forbidden_ends(self, eos: frozenset[int]) -> tuple[int, ...]:
        """The tokens that would end the answer before min_tokens."""
        sampling = self.sampling
        if self.position >= sampling.min_tokens:
            return ()
        return sampling.stop_token_ids + (() if sampling.ignore_eos else tuple(sorted(eos)))

    def is_bare(self, eos: frozenset[int]) -> bool:
        """Whether no more is asked for than a temperature."""
        sampling = self.sampling
        edited = sampling.reads_history or sampling.logit_bias or self.forbidden_ends(eos)
        return sampling.logprobs is None and not edited and not sampling.is_filtered


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a batch: `tokens` stand at positions start, start + 1, ..."""

    request_id: str
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    """Block table covering positions 0 .. start + len(tokens) - 1."""
    draw: Draw | None
    """None when the chunk ends inside the known tokens."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_unread(self) -> bool:
        return self.tokens[0] == UNREAD


@dataclass(frozen=True, slots=True)
class Swap:
    """Blocks to move between the device pool and host slots before the forward pass."""

    request_id: str
    blocks: tuple[int, ...]
    host_slots: tuple[int, ...]
    to_host: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Ragged: any mix of prompt chunks and single decode tokens."""

    chunks: tuple[Chunk, ...] = ()
    swaps: tuple[Swap, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    def __bool__(self) -> bool:
        return bool(self.chunks or self.swaps)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probability of the drawn token, and the most likely (token, logprob) pairs."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    request_id: str
    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `Drawn` for each chunk with a draw, in the batch's order."""

    drawn: tuple[Drawn, ...]
    duration_s: float = 0.0


class Executor(Protocol):
    """Runs batches: the torch runner, or a fake with the same contract."""

    def execute(
        self, batch: Batch, on_layer_group: Callable[[int], None] | None = None
    ) -> StepResult:
        """`on_layer_group(g)` is called once the KV of layer group g is in the pool."""
        ...

    @property
    def launch(self) -> Launch | None:
        """Where a batch may be launched while another is under way; None where each waits."""
        ...


def chunk_of(sequence: Sequence, count: int) -> Chunk:
    """The next `count` uncomputed tokens of a sequence, drawing if they reach its end."""
    assert 0 < count <= sequence.uncomputed, (sequence.id, count, sequence.uncomputed)
    end = sequence.computed + count
    draw = None
    if end == len(sequence.tokens):
        sampling = sequence.request.sampling
        history = tuple(sequence.tokens) if sampling.reads_history else ()
        draw = Draw(sampling, sequence.output_tokens, sequence.prompt_tokens, history)
    return Chunk(
        sequence.id,
        tuple(sequence.tokens[sequence.computed : end]),
        sequence.computed,
        tuple(sequence.blocks),
        draw,
    )


def chunk_ahead(sequence: Sequence) -> Chunk:
    """The chunk after the one under way, which draws the token that this one begins with."""
    draw = Draw(sequence.request.sampling, sequence.output_tokens + 1, sequence.prompt_tokens, ())
    return Chunk(sequence.id, (UNREAD,), len(sequence.tokens), tuple(sequence.blocks), draw)
