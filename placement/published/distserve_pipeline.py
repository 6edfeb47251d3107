"""DistServe's pipelined instances: stages that merge whatever waits before them."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol

from placement.published.distserve_stage import DecodeRules, Lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class StageCosts(DecodeRules, Protocol):
    @property
    def pipeline(self) -> int: ...

    @property
    def kv_capacity_tokens(self) -> int: ...

    def prefill_s(self, tokens: int, squares: int, *, first: bool) -> float: ...


class _Stage:
    def __init__(self, index: int) -> None:
        self.index = index
        self.prompts: deque[list[int]] = deque()
        self.decodes: list[int] = []
        self.prefilling: list[int] = []
        self.decoding: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.prefilling or self.decoding)


class Pipeline:
    """One instance of several stages: prompts before decodes, batches passed round a ring."""

    def __init__(
        self, rules: StageCosts, lengths: Lengths, batch_tokens: int, waiting_tokens: int
    ) -> None:
        self._rules = rules
        self._batch_tokens = batch_tokens
        self._waiting_tokens = waiting_tokens
        self._prompts: list[int] = lengths.prompt_tokens.tolist()
        self._need: list[int] = (lengths.prompt_tokens + 1).tolist()
        self._end: list[int] = (lengths.prompt_tokens + lengths.output_tokens + 1).tolist()
        self._stages = [_Stage(index) for index in range(rules.pipeline)]
        self._arrived: deque[int] = deque()
        self._ends: list[tuple[float, int, int]] = []
        self._sequence = 0
        self._first_s = [0.0] * len(self._prompts)
        self._finished_s = [0.0] * len(self._prompts)

    def decode(self, ready: Sequence[float]) -> list[float]:
        """When each request ends, given when its prefill elsewhere ended."""
        self._run(ready, self._enter_decode)
        return self._finished_s

    def serve(self, arrivals: Sequence[float]) -> tuple[list[float], list[float]]:
        """Both phases here: when each request's first token comes, and when it ends."""
        self._run(arrivals, self._arrived.append)
        return self._first_s, self._finished_s

    def _enter_decode(self, request: int) -> None:
        self._stages[0].decodes.append(request)

    def _run(self, arrivals: Sequence[float], enter: Callable[[int], None]) -> None:
        arrived, total = 0, len(arrivals)
        while arrived < total or self._ends:
            if arrived < total and (not self._ends or arrivals[arrived] <= self._ends[0][0]):
                now = arrivals[arrived]
                while arrived < total and arrivals[arrived] == now:
                    enter(arrived)
                    arrived += 1
                self._start(self._stages[0], now)
            else:
                now, _, index = heappop(self._ends)
                self._finish(self._stages[index], now)

    def _start(self, stage: _Stage, now: float) -> None:
        if stage.busy:
            return
        if self._has_prompts(stage) and not self._crowded(stage):
            duration_s = self._start_prefill(stage)
        elif stage.decodes:
            duration_s = self._start_decode(stage)
        else:
            return
        self._sequence += 1
        heappush(self._ends, (now + duration_s, self._sequence, stage.index))

    def _has_prompts(self, stage: _Stage) -> bool:
        return bool(stage.prompts) or (stage.index == 0 and bool(self._arrived))

    def _crowded(self, stage: _Stage) -> bool:
        most = len(stage.decodes) * self._batch_tokens
        if most <= self._waiting_tokens:
            return False
        return sum(self._need[r] - 1 for r in stage.decodes) > self._waiting_tokens

    def _start_prefill(self, stage: _Stage) -> float:
        stage.prefilling = stage.prompts.popleft() if stage.index else self._take_prompts()
        lengths = [self._prompts[r] for r in stage.prefilling]
        squares = sum(length * length for length in lengths)
        return self._rules.prefill_s(sum(lengths), squares, first=stage.index == 0)

    def _take_prompts(self) -> list[int]:
        taken, room = [], self._rules.kv_capacity_tokens
        while self._arrived and self._prompts[self._arrived[0]] <= room:
            room -= self._prompts[self._arrived[0]]
            taken.append(self._arrived.popleft())
        return taken

    def _start_decode(self, stage: _Stage) -> float:
        needs, queue = self._need, stage.decodes
        total = sum(map(needs.__getitem__, queue))
        if total > self._batch_tokens or len(queue) > self._rules.decode_batch_requests:
            total, queue = self._split(stage)
        else:
            stage.decodes = []
        stage.decoding = queue
        base, slope = self._rules.decode_line(len(queue), first=stage.index == 0)
        return base + slope * total

    def _split(self, stage: _Stage) -> tuple[int, list[int]]:
        """The longest prefix of the stage's queue that may decode together, and its tokens."""
        count, total = 0, 0
        for request in stage.decodes[: self._rules.decode_batch_requests]:
            if total + self._need[request] > self._batch_tokens:
                break
            total += self._need[request]
            count += 1
        batch, stage.decodes = stage.decodes[:count], stage.decodes[count:]
        return total, batch

    def _finish(self, stage: _Stage, now: float) -> None:
        last = stage.index == len(self._stages) - 1
        successor = self._stages[0 if last else stage.index + 1]
        prefilled, stage.prefilling = stage.prefilling, []
        decoded, stage.decoding = stage.decoding, []
        if prefilled and not last:
            successor.prompts.append(prefilled)
        elif prefilled:
            for request in prefilled:
                self._first_s[request] = now
            successor.decodes += prefilled
        if decoded:
            successor.decodes += self._step(decoded, now) if last else decoded
        self._start(stage, now)
        self._start(successor, now)

    def _step(self, batch: list[int], now: float) -> list[int]:
        """A token more for each; those that go on."""
        needs, ends = self._need, self._end
        for request in batch:
            needs[request] += 1
        going = [r for r in batch if needs[r] < ends[r]]
        if len(going) < len(batch):
            for request in batch:
                if needs[request] == ends[request]:
                    self._finished_s[request] = now
        return going
