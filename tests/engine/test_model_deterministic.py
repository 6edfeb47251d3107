"""With `deterministic`, logits are the same to the bit however a sequence was batched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.rowwise import RowwiseOps
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import Chunk

TOKENS = tiny.prompt(37)
TABLE, OTHER = tuple(range(10)), tuple(range(10, 20))
NEIGHBOURS = tuple(
    chunk(str(i), tiny.prompt(3 + 5 * i, seed=i), 0, range(20 + 8 * i, 28 + 8 * i))
    for i in range(6)
)

runners = pytest.mark.parametrize(
    ("name", "dtype", "ops"),
    [
        (name, dtype, ops)
        for name in ("llama3", "gemma2", "qwen3-moe", "gpt2")
        for dtype in ("float32", "bfloat16")
        for ops in (None, RowwiseOps())
    ],
)


def last_row(runner: Runner, *chunks: Chunk) -> torch.Tensor:
    logits = runner.logits(Batch(chunks))
    assert logits is not None
    return logits[-1]


@runners
def test_logits_do_not_depend_on_the_batch(
    name: str, dtype: str, ops: RowwiseOps | None, tiny_checkpoint: Callable[[str], Path]
) -> None:
    runner = Runner(
        open_checkpoint(str(tiny_checkpoint(name))),
        sampler=Greedy(),
        blocks=80,
        block_tokens=4,
        dtype=dtype,
        deterministic=True,
        ops=ops,
    )
    wanted = last_row(runner, chunk("a", TOKENS, 0, TABLE))
    last_row(runner, *NEIGHBOURS, chunk("a", TOKENS[:11], 0, OTHER))
    last_row(runner, *NEIGHBOURS[2:], chunk("a", TOKENS[11:30], 11, OTHER))
    for place in range(30, 37):
        row = last_row(
            runner, *NEIGHBOURS[: place % 5], chunk("a", TOKENS[place : place + 1], place, OTHER)
        )
    assert torch.equal(row, wanted)
