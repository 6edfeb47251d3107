"""Which graphs of decode steps are made, and how batches are filled up to their sizes.

The recorded work is done again in place of a graph. tests/gpu records graphs for real.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine import cuda_graphs
from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.cuda_graphs import LEAST_WIDTH, CudaGraphs
from engine.runner import Runner
from engine.triton_ops import TritonOps
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk, generate
from tests.engine.ranks import leading
from tests.engine.repeating import Repeating

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import Chunk

BLOCK_TOKENS = 4
PROMPTS = [tiny.prompt(count, seed=count) for count in (3, 9, 14)]
STEPS_OF = (3, 1, 3)
"""How many of the sequences take part in each step."""


def runner_of(directory: Path, ops: TritonOps, blocks: int = 40) -> Runner:
    return Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        ops=ops,
    )


def table(index: int) -> range:
    return range(index * 8, index * 8 + 8)


def decode_step(lengths: list[int], count: int) -> tuple[Chunk, ...]:
    chunks = tuple(
        chunk(str(i), [(7 * at + i) % tiny.VOCAB], at, table(i)[: at // BLOCK_TOKENS + 1])
        for i, at in enumerate(lengths[:count])
    )
    lengths[:count] = [at + 1 for at in lengths[:count]]
    return chunks


def run(directory: Path, ops: TritonOps) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of some steps, and the pool that they leave."""
    runner = runner_of(directory, ops)
    runner.logits(Batch(tuple(chunk(str(i), p, 0, table(i)) for i, p in enumerate(PROMPTS))))
    lengths = [len(each) for each in PROMPTS]
    rows = [runner.logits(Batch(decode_step(lengths, count))) for count in STEPS_OF]
    pool = runner.kv.memory.clone()
    runner.close()
    return [each for each in rows if each is not None], pool


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2", "opt-350m"])
def test_a_graph_gives_what_the_layers_give_and_fills_up_without_a_trace(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    ops, directory = Repeating(), tiny_checkpoint(family)
    repeated, pool = run(directory, ops)
    wanted, plain_pool = run(directory, TritonOps())
    for got, exact in zip(repeated, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    kept, exact_kept = pool.view(torch.float32), plain_pool.view(torch.float32)
    torch.testing.assert_close(kept, exact_kept, rtol=1e-5, atol=1e-5)
    sizes = {1 << (count - 1).bit_length() for count in STEPS_OF}
    assert len(ops.graphs) == len(sizes)


def test_a_longer_table_takes_another_graph(tiny_checkpoint: Callable[[str], Path]) -> None:
    ops = Repeating()
    runner = runner_of(tiny_checkpoint("llama3"), ops, blocks=LEAST_WIDTH + 8)
    for blocks in (1, LEAST_WIDTH, LEAST_WIDTH + 1):
        runner.logits(Batch((chunk("a", [5], 0, range(blocks)),)))
    assert len(ops.graphs) == 2
    runner.close()


@pytest.mark.parametrize(("tensor_size", "stages"), [(2, 1), (2, 2)])
def test_tensor_ranks_repeat_their_sums_with_the_layers(
    tensor_size: int, stages: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, prompt, blocks = tiny_checkpoint("qwen3"), tiny.prompt(9), range(8)
    alone = runner_of(directory, TritonOps())
    wanted = generate(alone, prompt, 6, blocks)
    alone.close()
    shape = {"tensor_size": tensor_size, "stages": stages}
    with leading(directory, tmp_path / "meet", repeating=True, **shape) as (executor, followers):
        assert generate(executor, prompt, 6, blocks) == wanted
        graphs = executor.runner._decoder._repeats
        assert isinstance(graphs, CudaGraphs)
        assert len(graphs) == 1
        executor.close()
    assert [follower.exitcode for follower in followers] == [0] * len(followers)


def test_layers_that_ask_the_host_are_not_recorded(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    ops = Repeating()
    runner = runner_of(tiny_checkpoint("mixtral"), ops)
    assert runner.logits(Batch((chunk("a", [5], 0, [0]),))) is not None
    assert len(ops.graphs) == 0
    runner.close()


def test_a_step_of_very_many_sequences_is_not_recorded(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_ROWS", 2)
    ops = Repeating()
    runner = runner_of(tiny_checkpoint("llama3"), ops)
    batch = Batch(tuple(chunk(str(i), [3 + i], 0, [i]) for i in range(3)))
    assert len(runner.execute(batch).drawn) == 3
    assert len(ops.graphs) == 0
    runner.close()
