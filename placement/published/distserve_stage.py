"""The decode batch of one accelerator group, advanced many steps at a time."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Protocol

from placement.latency.model import steps_to_reach

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray


class DecodeRules(Protocol):
    @property
    def decode_batch_requests(self) -> int: ...

    def decode_line(self, batch: int, *, first: bool) -> tuple[float, float]: ...


class Lengths(Protocol):
    @property
    def prompt_tokens(self) -> NDArray[np.int64]: ...

    @property
    def output_tokens(self) -> NDArray[np.int64]: ...


class DecodeStage:
    """A queue whose longest fitting prefix decodes one token a step and returns to its end.

    While the whole queue fits, requests share one round counter: `_need[r]` is then relative
    to it, so a step costs nothing per request.
    """

    def __init__(self, rules: DecodeRules, lengths: Lengths, batch_tokens: int) -> None:
        self._rules = rules
        self._batch_tokens = batch_tokens
        self._need: list[int] = (lengths.prompt_tokens + 1).tolist()
        self._end: list[int] = (lengths.prompt_tokens + lengths.output_tokens + 1).tolist()
        self.finished_s = [0.0] * len(self._need)
        self._waiting: deque[int] = deque()
        self._running: deque[int] = deque()
        self._total_need = 0
        self.requests = 0
        self._round = 0
        self._shared = True
        self._finish_rounds: list[tuple[int, int]] = []

    @property
    def context_tokens(self) -> int:
        return self._total_need - self.requests

    def push(self, requests: Iterable[int]) -> None:
        for request in requests:
            self._waiting.append(request)
            self._total_need += self._need[request]
            self.requests += 1
            if self._shared:
                self._share(request)

    def settle(self) -> None:
        """The last batch goes back to the end of the queue, behind what came meanwhile."""
        self._waiting.extend(self._running)
        self._running.clear()

    def advance(self, now: float, until: float | None) -> float:
        """Steps until one ends at or after `until` or the batch changes; when that is."""
        fits = self.requests <= self._rules.decode_batch_requests
        if fits and self._total_need <= self._batch_tokens:
            return self._advance_all(now, until)
        return self._advance_prefix(now)

    def _advance_all(self, now: float, until: float | None) -> float:
        if not self._shared:
            self._enter_shared()
        batch, need = self.requests, self._total_need
        base, slope = self._rules.decode_line(batch, first=True)
        steps = min(
            self._finish_rounds[0][0] - self._round,
            (self._batch_tokens - need) // batch + 1,
        )
        if until is not None:
            steps = min(steps, steps_to_reach(until - now, base + slope * need, slope * batch))
        self._running, self._waiting = self._waiting, self._running
        self._round += steps
        self._total_need += steps * batch
        now += steps * (base + slope * need) + slope * batch * (steps * (steps - 1) / 2)
        self._retire_shared(now)
        return now

    def _retire_shared(self, now: float) -> None:
        done = set()
        while self._finish_rounds and self._finish_rounds[0][0] == self._round:
            request = heappop(self._finish_rounds)[1]
            self.finished_s[request] = now
            self._total_need -= self._end[request]
            self.requests -= 1
            done.add(request)
        if done:
            self._running = deque(r for r in self._running if r not in done)

    def _advance_prefix(self, now: float) -> float:
        if self._shared:
            self._leave_shared()
        batch, need = self._longest_prefix()
        base, slope = self._rules.decode_line(len(batch), first=True)
        now += base + slope * need
        self._total_need += len(batch)
        for request in batch:
            self._need[request] += 1
            if self._need[request] < self._end[request]:
                self._running.append(request)
            else:
                self.finished_s[request] = now
                self._total_need -= self._end[request]
                self.requests -= 1
        return now

    def _longest_prefix(self) -> tuple[list[int], int]:
        room, needs, queue = self._batch_tokens, self._need, self._waiting
        count, limit = 0, self._rules.decode_batch_requests
        for request in queue:
            if needs[request] > room or count == limit:
                break
            room -= needs[request]
            count += 1
        return [queue.popleft() for _ in range(count)], self._batch_tokens - room

    def _share(self, request: int) -> None:
        self._need[request] -= self._round
        heappush(self._finish_rounds, (self._end[request] - self._need[request], request))

    def _enter_shared(self) -> None:
        self._shared = True
        for request in self._waiting:
            self._need[request] -= self._round
        self._finish_rounds = [(self._end[r] - self._need[r], r) for r in self._waiting]
        heapify(self._finish_rounds)

    def _leave_shared(self) -> None:
        self._shared = False
        for request in self._waiting:
            self._need[request] += self._round
        self._finish_rounds.clear()
