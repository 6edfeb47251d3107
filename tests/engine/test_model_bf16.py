"""In bf16 the likeliest token is that of fp32, wherever fp32 tells two tokens apart.

Random weights give almost flat logits: in some rows the two best differ by less than both may be
off once rounded to bf16, and no bf16 program can order those. They are left out; of the others,
99 of 100 must agree. Both models hold the same weights, saved in bf16.

The honest yardstick of the rest is transformers' own bf16, on the same checkpoints: our logits must
lie no further from its fp32, and must name the likeliest token no less often.

A router with random weights is nearly undecided too, and a token that rounding sends to another
expert ends elsewhere altogether, so models with experts are asked for 98.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS, BLOCKS_EACH = 400, 5
ROUNDINGS = 2 * 2.0**-7
"""Neighbouring bf16 numbers differ by up to 2**-7 of their size; two logits are compared."""


LUCK = 0.01
"""Of 400 prompts some four are near ties that fall either way in either program."""


def prompt(index: int) -> list[int]:
    return tiny.prompt(4 + index % 17, seed=index)


@torch.inference_mode()
def transformers_logits(directory: Path, dtype: str) -> torch.Tensor:
    """Of the last position of each prompt, those of one length together."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    alike = defaultdict(list)
    for index in range(PROMPTS):
        alike[len(prompt(index))].append(index)
    logits = torch.empty(PROMPTS, tiny.VOCAB)
    for indices in alike.values():
        ids = torch.tensor([prompt(index) for index in indices])
        logits[indices] = model(ids).logits[:, -1, : tiny.VOCAB].float()
    return logits


def logits_of(directory: Path, dtype: str) -> torch.Tensor:
    runner = Runner(
        open_checkpoint(str(directory)),
        sampler=Greedy(),
        blocks=PROMPTS * BLOCKS_EACH,
        block_tokens=4,
        dtype=dtype,
    )
    chunks = [chunk(str(i), prompt(i), 0, range(5 * i, 5 * i + 5)) for i in range(PROMPTS)]
    logits = runner.logits(Batch(tuple(chunks)))
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", tiny.TINY)
def test_bf16_agrees_with_fp32_on_the_likeliest_token(name: str, tmp_path: Path) -> None:
    tiny.make(name, tmp_path, dtype="bfloat16")
    exact, rounded = logits_of(tmp_path, "float32"), logits_of(tmp_path, "bfloat16")
    first, second = exact.topk(2).values.unbind(-1)
    sure = first - second > ROUNDINGS * exact.abs().amax(-1)
    agree = (exact.argmax(-1) == rounded.argmax(-1)).float()
    assert sure.float().mean() > 0.75
    experts = open_checkpoint(str(tmp_path)).config.moe
    assert agree[sure].mean() >= (0.99 if experts is None else 0.98)


@pytest.mark.parametrize("name", tiny.TINY)
def test_bf16_is_no_further_from_fp32_than_that_of_transformers(name: str, tmp_path: Path) -> None:
    tiny.make(name, tmp_path, dtype="bfloat16")
    exact = transformers_logits(tmp_path, "float32")
    theirs, ours = transformers_logits(tmp_path, "bfloat16"), logits_of(tmp_path, "bfloat16")

    def agreement(logits: torch.Tensor) -> float:
        return (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()

    def distance(logits: torch.Tensor) -> float:
        return (logits - exact).abs().mean().item()

    told = f"ours {agreement(ours):.2%} theirs {agreement(theirs):.2%}"
    assert agreement(ours) >= agreement(theirs) - LUCK, told
    assert distance(ours) <= distance(theirs), told
