"""Every family's logits agree with transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.kernels import cpu_ops
from engine.ops import TorchOps
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from pathlib import Path

    from engine.ops import Ops

BLOCKS = (7, 3, 11, 0, 14, 5, 9, 2, 12, 1, 6, 8, 4)
"""A table in no order: 13 blocks of 4 tokens hold prompt and output."""


@pytest.mark.parametrize("name", tiny.TINY)
def test_prefill_and_decode_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = tiny.make(name, tmp_path)
    tokens = tiny.prompt(tiny.PROMPT + tiny.STEPS)
    with torch.inference_mode():
        wanted = reference(torch.tensor([tokens])).logits[0].float()
    for ops in (TorchOps(), cpu_ops(threads=1)):
        check_logits(tmp_path, ops, tokens, wanted)


def check_logits(directory: Path, ops: Ops, tokens: tuple[int, ...], wanted: torch.Tensor) -> None:
    runner = Runner(
        open_checkpoint(str(directory)), sampler=Greedy(), blocks=16, block_tokens=4, ops=ops
    )
    spans = [(0, tiny.PROMPT)] + [(i, i + 1) for i in range(tiny.PROMPT, len(tokens))]
    for start, end in spans:
        logits = runner.logits(Batch((chunk("a", tokens[start:end], start, BLOCKS),)))
        assert logits is not None
        torch.testing.assert_close(logits[0], wanted[end - 1], atol=1e-4, rtol=0)
