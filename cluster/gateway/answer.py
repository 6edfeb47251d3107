"""The way of tokens from the journal to one client: text, stop strings, and a mailbox."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import TandemError
from engine.request import FinishReason

if TYPE_CHECKING:
    from cluster.gateway.entry import Entry
    from engine.batch import Logprobs
    from engine.detokenizer import Detokenizer, StopStrings
    from engine.events import Timeline
    from engine.messages import Token
    from engine.request import Request

STAMPS = ("prefill_started_s", "transferred_s", "decode_started_s")
"""Moments that only instances see; the others are those of the client's stream."""


class ClientGone(TandemError):
    """Nobody reads the answer any more."""


@dataclass(slots=True)
class Delta:
    """What one token adds to an answer. `token` is None where an end comes without one."""

    choice: int
    token: int | None
    text: str
    logprobs: Logprobs | None = None
    finish: FinishReason | None = None


class Choice:
    """One answer under way: a request of the journal and the text its tokens make."""

    def __init__(
        self,
        answer: Answer,
        index: int,
        request: Request,
        *,
        timeline: Timeline,
        text: Detokenizer,
        stops: StopStrings | None = None,
        echo: str = "",
    ) -> None:
        self.answer, self.index, self.request, self.timeline = answer, index, request, timeline
        self.entry: Entry | None = None
        """The journal's, once the request has been sent somewhere."""
        self.output_tokens = 0
        self.charged_tokens = 0
        """Output tokens that the tenant's share has paid for."""
        self.kv_bytes = 0
        self.cached_tokens = 0
        self.last_s = 0.0
        self._text, self._stops, self._echo = text, stops, echo

    @property
    def prefill(self) -> str:
        """The instance that prefilled it last."""
        return "" if self.entry is None else self.entry.prefill or ""

    @property
    def decode(self) -> str:
        """The instance that decodes it, or will once its prefill is done."""
        if self.entry is None:
            return ""
        grant = self.entry.grant
        if grant is not None and not grant.claimed:
            return grant.instance
        return self.entry.owner or ""

    def push(self, token: Token, now: float) -> FinishReason | None:
        """Add the next token; the reason if it ends the answer, for the token or for its text."""
        self.output_tokens += 1
        self.last_s = now
        if token.stamps:
            self._stamp(token.stamps)
        if self.output_tokens <= 2:
            self._mark(now)
        finish = token.finish
        # The token that an answer stops at is not part of its text.
        text = "" if finish is FinishReason.STOP else self._text.push((token.token,))
        if self._stops is not None:
            text, finish = self._stop(text, finish)
        elif finish is not None:
            text += self._text.flush()
        if self._echo:
            text, self._echo = self._echo + text, ""
        self.answer.put(Delta(self.index, token.token, text, token.logprobs, finish))
        return finish

    def end(self, finish: FinishReason) -> None:
        """An end that comes without a token."""
        self.answer.put(Delta(self.index, None, self._echo, None, finish))

    def _stop(self, text: str, finish: FinishReason | None) -> tuple[str, FinishReason | None]:
        assert self._stops is not None
        if finish is not None:
            text += self._text.flush()
        armed = self.output_tokens >= self.request.sampling.min_tokens
        text = self._stops.push(text, armed=armed)
        if self._stops.stopped is not None:
            return text, FinishReason.STOP
        return text if finish is None else text + self._stops.flush(), finish

    def _mark(self, now: float) -> None:
        if self.output_tokens == 1:
            self.timeline.first_token_s = now
        else:
            self.timeline.second_token_s = now

    def _stamp(self, stamps: tuple[tuple[str, float], ...]) -> None:
        for name, value in stamps:
            if name in STAMPS:
                setattr(self.timeline, name, value)
            elif name == "kv_bytes":
                self.kv_bytes = int(value)
            elif name == "cached_tokens":
                self.cached_tokens = int(value)


class Answer:
    """Everything one call is answered with; its reader takes deltas as they come."""

    def __init__(self, call_id: str, tenant: str, created_s: float, prompt_tokens: int) -> None:
        self.id = call_id
        self.tenant = tenant
        self.created_s = created_s
        self.prompt_tokens = prompt_tokens
        """Each prompt counts once, however often it is answered."""
        self.choices: list[Choice] = []
        self.open_choices = 0
        self.error: TandemError | None = None
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None

    def add(self, choice: Choice) -> None:
        self.choices.append(choice)
        self.open_choices += 1

    @property
    def done(self) -> bool:
        """Whether every answer has ended and nothing is left to read."""
        return self.open_choices == 0 and not self._deltas

    @property
    def output_tokens(self) -> int:
        return sum(choice.output_tokens for choice in self.choices)

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if delta.finish is not None:
            self.open_choices -= 1
        self._wake()

    def fail(self, error: TandemError) -> None:
        self.error = self.error or error
        self._wake()

    async def next(self) -> list[Delta]:
        """The deltas since the last call, at least one; none once every answer has ended.

        Raises what ended the call early, after the deltas that came before it.
        """
        while not self._deltas:
            if self.error is not None:
                raise self.error
            if self.open_choices == 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        deltas, self._deltas = self._deltas, []
        return deltas

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
