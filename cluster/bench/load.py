"""Sends requests at their moments and collects what came of them."""

from __future__ import annotations

import asyncio
import gc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.bench.http import now
from cluster.bench.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.bench.server import Server, Turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which each waits for the answer to the one before; mostly there is one."""

    due_s: float
    turns: tuple[Turn, ...]


class Progress(Protocol):
    def sent(self) -> None: ...

    def ended(self, sample: Sample) -> None: ...


class Shooter:
    """One round against one server."""

    def __init__(self, server: Server, progress: Progress, round_: int = 0) -> None:
        self._server, self._progress, self._round = server, progress, round_
        self._start_s = now()
        self.samples: list[Sample] = []

    def clock(self) -> float:
        return now() - self._start_s

    def first_request(self, conversation: Conversation) -> bytes:
        """Prepared before its moment, so that preparing delays nobody."""
        turn = conversation.turns[0]
        return self._server.prepare(self._server.prompt(turn), turn.output_tokens, turn.priority)

    async def hold(self, conversation: Conversation, due_s: float, request: bytes) -> None:
        """One conversation from its first turn, due at `due_s`, to its last."""
        history: list[str] = []
        for place, turn in enumerate(conversation.turns):
            if place > 0:
                due_s = self.clock() + turn.think_s
                request = self._later_request(turn, history)
                await self.wait_until(due_s)
            more = place + 1 < len(conversation.turns)
            sample = await self._shoot(turn, due_s, request, keep_text=more)
            if not sample.finished:
                return
            if more:
                history += [self._server.text(turn), sample.text]

    def _later_request(self, turn: Turn, history: Sequence[str]) -> bytes:
        prompt = self._server.prompt(turn, history)
        return self._server.prepare(prompt, turn.output_tokens, turn.priority)

    async def _shoot(self, turn: Turn, due_s: float, request: bytes, *, keep_text: bool) -> Sample:
        sample = Sample(
            turn.index, due_s, turn.slo, turn.prompt_tokens, turn.output_tokens, self._round
        )
        self._progress.sent()
        await self._server.shoot(request, sample, self.clock, keep_text=keep_text)
        self.samples.append(sample)
        self._progress.ended(sample)
        return sample

    async def wait_until(self, due_s: float) -> None:
        await asyncio.sleep(max(due_s - self.clock(), 0.0))


async def open_loop(
    server: Server, conversations: Sequence[Conversation], progress: Progress, round_: int = 0
) -> list[Sample]:
    """Every conversation begins when it is due, whether or not earlier ones are answered."""
    shooter = Shooter(server, progress, round_)
    with _no_collector_pauses():
        async with asyncio.TaskGroup() as group:
            for conversation in conversations:
                request = shooter.first_request(conversation)
                await shooter.wait_until(conversation.due_s)
                group.create_task(shooter.hold(conversation, conversation.due_s, request))
    return sorted(shooter.samples, key=lambda one: one.index)


async def closed_loop(
    server: Server,
    conversations: Sequence[Conversation],
    concurrency: int,
    progress: Progress,
    round_: int = 0,
) -> list[Sample]:
    """A fixed number of users, each beginning the next conversation when the last one ended."""
    shooter = Shooter(server, progress, round_)
    queue = iter(conversations)

    async def user() -> None:
        for conversation in queue:
            request = shooter.first_request(conversation)
            await shooter.hold(conversation, shooter.clock(), request)

    with _no_collector_pauses():
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(user())
    return sorted(shooter.samples, key=lambda one: one.index)


@contextmanager
def _no_collector_pauses() -> Iterator[None]:
    """Garbage collection would hold every stream up for milliseconds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Silent:
    """Progress that nobody watches."""

    def sent(self) -> None:
        pass

    def ended(self, sample: Sample) -> None:
        pass
