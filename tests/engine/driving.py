"""Drives a runner the way schedulers do, and draws greedily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.batch import Batch, Chunk, Draw, Drawn
from engine.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from engine.batch import Executor

DRAW = Draw(Sampling(temperature=0.0), 0, 0, ())


class Greedy:
    """The most likely token of each row."""

    def sample(
        self, logits: torch.Tensor, draws: Sequence[Draw], request_ids: Sequence[str]
    ) -> list[Drawn]:
        tokens = logits.argmax(-1).tolist()
        return [Drawn(name, token) for name, token in zip(request_ids, tokens, strict=True)]


def chunk(
    name: str, tokens: Sequence[int], start: int, blocks: Sequence[int], *, draw: bool = True
) -> Chunk:
    return Chunk(name, tuple(tokens), start, tuple(blocks), DRAW if draw else None)


def step(executor: Executor, *chunks: Chunk) -> list[int]:
    return [drawn.token for drawn in executor.execute(Batch(chunks)).drawn]


def generate(
    executor: Executor, prompt: Sequence[int], steps: int, blocks: Sequence[int]
) -> list[int]:
    """Greedy tokens of one sequence: the whole prompt, then one token a step."""
    tokens = list(prompt)
    computed = 0
    for _ in range(steps):
        tokens += step(executor, chunk("a", tokens[computed:], computed, blocks))
        computed = len(tokens) - 1
    return tokens[len(prompt) :]
