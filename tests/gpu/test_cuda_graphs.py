"""Decode steps as real CUDA graphs, against the same steps launched one kernel at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.cuda_graphs import CudaGraphs
from engine.cuda_ops import CudaOps
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.conftest import tiny_checkpoint  # noqa: F401  # a fixture
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.ops import Repeats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
BLOCK_TOKENS = 16
SEQUENCES = 5


class Counted(CudaOps):
    """Lets tests see the graphs, or has none made."""

    def __init__(self, *, repeating: bool) -> None:
        super().__init__()
        self.graphs = CudaGraphs() if repeating else None

    def repeats(self) -> Repeats | None:
        return self.graphs


def decoded(directory: Path, ops: CudaOps) -> list[torch.Tensor]:
    """Logits of steps of changing size, after a prompt of each sequence."""
    runner = Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        device="cuda",
        blocks=SEQUENCES * 8,
        block_tokens=BLOCK_TOKENS,
        ops=ops,
    )
    tables = [range(i * 8, i * 8 + 8) for i in range(SEQUENCES)]
    prompts = [tiny.prompt(10 + i, seed=i) for i in range(SEQUENCES)]
    runner.logits(Batch(tuple(chunk(str(i), p, 0, tables[i]) for i, p in enumerate(prompts))))
    lengths, rows = [len(prompt) for prompt in prompts], list[torch.Tensor]()
    for count in (5, 3, 1, 5, 4, 5):
        chunks = tuple(chunk(str(i), [7 + i], lengths[i], tables[i]) for i in range(count))
        lengths[:count] = [at + 1 for at in lengths[:count]]
        logits = runner.logits(Batch(chunks))
        assert logits is not None
        rows.append(logits.clone())
    runner.close()
    return rows


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2", "mistral", "phi3", "opt", "gpt2"])
def test_a_graph_gives_what_the_layers_give(
    family: str,
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    graphed = Counted(repeating=True)
    got = decoded(tiny_checkpoint(family), graphed)
    wanted = decoded(tiny_checkpoint(family), Counted(repeating=False))
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert graphed.graphs is not None
    assert len(graphed.graphs) == 3
