"""Every family's logits on the device agree with transformers' own there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk
from tests.engine.test_model_families import BLOCKS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SPANS = [(0, tiny.PROMPT), *((i, i + 1) for i in range(tiny.PROMPT, tiny.PROMPT + tiny.STEPS))]


def reference_logits(name: str, directory: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """Transformers', of a checkpoint that it saves."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny.make(name, directory).to("cuda")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens], device="cuda")).logits[0].float()
    return logits


def all_logits(directory: Path, tokens: tuple[int, ...], dtype: str) -> list[torch.Tensor]:
    """Of a prompt's last token, then of each single token after it."""
    runner = Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        device="cuda",
        dtype=dtype,
        blocks=len(BLOCKS) + 3,
        block_tokens=4,
    )
    found = []
    for start, end in SPANS:
        logits = runner.logits(Batch((chunk("a", tokens[start:end], start, BLOCKS),)))
        assert logits is not None
        found.append(logits[0].clone())
    runner.close()
    return found


@pytest.mark.parametrize("name", tiny.TINY)
def test_prefill_and_decode_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tokens = tiny.prompt(tiny.PROMPT + tiny.STEPS)
    wanted = reference_logits(name, tmp_path, tokens)
    for (_, end), logits in zip(SPANS, all_logits(tmp_path, tokens, "float32"), strict=True):
        torch.testing.assert_close(logits, wanted[end - 1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma2", "qwen3-moe"])
def test_in_bfloat16_they_point_the_same_way(name: str, tmp_path: Path) -> None:
    tokens = tiny.prompt(tiny.PROMPT + tiny.STEPS)
    wanted = reference_logits(name, tmp_path, tokens)
    for (_, end), logits in zip(SPANS, all_logits(tmp_path, tokens, "bfloat16"), strict=True):
        centred, exact = (each - each.mean() for each in (logits, wanted[end - 1]))
        assert float(torch.cosine_similarity(centred, exact, dim=0)) > 0.98
