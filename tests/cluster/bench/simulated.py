"""An OpenAI-compatible server whose latencies are known: it draws them and keeps to them."""

from __future__ import annotations

import asyncio
import json
import select
import selectors
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Latency:
    """Lognormal time to the first token, uniform gaps after it, and one stall."""

    ttft_median_s: float = 0.2
    ttft_sigma: float = 0.5
    gap_s: tuple[float, float] = (0.02, 0.06)
    stall_at: int | None = None
    """The number of the request whose arrival makes the whole server stop."""
    stall_s: float = 1.0
    seed: int = 7

    def draw(self, requests: int) -> tuple[list[float], list[float]]:
        """TTFT and gap of each request in order of arrival."""
        rng = np.random.default_rng(self.seed)
        ttft_s = self.ttft_median_s * np.exp(self.ttft_sigma * rng.standard_normal(requests))
        return ttft_s.tolist(), rng.uniform(*self.gap_s, requests).tolist()

    def expected(self, due_s: Sequence[float], tokens: int) -> list[list[float]]:
        """When each token leaves, for requests that arrive when they are due."""
        ttft_s, gap_s = self.draw(REQUESTS)
        stall_from_s = float("inf") if self.stall_at is None else due_s[self.stall_at]

        def held(moment_s: float) -> float:
            within = stall_from_s < moment_s < stall_from_s + self.stall_s
            return stall_from_s + self.stall_s if within else moment_s

        return [
            [held(held(due) + ttft_s[i] + gap_s[i] * place) for place in range(tokens)]
            for i, due in enumerate(due_s)
        ]


REQUESTS = 100_000


@dataclass
class Behaviour:
    """What the server takes and how it answers."""

    latency: Latency = field(default_factory=Latency)
    tokens_accepted: bool = True
    ignore_eos_accepted: bool = True
    usage: bool = True
    parts: bool = False
    fails_every: int | None = None
    closes_after_each: bool = False


class SimulatedServer:
    """`bodies` are the requests measured: the probe of two tokens is answered at once."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.bodies: list[dict[str, Any]] = []
        self._ttft_s, self._gap_s = self.behaviour.latency.draw(REQUESTS)
        self.connections = 0
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(
            (int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")),
            0,
        )
        body = await reader.readexactly(length)
        if head.startswith("get /v1/models"):
            _plain(writer, 200, {"data": [{"id": "simulated", "root": "simulated"}]})
        else:
            await self._complete(writer, json.loads(body))
        return not self.behaviour.closes_after_each

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        refused = self._refusal(body)
        if refused is not None:
            _plain(writer, 400, {"error": {"message": refused}})
            return
        probe = body["max_tokens"] == 2
        number = _number(body, len(self.bodies))
        if not probe:
            self.bodies.append(body)
        every = self.behaviour.fails_every
        if every and not probe and (number + 1) % every == 0:
            _plain(writer, 503, {"error": {"message": "on purpose"}})
            return
        await self._stream(writer, body, None if probe else number)

    def _refusal(self, body: dict[str, Any]) -> str | None:
        if not self.behaviour.tokens_accepted and isinstance(body.get("prompt"), list):
            return "prompt must be a string"
        if not self.behaviour.ignore_eos_accepted and "ignore_eos" in body:
            return "ignore_eos is unknown"
        if not self.behaviour.usage and "stream_options" in body:
            return "stream_options is unknown"
        return None

    async def _stream(
        self, writer: asyncio.StreamWriter, body: dict[str, Any], number: int | None
    ) -> None:
        loop, latency = asyncio.get_running_loop(), self.behaviour.latency
        arrived_s = loop.time()
        if number is not None and number == latency.stall_at:
            select.select([], [], [], latency.stall_s)
        first_s = 0.0 if number is None else self._ttft_s[number]
        gap_s = 0.0 if number is None else self._gap_s[number]
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        framing = "connection: close" if self.behaviour.closes_after_each else CHUNKED
        writer.write(f"{head}{framing}\r\n\r\n".encode())
        for place in range(body["max_tokens"]):
            await asyncio.sleep(max(arrived_s + first_s + gap_s * place - loop.time(), 0))
            self._event(writer, {"choices": [{"index": 0, **_piece(body, place)}]})
        if self.behaviour.usage:
            self._event(writer, self._usage(body))
        self._event(writer, None)
        if not self.behaviour.closes_after_each:
            writer.write(b"0\r\n\r\n")

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body.get("prompt", body.get("messages"))
        if not isinstance(prompt, str) and "messages" in body:
            prompt = " ".join(message["content"] for message in prompt)
        counted = len(prompt.split()) * 2 if isinstance(prompt, str) else len(prompt)
        usage = {"prompt_tokens": counted, "completion_tokens": body["max_tokens"]}
        parts = {"queue": 0.01, "prefill": 0.05, "transfer": None}
        extra = {"ttft_parts_s": parts} if self.behaviour.parts else {}
        return {"choices": [], "usage": usage, **extra}

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any] | None) -> None:
        data = b"data: " + (b"[DONE]" if event is None else json.dumps(event).encode()) + b"\n\n"
        if self.behaviour.closes_after_each:
            writer.write(data)
        else:
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))


CHUNKED = "transfer-encoding: chunked"


def _number(body: dict[str, Any], arrived: int) -> int:
    """Prompts of token ids begin with their number, so that latencies do not depend on who
    overtakes whom; others are numbered as they arrive."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list):
        return arrived
    return sum((token - 100) * 900**place for place, token in enumerate(prompt[:3])) // 2 % REQUESTS


def _piece(body: dict[str, Any], place: int) -> dict[str, Any]:
    reason = "length" if place + 1 == body["max_tokens"] else None
    text = f" t{place}"
    content = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return {**content, "finish_reason": reason}


def _plain(writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    writer.write(
        f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )


def precise_loop() -> asyncio.AbstractEventLoop:
    """select() waits in microseconds where epoll waits in milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def serve_forever(behaviour: Behaviour, port: int) -> None:
    """A process of its own, so that its stalls are not its client's."""

    async def run() -> None:
        await SimulatedServer(behaviour).start(port)
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(run())
