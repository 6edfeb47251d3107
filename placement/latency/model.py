"""How long a forward pass takes, whoever says so.

Every model of latency has the same form, so that a run of decode steps sums in closed form:

    step = fixed(tokens, draws) + pair_s * query-key pairs of prompts + read_s * KV tokens read
         + mixed_s where it holds both prompts and decodes
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import ceil, sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Step(NamedTuple):
    """One forward pass in the sums its duration depends on."""

    tokens: int
    draws: int
    pairs: int = 0
    """Query-key pairs of prompt chunks."""
    kv_read_tokens: int = 0
    """Context of every decoding sequence, and what chunks find already computed."""
    mixed: bool = False
    """Whether prompts are computed beside decodes."""


def prefill_step(chunks: Iterable[tuple[int, int]]) -> Step:
    """Prompt chunks as (tokens, tokens of context already computed)."""
    tokens = draws = pairs = read = 0
    for count, context in chunks:
        tokens += count
        draws += 1
        pairs += pairs_of(count, context)
        read += context
    return Step(tokens, draws, pairs, read)


def decode_step(contexts: Iterable[int]) -> Step:
    lengths = list(contexts)
    return Step(len(lengths), len(lengths), 0, sum(lengths))


def mixed_step(chunks: Iterable[tuple[int, int]], contexts: Iterable[int]) -> Step:
    prompt, decode = prefill_step(chunks), decode_step(contexts)
    return Step(
        prompt.tokens + decode.tokens,
        prompt.draws + decode.draws,
        prompt.pairs,
        prompt.kv_read_tokens + decode.kv_read_tokens,
        mixed=prompt.tokens > 0 and decode.tokens > 0,
    )


def pairs_of(count: int, context: int) -> int:
    """Query-key pairs of `count` tokens after `context` others."""
    return count * context + count * (count + 1) // 2


class LatencyModel(ABC):
    """Seconds of one forward pass of one instance, all pipeline stages together."""

    pipeline_parallel: int = 1

    @property
    @abstractmethod
    def pair_s(self) -> float: ...

    @property
    @abstractmethod
    def read_s(self) -> float: ...

    @property
    def mixed_s(self) -> float:
        """What a pass takes longer that has two kinds of work to do one after the other."""
        return 0.0

    @abstractmethod
    def fixed_s(self, tokens: int, draws: int) -> float: ...

    def step_s(self, step: Step) -> float:
        attention_s = self.pair_s * step.pairs + self.read_s * step.kv_read_tokens
        mixed_s = self.mixed_s if step.mixed else 0.0
        return self.fixed_s(step.tokens, step.draws) + attention_s + mixed_s

    def prefill_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        return self.step_s(prefill_step(chunks))

    def decode_s(self, contexts: Iterable[int]) -> float:
        return self.step_s(decode_step(contexts))

    def stage_s(self, step: Step) -> float:
        """How often a full pipeline finishes a pass."""
        return self.step_s(step) / self.pipeline_parallel

    def decode_run_s(self, batch: int, kv_read_tokens: int, steps: int) -> float:
        """`steps` decode steps of an unchanging batch that first reads so many KV tokens."""
        read = steps * kv_read_tokens + batch * (steps * (steps - 1) // 2)
        return steps * self.fixed_s(batch, batch) + self.read_s * read

    def outside(self, tokens: int, kv_read_tokens: int) -> tuple[str, ...]:
        """What of a pass so large lies beyond what was measured, in words; empty if nothing."""
        del tokens, kv_read_tokens
        return ()


def steps_to_reach(span_s: float, first_step_s: float, growth_s: float) -> int:
    """The fewest steps (at least 1) that last `span_s`, each `growth_s` longer than the last."""
    if span_s <= first_step_s:
        return 1
    linear = first_step_s - growth_s / 2
    if growth_s > 0:
        steps = (sqrt(linear * linear + 2 * growth_s * span_s) - linear) / growth_s
    else:
        steps = span_s / first_step_s
    count = max(1, ceil(steps) - 1)
    while count * first_step_s + growth_s * (count * (count - 1) / 2) < span_s:
        count += 1
    return count
