"""Batches of prompts beside decodes, repeated layer by layer, give what the layers give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.kernels import NativeOps
from engine.native_library import load_library
from engine.ragged_replay import LEAST_ROWS, MOST_ROWS, RaggedReplays, read_script
from engine.replay import WrittenCalls
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
LENGTHS = (30, 9, 70, 17, 41)
STEPS = (
    ((0, 30), (1, 4)),
    ((1, 5), (0, 1), (2, 11)),
    ((0, 1), (1, 1), (2, 59), (3, 16)),
    ((3, 1), (4, 40), (0, 1), (2, 1), (1, 1)),
    ((4, 1), (0, 1)),
    ((0, 1), (1, 2), (2, 1)),
)
"""Which sequences take part in each batch, and with how many tokens."""

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native kernels were built")


class Native(NativeOps):
    """Repeats no decode steps, so that every batch comes our way; or repeats nothing."""

    def __init__(self, name: str, *, repeating: bool) -> None:
        assert LIBRARY is not None
        super().__init__(LIBRARY, 1, name)
        self.repeating = repeating
        self.made = RaggedReplays(LIBRARY, self.writing_down)

    def repeats(self) -> None:
        return None

    def ragged_repeats(self) -> RaggedReplays | None:
        return self.made if self.repeating else None


def batches() -> list[Batch]:
    prompts = [tiny.prompt(count + 8, seed=count) for count in LENGTHS]
    at = [0] * len(LENGTHS)
    made = []
    for step in STEPS:
        chunks: list[Chunk] = []
        for which, count in step:
            start, end = at[which], at[which] + count
            blocks = range(which * 20, which * 20 + -(-end // BLOCK_TOKENS))
            chunks.append(chunk(str(which), prompts[which][start:end], start, blocks))
            at[which] = end
        made.append(Batch(tuple(chunks)))
    return made


def run(directory: Path, dtype: str, ops: NativeOps) -> list[torch.Tensor]:
    runner = Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        blocks=100,
        block_tokens=BLOCK_TOKENS,
        dtype=dtype,
        ops=ops,
    )
    # A second round over the same blocks meets rooms that the first has written down.
    logits = [runner.logits(batch) for batch in batches() * 2]
    runner.close()
    return [each for each in logits if each is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(tiny.TINY))
def test_a_repeated_batch_gives_what_the_layers_give(
    family: str, dtype: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    directory = tiny_checkpoint(family)
    repeating = Native(SETS[0], repeating=True)
    repeated = run(directory, dtype, repeating)
    wanted = run(directory, dtype, Native(SETS[0], repeating=False))
    assert len(repeated) == len(wanted) == 2 * len(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(repeated, wanted, strict=True))
    assert (len(repeating.made) == 0) == (family in tiny.NOT_REPEATED)


@pytest.mark.parametrize("instruction_set", SETS)
def test_batches_that_fit_one_room_are_written_down_once(
    instruction_set: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    ops = Native(instruction_set, repeating=True)
    repeated = run(tiny_checkpoint("llama3"), "bfloat16", ops)
    wanted = run(tiny_checkpoint("llama3"), "bfloat16", Native(instruction_set, repeating=False))
    assert all(torch.equal(a, b) for a, b in zip(repeated, wanted, strict=True))
    assert len(ops.made) < len(STEPS)


def test_groups_of_layers_are_told_in_their_order(tiny_checkpoint: Callable[[str], Path]) -> None:
    ops = Native(SETS[0], repeating=True)
    runner = Runner(
        open_checkpoint(str(tiny_checkpoint("gemma3"))), sampler=Greedy(), blocks=8, ops=ops
    )
    for place in range(3):
        told: list[int] = []
        runner.execute(Batch((chunk("a", [5, 6], 2 * place, [0]),)), told.append)
        assert told == [0, 1, 2, 3]
    assert len(ops.made) == 1
    runner.close()


def test_a_batch_of_very_many_tokens_is_not_written_down(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    ops = Native(SETS[0], repeating=True)
    count = MOST_ROWS // 8 + 1
    runner = Runner(
        open_checkpoint(str(tiny_checkpoint("llama3"))), sampler=Greedy(), blocks=count, ops=ops
    )
    many = tuple(chunk(str(i), [3 + i % 100] * 8, 0, [i]) for i in range(count))
    assert len(runner.execute(Batch(many)).drawn) == count
    assert len(ops.made) == 0
    runner.execute(Batch(many[: LEAST_ROWS // 8]))
    assert len(ops.made) == 1
    runner.close()


def test_calls_that_count_something_else_are_not_repeated() -> None:
    assert LIBRARY is not None
    written = WrittenCalls(LIBRARY)
    x = torch.ones(6, 8)
    ops = NativeOps(LIBRARY, 1, SETS[0])
    with ops.writing_down(written, torch.empty):
        ops.rms_norm(x, torch.ones(8), 1e-6)
    calls = written.calls
    assert read_script(calls, [len(calls)], 6, 2) is not None
    assert read_script(calls, [len(calls)], 3, 2) is None
