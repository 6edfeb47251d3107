"""What happened in the cluster, kept for those who watch it: bounded, numbered, never blocking."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

KINDS = (
    "instance",
    "gateway",
    "request",
    "migration",
    "transfer",
    "scale",
    "plan",
    "policy",
)
"""What an event may be about."""


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    at_s: float
    kind: str
    """One of KINDS."""
    subject: str
    text: str
    fields: tuple[tuple[str, str], ...] = ()


class EventLog:
    def __init__(self, kept: int = 10_000) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._news = asyncio.Event()
        self.last = 0

    def add(self, at_s: float, kind: str, subject: str, text: str, **fields: object) -> None:
        self.last += 1
        pairs = tuple((name, str(value)) for name, value in fields.items())
        self._events.append(Event(self.last, at_s, kind, subject, text, pairs))
        self._news.set()
        self._news = asyncio.Event()

    def after(self, number: int) -> tuple[Event, ...]:
        return tuple(event for event in self._events if event.number > number)

    async def wait_after(self, number: int, within_s: float) -> tuple[Event, ...]:
        """What came after `number`; nothing if nothing comes in time."""
        if self.last <= number:
            try:
                async with asyncio.timeout(within_s):
                    await self._news.wait()
            except TimeoutError:
                return ()
        return self.after(number)
