"""Decode steps that stay on the device draw what the host would have drawn step by step.

The kernels run in Triton's interpreter; in place of a graph the recorded work is done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine.batch import UNREAD, Batch, Chunk, Draw
from engine.checkpoint import open_checkpoint
from engine.clock import VirtualClock
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

    from engine.batch import Collect
    from engine.clock import Clock

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

    def chunk_ahead(self) -> Chunk:
        """The one after that of its last token, before anybody knows what this one draws."""
        here = self.chunk(len(self.tokens))
        assert here.draw is not None
        needed = (len(self.tokens) + 1) // BLOCK_TOKENS + 1
        blocks = tuple(range(self.index * 8, self.index * 8 + needed))
        draw = replace(here.draw, position=here.draw.position + 1)
        return replace(here, tokens=(UNREAD,), blocks=blocks, draw=draw)


def runner_of(directory: Path, ops: TritonOps, clock: Clock | None = None) -> Runner:
    return Runner(
        open_checkpoint(str(directory)),
        sampler=Sampler(tiny.VOCAB),
        blocks=48,
        block_tokens=BLOCK_TOKENS,
        ops=ops,
        clock=clock,
    )


def started(runner: Runner, samplings: Sequence[Sampling] = SAMPLINGS) -> list[Telling]:
    """Sequences whose prompts are in the pool, each with its first token drawn by the host."""
    sequences = []
    for index, sampling in enumerate(samplings):
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


BARE = (SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[4], SAMPLINGS[0])
AHEAD = ((0, 1, 2, 3), (0, 1, 2, 3), (3, 2, 0), (3, 2, 0), (0, 1, 2, 3), *[(1, 2, 3)] * 6)
"""Who takes part in steps that are each launched while the one before it runs; one comes back."""


@dataclass
class Ahead:
    """Launches each step before the tokens of the one before it are read."""

    runner: Runner
    sequences: list[Telling]
    part: tuple[int, ...] = ()
    collect: Collect | None = None

    def launch(self, part: tuple[int, ...]) -> Collect | None:
        assert self.runner.launch is not None
        chunks = [
            one.chunk_ahead() if i in self.part else one.chunk(len(one.tokens) - 1)
            for i, one in ((i, self.sequences[i]) for i in part)
        ]
        return self.runner.launch(Batch(tuple(chunks)))

    def step(self, part: tuple[int, ...]) -> None:
        collect = self.launch(part)
        assert collect is not None
        self.read()
        self.part, self.collect = part, collect

    def read(self) -> None:
        collect, self.part, self.collect = self.collect, (), None
        if collect is not None:
            for drawn in collect().drawn:
                self.sequences[int(drawn.request_id)].tokens.append(drawn.token)


def one_by_one(runner: Runner, sequences: list[Telling], part: tuple[int, ...]) -> None:
    chunks = tuple(sequences[i].chunk(len(sequences[i].tokens) - 1) for i in part)
    for drawn in runner.execute(Batch(chunks)).drawn:
        sequences[int(drawn.request_id)].tokens.append(drawn.token)


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_steps_launched_before_the_last_tokens_were_read_draw_and_store_the_same(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    runner, plain = (runner_of(tiny_checkpoint(family), Staying()) for _ in range(2))
    ahead, sequences = Ahead(runner, started(runner, BARE)), started(plain, BARE)
    for part in AHEAD:
        ahead.step(part)
        one_by_one(plain, sequences, part)
    ahead.read()
    assert [one.tokens for one in ahead.sequences] == [one.tokens for one in sequences]
    assert torch.equal(runner.kv.memory, plain.kv.memory)
    runner.close()
    plain.close()


def test_a_step_that_needs_a_graph_or_another_row_waits_until_the_last_one_was_read(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    runner, plain = (runner_of(tiny_checkpoint("llama3"), Staying()) for _ in range(2))
    ahead, sequences = Ahead(runner, started(runner, BARE)), started(plain, BARE)
    for part, declined in (((0,), False), ((0, 1), True), ((0, 1), False), ((1,), True)):
        if declined:
            assert ahead.launch(part) is None
            ahead.read()
        ahead.step(part)
        one_by_one(plain, sequences, part)
    ahead.step((1,))
    ahead.read()
    one_by_one(plain, sequences, (1,))
    assert [one.tokens for one in ahead.sequences] == [one.tokens for one in sequences]
    runner.close()
    plain.close()


def test_where_steps_do_not_stay_nothing_is_launched_and_other_batches_never_are(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    plain, runner = (runner_of(tiny_checkpoint("llama3"), ops) for ops in (TritonOps(), Staying()))
    assert plain.launch is None
    assert runner.launch is not None
    assert runner.launch(Batch((Telling(0, SAMPLINGS[0], [5, 6]).chunk(0),))) is None
    plain.close()
    runner.close()


def test_who_has_no_finite_logits_is_named_by_its_own_step_and_by_the_one_behind_it(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    runner, plain = (runner_of(tiny_checkpoint("llama3"), Staying()) for _ in range(2))
    ahead, sequences = Ahead(runner, started(runner, BARE)), started(plain, BARE)
    runner.kv.memory.view(torch.float32).view(48, -1)[8] = float("nan")
    ahead.step((0, 1, 2))
    behind = ahead.launch((0, 1, 2))
    assert behind is not None
    with pytest.raises(BadLogits, match=r"not finite for 1$"):
        ahead.read()
    with pytest.raises(BadLogits, match=r"not finite for 1$"):
        behind()
    for _ in range(3):
        one_by_one(runner, ahead.sequences, (0, 2))
        one_by_one(plain, sequences, (0, 2))
    assert [ahead.sequences[i].tokens for i in (0, 2)] == [sequences[i].tokens for i in (0, 2)]
    runner.close()
    plain.close()


def test_a_launch_that_fails_costs_the_step_before_it_nothing(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Staying()
    runner = runner_of(tiny_checkpoint("llama3"), ops)
    plain = runner_of(tiny_checkpoint("llama3"), Staying())
    ahead, sequences = Ahead(runner, started(runner, BARE)), started(plain, BARE)
    ahead.step((0, 1))
    assert ops.steps is not None

    def fail(written: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(ops.steps._rows, "write", fail)
        with pytest.raises(torch.OutOfMemoryError):
            ahead.launch((0, 1))
    ahead.read()
    one_by_one(plain, sequences, (0, 1))
    for part in ((0, 1), (0, 1)):
        ahead.step(part)
        one_by_one(plain, sequences, part)
    ahead.read()
    assert [one.tokens for one in ahead.sequences] == [one.tokens for one in sequences]
    runner.close()
    plain.close()


def test_a_step_behind_another_takes_as_long_as_it_has_the_device_for_itself(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    clock = VirtualClock(10.0)
    runner = runner_of(tiny_checkpoint("llama3"), Staying(), clock)
    ahead = Ahead(runner, started(runner, BARE))
    ahead.step((0, 1))
    collect = ahead.collect
    clock.advance_to(11.0)
    behind = ahead.launch((0, 1))
    assert collect is not None
    assert behind is not None
    clock.advance_to(14.0)
    assert collect().duration_s == 4.0
    clock.advance_to(17.0)
    assert behind().duration_s == 3.0
    runner.close()
