"""Decode steps that stay on the device draw what the host would have drawn step by step.

The kernels run in Triton's interpreter; in place of a graph the recorded work is done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine.batch import Batch, Chunk, Draw
from engine.checkpoint import open_checkpoint
from engine.errors import BadLogits
from engine.request import Sampling
from engine.runner import Runner
from engine.sampler import Sampler
from engine.triton_ops import TritonOps
from engine.whole_steps import WholeSteps
from tests.engine import tiny
from tests.engine.judging import allows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

BLOCK_TOKENS = 4
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, seed=11),
    Sampling(temperature=0.0, repetition_penalty=1.7, logprobs=2),
    Sampling(temperature=1.0, top_p=1e-6, seed=3),
    Sampling(temperature=1.3, seed=-4),
)
"""What the device draws, and what the host must."""
STEPS_OF = ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (4, 2, 0), (4, 2, 0), (1,), (0, 1, 2, 3, 4))
"""Which sequences take part in each step."""


def done_again(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
    made = work()
    return made, lambda: made.copy_(work())


class Staying(TritonOps):
    """Lets tests see the steps, and what was computed again and again."""

    def __init__(self) -> None:
        self.steps: WholeSteps | None = None
        self.logits_of: Callable[..., torch.Tensor] | None = None

    def whole_steps(self, logits_of: Any, sampler: Sampler, **size: Any) -> WholeSteps:
        self.steps = WholeSteps(logits_of, sampler, record=done_again, **size)
        return self.steps


@dataclass
class Telling:
    """One sequence and the tokens that it has."""

    index: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0

    def chunk(self, computed: int) -> Chunk:
        history = tuple(self.tokens) if self.sampling.reads_history else ()
        place = len(self.tokens) - self.prompt_tokens
        draw = Draw(self.sampling, place, self.prompt_tokens, history)
        needed = len(self.tokens) // BLOCK_TOKENS + 1
        blocks = tuple(range(self.index * 8, self.index * 8 + needed))
        return Chunk(str(self.index), tuple(self.tokens[computed:]), computed, blocks, draw)


def runner_of(directory: Path, ops: TritonOps) -> Runner:
    return Runner(
        open_checkpoint(str(directory)),
        sampler=Sampler(tiny.VOCAB),
        blocks=48,
        block_tokens=BLOCK_TOKENS,
        ops=ops,
    )


def started(runner: Runner) -> list[Telling]:
    """Sequences whose prompts are in the pool, each with its first token drawn by the host."""
    sequences = []
    for index, sampling in enumerate(SAMPLINGS):
        prompt = list(tiny.prompt(3 + 3 * index, seed=index))
        sequences.append(Telling(index, sampling, prompt, len(prompt)))
    batch = Batch(tuple(each.chunk(0) for each in sequences))
    for each, drawn in zip(sequences, runner.execute(batch).drawn, strict=True):
        each.tokens.append(drawn.token)
    return sequences


@pytest.mark.parametrize("family", ["llama3", "gemma2", "opt-350m"])
def test_sequences_come_and_go_and_draw_as_from_the_logits_of_each_step(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    ops, plain = Staying(), runner_of(tiny_checkpoint(family), TritonOps())
    runner = runner_of(tiny_checkpoint(family), ops)
    sequences = started(runner)
    started(plain)
    for part in STEPS_OF:
        chunks = tuple(sequences[i].chunk(len(sequences[i].tokens) - 1) for i in part)
        logits = plain.logits(Batch(chunks))
        assert logits is not None
        judged = logits[:, : tiny.VOCAB].clone()
        host = Sampler(tiny.VOCAB)
        for row, (one, drawn) in enumerate(
            zip(chunks, runner.execute(Batch(chunks)).drawn, strict=True)
        ):
            assert one.draw is not None
            assert drawn.request_id == one.request_id
            if host.is_bare(one.draw):
                assert allows(judged[row], one.draw, drawn.token)
            else:
                (wanted,) = host.sample(judged[row : row + 1].clone(), [one.draw], ["r"])
                assert drawn.token == wanted.token
                assert (drawn.logprobs is None) == (wanted.logprobs is None)
            sequences[int(one.request_id)].tokens.append(drawn.token)
    assert ops.steps is not None
    assert len(ops.steps) == len({1 << (len(part) - 1).bit_length() for part in STEPS_OF})
    kept, exact = runner.kv.memory.view(torch.float32), plain.kv.memory.view(torch.float32)
    torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-5)
    runner.close()
    plain.close()


def test_a_sequence_that_goes_on_is_not_sent_to_the_device_again(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Staying()
    runner = runner_of(tiny_checkpoint("llama3"), ops)
    greedy = Telling(0, SAMPLINGS[0], list(tiny.prompt(5)), 5)
    greedy.tokens.append(runner.execute(Batch((greedy.chunk(0),))).drawn[0].token)
    assert ops.steps is not None
    sent: list[int] = []
    write = ops.steps._rows.write

    def counted(written: Sequence[tuple[int, Chunk | None]]) -> None:
        sent.append(len(written))
        write(written)

    monkeypatch.setattr(ops.steps._rows, "write", counted)
    for _ in range(8):
        one = greedy.chunk(len(greedy.tokens) - 1)
        greedy.tokens.append(runner.execute(Batch((one,))).drawn[0].token)
    newcomer_then_two_blocks = [1, 0, 1, 0, 0, 0, 1, 0]
    assert sent == newcomer_then_two_blocks
    runner.close()


def test_all_layer_groups_are_told_after_a_whole_step(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    runner = runner_of(tiny_checkpoint("llama3"), Staying())
    told: list[int] = []
    runner.execute(Batch((Telling(0, SAMPLINGS[0], [5]).chunk(0),)), told.append)
    assert told == [0, 1]
    runner.close()


@pytest.mark.parametrize("family", ["mixtral", "llama3"])
def test_other_batches_and_models_that_ask_the_host_go_their_usual_way(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    ops = Staying()
    runner = runner_of(tiny_checkpoint(family), ops)
    first, second = (Telling(i, SAMPLINGS[0], list(tiny.prompt(4, seed=i)), 4) for i in range(2))
    undrawn = replace(second.chunk(0), draw=None)
    assert len(runner.execute(Batch((first.chunk(0),))).drawn) == 1
    assert len(runner.execute(Batch((first.chunk(3), undrawn))).drawn) == 1
    assert ops.steps is None if family == "mixtral" else len(ops.steps or ()) == 0
    runner.close()


def test_who_has_no_finite_logits_is_named_and_the_others_may_go_on(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    runner = runner_of(tiny_checkpoint("llama3"), Staying())
    sequences = started(runner)
    pool = runner.kv.memory.view(torch.float32).view(48, -1)
    pool[8] = float("nan")
    batch = Batch(tuple(each.chunk(len(each.tokens) - 1) for each in sequences[:3]))
    with pytest.raises(BadLogits, match=r"not finite for 1$"):
        runner.execute(batch)
    assert len(runner.execute(Batch(batch.chunks[::2])).drawn) == 2
    runner.close()
