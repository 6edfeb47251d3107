"""Decode steps that stay on the device as real graphs, against the host's draws of each step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import UNREAD, Batch, Chunk, Draw
from engine.checkpoint import open_checkpoint
from engine.cuda_ops import CudaOps
from engine.request import Sampling
from engine.runner import Runner
from engine.sampler import Sampler
from tests.engine import tiny
from tests.engine.conftest import tiny_checkpoint  # noqa: F401  # a fixture
from tests.engine.judging import allows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SEQUENCES, BLOCK_TOKENS = 5, 16
SAMPLINGS = [Sampling(temperature=i % 3 / 2, seed=i - 2) for i in range(SEQUENCES)]
STEPS_OF = (5, 5, 3, 1, 4, 5, 5)
STEPS = 40


def runner_of(directory: Path) -> Runner:
    return Runner(
        open_checkpoint(str(directory)),
        sampler=Sampler(tiny.VOCAB),
        device="cuda",
        blocks=SEQUENCES * 8,
        block_tokens=BLOCK_TOKENS,
        ops=CudaOps(),
    )


def chunk(index: int, tokens: list[int], computed: int, place: int) -> Chunk:
    table = tuple(range(index * 8, index * 8 + len(tokens) // BLOCK_TOKENS + 1))
    draw = Draw(SAMPLINGS[index], place, 1, ())
    return Chunk(str(index), tuple(tokens[computed:]), computed, table, draw)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2", "opt"])
def test_steps_draw_what_their_logits_allow(
    family: str,
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    runner, plain = (runner_of(tiny_checkpoint(family)) for _ in range(2))
    tokens = [list(tiny.prompt(12 + i, seed=i)) for i in range(SEQUENCES)]
    prompts = Batch(tuple(chunk(i, each, 0, 0) for i, each in enumerate(tokens)))
    plain.logits(prompts)
    for each, drawn in zip(tokens, runner.execute(prompts).drawn, strict=True):
        each.append(drawn.token)
    for place, count in enumerate(STEPS_OF, start=1):
        chunks = tuple(chunk(i, tokens[i], len(tokens[i]) - 1, place) for i in range(count))
        logits = plain.logits(Batch(chunks))
        assert logits is not None
        for row, drawn in enumerate(runner.execute(Batch(chunks)).drawn):
            draw = chunks[row].draw
            assert draw is not None
            assert allows(logits[row, : tiny.VOCAB].cpu(), draw, drawn.token)
            tokens[row].append(drawn.token)
    kept, exact = runner.kv.memory.view(torch.float32), plain.kv.memory.view(torch.float32)
    torch.testing.assert_close(kept, exact, rtol=1e-4, atol=1e-4)
    runner.close()
    plain.close()


def behind(index: int, tokens: list[int], place: int) -> Chunk:
    """The chunk after that of the last token, before anybody knows what this one draws."""
    one = chunk(index, [*tokens, UNREAD], len(tokens), place)
    return replace(one, blocks=tuple(range(index * 8, index * 8 + 8)))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_steps_launched_before_the_last_tokens_were_read_draw_the_same(
    family: str,
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    runner, plain = (runner_of(tiny_checkpoint(family)) for _ in range(2))
    ahead, tokens = ([list(tiny.prompt(12 + i, seed=i)) for i in range(SEQUENCES)] for _ in "ab")
    assert runner.launch is not None
    for one, told in ((runner, ahead), (plain, tokens)):
        drawn = one.execute(Batch(tuple(chunk(i, each, 0, 0) for i, each in enumerate(told)))).drawn
        for each, token in zip(told, drawn, strict=True):
            each.append(token.token)
    under_way = None
    for place in range(1, STEPS + 1):
        known = tuple(chunk(i, each, len(each) - 1, place) for i, each in enumerate(tokens))
        for each, token in zip(tokens, plain.execute(Batch(known)).drawn, strict=True):
            each.append(token.token)
        if under_way is None:
            chunks = [chunk(i, each, len(each) - 1, place) for i, each in enumerate(ahead)]
        else:
            chunks = [behind(i, each, place) for i, each in enumerate(ahead)]
        launched = runner.launch(Batch(tuple(chunks)))
        assert launched is not None
        for each, token in zip(ahead, under_way().drawn if under_way else (), strict=False):
            each.append(token.token)
        under_way = launched
    assert under_way is not None
    for each, token in zip(ahead, under_way().drawn, strict=True):
        each.append(token.token)
    assert ahead == tokens
    assert torch.equal(runner.kv.memory, plain.kv.memory)
    runner.close()
    plain.close()
