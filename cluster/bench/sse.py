"""What a streamed answer says: server-sent events in, the moments of its tokens out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from engine.errors import TandemError

LARGEST_EVENT_BYTES = 1 << 20


class BadStream(TandemError):
    """A server's answer that is not what OpenAI's API promises."""


class EventSplitter:
    """Cuts a byte stream into the data of its server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes."""
        text = (self._rest + data).replace(b"\r\n", b"\n")
        *events, self._rest = text.split(b"\n\n")
        if len(self._rest) > LARGEST_EVENT_BYTES:
            raise BadStream(f"an event of more than {LARGEST_EVENT_BYTES} bytes")
        return [payload for event in events if (payload := _payload(event))]


def _payload(event: bytes) -> bytes:
    """The joined data lines; comments and other fields do not matter here."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


@dataclass(slots=True)
class Answer:
    """A streamed completion as it arrived."""

    token_s: list[float] = field(default_factory=list)
    """When each chunk that carries a token arrived."""
    text: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    parts_s: dict[str, float | None] | None = None
    """Where the server says the time went, if it does."""
    error: str | None = None
    ended: bool = False
    keep_text: bool = True

    def take(self, data: bytes, now_s: float) -> None:
        """Records one event; JSON is read only where it says more than that a token came."""
        if not self.keep_text and _is_plain_token(data):
            self.token_s.append(now_s)
            return
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise BadStream(f"an event that is not JSON: {data[:80]!r}") from error
        self._take_event(event, now_s)

    def _take_event(self, event: dict[str, Any], now_s: float) -> None:
        if "error" in event:
            self.error = error_text(event["error"])
            return
        self.usage = event.get("usage") or self.usage
        self.parts_s = event.get("ttft_parts_s") or self.parts_s
        for choice in event.get("choices") or ():
            self._take_choice(choice, now_s)

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> None:
        text = choice["text"] if "text" in choice else choice.get("delta", {}).get("content")
        opens_chat = text in (None, "") and "role" in choice.get("delta", {})
        only_closes = not text and choice.get("finish_reason") is not None
        if opens_chat or only_closes:
            return
        self.token_s.append(now_s)
        if text:
            self.text.append(text)

    @property
    def output_tokens(self) -> int:
        told = (self.usage or {}).get("completion_tokens")
        return len(self.token_s) if told is None else int(told)

    @property
    def prompt_tokens(self) -> int | None:
        told = (self.usage or {}).get("prompt_tokens")
        return None if told is None else int(told)


def _is_plain_token(data: bytes) -> bool:
    """A chunk that neither ends an answer nor opens a chat."""
    goes_on = b'"finish_reason":null' in data or b'"finish_reason": null' in data
    return goes_on and b'"role"' not in data


def error_text(error: object) -> str:
    """The message of an error in OpenAI's shape, or whatever was sent instead."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
