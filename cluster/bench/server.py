"""One server under test: what it takes, found out by asking it, and one request to it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.bench.http import Client, HttpRefused, Target, now
from cluster.bench.prompts import Prefix, TextPrompts, TokenPrompts
from cluster.bench.sse import Answer, BadStream
from engine.errors import BadInput, DeadlineExceeded, TransportError
from engine.slo import Slo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.bench.sample import Sample

PROBE_WORDS = 200
PROBE_TOKENS = 16
EXACT_LENGTH: dict[str, Any] = {"ignore_eos": True}
WITH_USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True, slots=True)
class Turn:
    """One request to be made."""

    index: int
    prompt_tokens: int
    output_tokens: int
    slo: Slo = field(default_factory=Slo)
    prefixes: tuple[Prefix, ...] = ()
    """What its prompt begins with."""
    priority: int = 0
    think_s: float = 0.0
    """How long its user thinks about the answer before it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How requests are put, where the server leaves a choice."""

    model: str | None = None
    chat: bool = False
    text: bool = False
    """Prompts as text even where token ids are taken; turns of a conversation need it."""
    temperature: float = 0.0
    timeout_s: float = 600.0
    prompt_seed: int = 0
    """Prompts of another seed share nothing with these."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the server was found to accept."""

    model: str
    chat: bool
    prompts: TokenPrompts | TextPrompts
    exact_length: bool
    """Whether ignore_eos and min_tokens make every answer as long as asked."""
    usage: bool

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        notes = []
        if isinstance(self.prompts, TextPrompts):
            notes.append("prompts are text: their lengths are approximate")
        if not self.exact_length:
            notes.append("ignore_eos is refused: answers may be shorter than asked")
        if not self.usage:
            notes.append("no usage chunk: output tokens are counted as chunks")
        return notes


class Server:
    """A client and the dialect it speaks."""

    def __init__(self, target: Target, client: Client, dialect: Dialect, settings: Settings):
        self.target, self.dialect = target, dialect
        self._client, self._settings = client, settings

    @property
    def url(self) -> str:
        return self.target.url

    def prompt(self, turn: Turn, history: Sequence[str] = ()) -> bytes:
        """As JSON; `history` is what was said so far, asked and answered in turn."""
        prompts = self.dialect.prompts
        if isinstance(prompts, TokenPrompts):
            assert not history, "conversations are held in text"
            return prompts.render(turn.index, turn.prompt_tokens, turn.prefixes)
        said = [*history, self.text(turn)]
        return json.dumps(_messages(said) if self.dialect.chat else " ".join(said)).encode()

    def renew_prompts(self, number: int) -> None:
        """Prompts that the server has not met in an earlier part of the run."""
        seed = self._settings.prompt_seed + number
        self.dialect = replace(self.dialect, prompts=self.dialect.prompts.reseeded(seed))

    def text(self, turn: Turn) -> str:
        """What its user says in this turn."""
        prompts = self.dialect.prompts
        assert isinstance(prompts, TextPrompts), "conversations are held in text"
        return prompts.text(turn.index, turn.prompt_tokens, turn.prefixes)

    def prepare(self, prompt: bytes, output_tokens: int, priority: int = 0) -> bytes:
        """The bytes of one request."""
        dialect = self.dialect
        fields: dict[str, Any] = {
            "model": dialect.model,
            "max_tokens": output_tokens,
            "temperature": self._settings.temperature,
            "stream": True,
        }
        if dialect.usage:
            fields |= WITH_USAGE
        if dialect.exact_length:
            fields |= EXACT_LENGTH | {"min_tokens": output_tokens}
        if priority:
            fields["priority"] = priority
        key, path = (
            (b"messages", "/v1/chat/completions")
            if dialect.chat
            else (b"prompt", "/v1/completions")
        )
        body = json.dumps(fields).encode()[:-1] + b', "' + key + b'": ' + prompt + b"}"
        return self._client.request_bytes("POST", path, body)

    async def shoot(
        self,
        request: bytes,
        sample: Sample,
        clock: Callable[[], float],
        *,
        keep_text: bool = False,
    ) -> None:
        """Sends one prepared request now and fills in what came of it."""
        answer = Answer(keep_text=keep_text)
        origin_s = now() - clock()
        sample.sent_s = clock()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._client.exchange(request, answer.take)
        except TimeoutError:
            sample.error = f"no answer within {self._settings.timeout_s:g} s"
        except (TransportError, BadStream) as error:
            sample.error = str(error)
        sample.ended_s = clock()
        _fill(sample, answer, origin_s)

    async def ask(self, prompt: bytes, output_tokens: int) -> Answer:
        """One request outside the measurement."""
        answer = Answer()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._client.exchange(self.prepare(prompt, output_tokens), answer.take)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.url} did not answer a probe") from error
        if answer.error is not None:
            raise TransportError(f"{self.url}: {answer.error}")
        return answer

    def close(self) -> None:
        self._client.close()


def _messages(said: Sequence[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]


def _fill(sample: Sample, answer: Answer, origin_s: float) -> None:
    sample.token_s = [moment - origin_s for moment in answer.token_s]
    sample.output_tokens = answer.output_tokens
    sample.parts_s = answer.parts_s
    sample.text = "".join(answer.text)
    if answer.prompt_tokens is not None:
        sample.prompt_tokens = answer.prompt_tokens
    if sample.error is None:
        sample.error = answer.error
    if sample.error is None and not answer.token_s:
        sample.error = "the stream ended without a token"


async def connect(target: Target, settings: Settings) -> Server:
    """Asks the server for its model and finds the dialect that gives the most exact figures."""
    client = Client(target)
    model = settings.model or await _served_model(client)
    for dialect in _dialects(model, settings):
        server = Server(target, client, dialect, settings)
        fitted = await _try(server)
        if fitted is not None:
            fitted = replace(fitted, prompts=fitted.prompts.reseeded(settings.prompt_seed))
            return Server(target, client, fitted, settings)
    raise BadInput("url", target.url, "the server takes none of the completion requests we know")


async def _served_model(client: Client) -> str:
    models = json.loads(await client.fetch("GET", "/v1/models"))
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise BadInput("url", client.target.url, "lists no model; name one") from error


def _dialects(model: str, settings: Settings) -> list[Dialect]:
    """From the most exact to the most modest."""
    seed = settings.prompt_seed
    prompts: list[TokenPrompts | TextPrompts] = [TextPrompts(seed=seed)]
    if not (settings.chat or settings.text):
        prompts = [TokenPrompts(3, seed), TokenPrompts(2, seed), *prompts]
    return [
        Dialect(model, settings.chat, one, exact, usage)
        for one in prompts
        for exact, usage in ((True, True), (False, True), (False, False))
    ]


async def _try(server: Server) -> Dialect | None:
    """The dialect, fitted to the server's tokenizer; None where the server refuses it."""
    dialect = server.dialect
    words = PROBE_WORDS if isinstance(dialect.prompts, TextPrompts) else PROBE_TOKENS
    try:
        answer = await server.ask(server.prompt(Turn(0, words, 2)), 2)
    except HttpRefused as error:
        if error.status in (400, 422):
            return None
        raise
    counted = answer.prompt_tokens
    if isinstance(dialect.prompts, TokenPrompts):
        return dialect if counted in (None, PROBE_TOKENS, PROBE_TOKENS + 1) else None
    if counted is None:
        return dialect
    fitted = TextPrompts(counted / PROBE_WORDS)
    return Dialect(dialect.model, dialect.chat, fitted, dialect.exact_length, dialect.usage)
