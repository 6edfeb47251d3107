"""Times forward passes of an executor whose pool is nobody's yet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster.profiling.passes import profile_entry, usual
from engine.batch import Batch, Chunk, Draw
from engine.blocks import blocks_for
from engine.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.profiling.passes import Pass
    from engine.batch import Executor

GREEDY = Sampling(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)


class PassTimer:
    """Gives the blocks of the pool out anew to each pass, from the first on."""

    def __init__(
        self, executor: Executor, blocks: int, block_tokens: int, vocab: int, *, alone: bool = False
    ) -> None:
        """`alone` counts no time for which others had the processor: it must be the only one."""
        self._executor, self._blocks, self._block_tokens = executor, blocks, block_tokens
        self._vocab, self._alone = vocab, alone

    def holds(self, one: Pass) -> bool:
        needed = sum(blocks_for(sum(length), self._block_tokens) for length in one.lengths)
        return needed <= self._blocks

    def run(
        self, passes: Sequence[Pass], rounds: int, progress: Callable[[int], None]
    ) -> list[float]:
        """Rounds take the passes in turn, so that noise falls on all alike."""
        seconds: list[list[float]] = [[] for _ in passes]
        for turn in range(rounds + 1):
            for number, one in enumerate(passes):
                lasted_s = self.once(one)
                if turn:  # the first round only warms up
                    seconds[number].append(lasted_s)
                progress(turn * len(passes) + number + 1)
        return [usual(times) for times in seconds]

    def once(self, one: Pass) -> float:
        batch = self._batch(one)
        began_s = time.process_time()
        duration_s = self._executor.execute(batch).duration_s
        return min(duration_s, time.process_time() - began_s) if self._alone else duration_s

    def _batch(self, one: Pass) -> Batch:
        chunks, given = [], 0
        for number, (count, start) in enumerate(one.lengths):
            needed = blocks_for(count + start, self._block_tokens)
            blocks = tuple(range(given, given + needed))
            given += needed
            tokens = tuple((number * 7919 + i * 104_729) % self._vocab for i in range(count))
            draw = Draw(GREEDY, 0, start + count, ())
            chunks.append(Chunk(str(number), tokens, start, blocks, draw))
        return Batch(tuple(chunks))


def samples_of(
    passes: Sequence[Pass], seconds: Sequence[float]
) -> dict[str, list[dict[str, float]]]:
    """As a profile has them."""
    found: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": [], "mixed": []}
    for one, lasted_s in zip(passes, seconds, strict=True):
        found[one.kind].append(profile_entry(one, lasted_s))
    return found
