"""Decode steps repeated as one call give what the layers give, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.kernels import NativeOps
from engine.native_library import load_library
from engine.replay import MOST_ROWS, Replays, Workspace
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import Chunk

LIBRARY = load_library()
SETS = () if LIBRARY is None else LIBRARY.instruction_sets
BLOCK_TOKENS = 4
PROMPTS = [tiny.prompt(count, seed=count) for count in (3, 9, 14, 6)]
STEPS_OF = (4, 4, 1, 3, 4, 2, 4, 4, 1, 4)
"""How many of the sequences take part in each step; their tables grow past powers of two."""

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native kernels were built")


class Native(NativeOps):
    """Lets tests see what was written down, or has nothing repeated."""

    def __init__(self, name: str, *, repeating: bool) -> None:
        assert LIBRARY is not None
        super().__init__(LIBRARY, 1, name)
        self.repeating, self.made = repeating, super().repeats()

    @property
    def written_steps(self) -> int:
        assert self.made is not None
        return len(self.made)

    def repeats(self) -> Replays | None:
        return self.made if self.repeating else None

    def ragged_repeats(self) -> None:
        return None


def table(index: int) -> range:
    return range(index * 8, index * 8 + 8)


def prompts() -> tuple[Chunk, ...]:
    return tuple(chunk(str(i), each, 0, table(i)) for i, each in enumerate(PROMPTS))


def decode_step(lengths: list[int], count: int) -> tuple[Chunk, ...]:
    """The next token of the first sequences, each with no more blocks than it needs."""
    chunks = []
    for i in range(count):
        at = lengths[i]
        blocks = table(i)[: at // BLOCK_TOKENS + 1]
        chunks.append(chunk(str(i), [(7 * at + i) % tiny.VOCAB], at, blocks))
        lengths[i] += 1
    return tuple(chunks)


def run(directory: Path, dtype: str, ops: NativeOps) -> list[torch.Tensor]:
    runner = Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        blocks=40,
        block_tokens=BLOCK_TOKENS,
        dtype=dtype,
        ops=ops,
    )
    runner.logits(Batch(prompts()))
    lengths = [len(each) for each in PROMPTS]
    rows = [runner.logits(Batch(decode_step(lengths, count))) for count in STEPS_OF]
    runner.close()
    return [each for each in rows if each is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(tiny.TINY))
def test_a_repeated_step_gives_what_the_layers_give(
    family: str, dtype: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    directory = tiny_checkpoint(family)
    repeating = Native(SETS[0], repeating=True)
    repeated = run(directory, dtype, repeating)
    wanted = run(directory, dtype, Native(SETS[0], repeating=False))
    assert len(repeated) == len(wanted) == len(STEPS_OF)
    assert all(torch.equal(a, b) for a, b in zip(repeated, wanted, strict=True))
    assert (repeating.written_steps == 0) == (family in tiny.NOT_REPEATED)


@pytest.mark.parametrize("instruction_set", SETS)
def test_steps_alike_are_written_down_once(
    instruction_set: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    ops = Native(instruction_set, repeating=True)
    repeated = run(tiny_checkpoint("llama3"), "bfloat16", ops)
    wanted = run(tiny_checkpoint("llama3"), "bfloat16", Native(instruction_set, repeating=False))
    assert all(torch.equal(a, b) for a, b in zip(repeated, wanted, strict=True))
    assert ops.written_steps < len(STEPS_OF)


def test_groups_of_layers_are_told_of_a_repeated_step(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    ops = Native(SETS[0], repeating=True)
    runner = Runner(
        open_checkpoint(str(tiny_checkpoint("gemma3"))), sampler=Greedy(), blocks=8, ops=ops
    )
    for place in range(3):
        told: list[int] = []
        runner.execute(Batch((chunk("a", [5 + place], place, [0]),)), told.append)
        assert told == [0, 1, 2, 3]
    assert ops.written_steps == 1
    runner.close()


def test_a_step_of_very_many_sequences_is_not_written_down(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    ops = Native(SETS[0], repeating=True)
    count = MOST_ROWS + 1
    runner = Runner(
        open_checkpoint(str(tiny_checkpoint("llama3"))), sampler=Greedy(), blocks=count, ops=ops
    )
    batch = Batch(tuple(chunk(str(i), [3 + i % 100], 0, [i]) for i in range(count)))
    assert len(runner.execute(batch).drawn) == count
    assert ops.written_steps == 0
    runner.close()


def test_memory_that_a_tensor_refers_to_is_not_given_again() -> None:
    workspace = Workspace()
    views: list[torch.Tensor] = []
    for value in range(40):
        whole = workspace.take((4, 8 + 5 * value), dtype=torch.float32)
        whole.fill_(value)
        views.append(whole[1:, 3:].view(torch.int32).view(torch.float32))
        if value % 3 == 2:
            views[value - 1] = torch.full((1, 1), float(value - 1))
    assert all(bool((view == value).all()) for value, view in enumerate(views))


def test_memory_that_nothing_refers_to_is_given_again() -> None:
    workspace = Workspace()
    places = set()
    for _ in range(8):
        made = workspace.take((3, 16), dtype=torch.bfloat16)
        places.add(made.data_ptr())
        del made
    assert len(places) == 1
