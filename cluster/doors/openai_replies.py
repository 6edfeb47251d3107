"""The replies of OpenAI's API: their shapes for /openapi.json, and their bytes.

Streamed chunks are put together from pieces that stay the same for a whole answer, since one is
written for every token.
"""

from __future__ import annotations

import json
from enum import Enum
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.gateway.answer import Answer, Delta
    from engine.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Error


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    ttft_parts_s: dict[str, float | None] | None = None
    """Where the time to a flowing stream went; on a stream's last chunk."""


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatText(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatText
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    ttft_parts_s: dict[str, float | None] | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class TokenizeReply(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeReply(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok", "starting", "draining"]


def usage_of(answer: Answer) -> dict[str, int]:
    return _usage(answer.prompt_tokens, answer.output_tokens)


def _usage(prompt: int, output: int) -> dict[str, int]:
    total = prompt + output
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": total}


class UsageOn(Enum):
    """Which chunks of a stream say how many tokens there have been."""

    NO_CHUNK = 0
    LAST_CHUNK = 1
    EVERY_CHUNK = 2


class Format(Protocol):
    """How one kind of answer is written, whole or piece by piece."""

    def chunks(self, deltas: Sequence[Delta]) -> bytes: ...

    def usage_chunk(self) -> bytes: ...

    def whole(self, deltas: Sequence[Delta]) -> bytes: ...


class _Pieces:
    """The parts of every chunk of one stream."""

    def __init__(self, answer: Answer, model: str, kind: str, usage: UsageOn) -> None:
        self.answer, self.model = answer, model
        self.created = int(answer.created_s)
        head = {"id": answer.id, "object": kind, "created": self.created, "model": model}
        self.head = "data: " + _json(head)[:-1]
        self._every = usage is UsageOn.EVERY_CHUNK
        self._tail = "}\n\n" if usage is UsageOn.NO_CHUNK else ',"usage":null}\n\n'
        self._written_tokens = 0

    def tail(self, delta: Delta) -> str:
        if not self._every:
            return self._tail
        self._written_tokens += delta.token is not None
        usage = _usage(self.answer.prompt_tokens, self._written_tokens)
        return f',"usage":{_json(usage)}}}\n\n'

    def usage_chunk(self) -> bytes:
        usage = _json(usage_of(self.answer))
        parts = _json(self.answer.choices[0].timeline.parts_s())
        return f'{self.head},"choices":[],"usage":{usage},"ttft_parts_s":{parts}}}\n\n'.encode()


class CompletionFormat:
    def __init__(self, answer: Answer, model: str, tokenizer: Tokenizer, usage: UsageOn) -> None:
        self._pieces = _Pieces(answer, model, "text_completion", usage)
        self._tokenizer = tokenizer
        self._shown: dict[int, int] = {}
        """Characters of each choice so far."""

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        head, tail = self._pieces.head, self._pieces.tail
        return "".join([
            f'{head},"choices":[{{"index":{delta.choice},"text":{encode_basestring(delta.text)}'
            f',"logprobs":{self._logprobs_json(delta)}'
            f',"finish_reason":{_finish(delta)}}}]{tail(delta)}'
            for delta in deltas
        ]).encode()  # fmt: skip

    def usage_chunk(self) -> bytes:
        return self._pieces.usage_chunk()

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        answer = self._pieces.answer
        choices = []
        for choice in answer.choices:
            own = [delta for delta in deltas if delta.choice == choice.index]
            choices.append({
                "index": choice.index,
                "text": "".join(delta.text for delta in own),
                "logprobs": self._logprobs(own),
                "finish_reason": own[-1].finish,
            })  # fmt: skip
        return _json({
            "id": answer.id,
            "object": "text_completion",
            "created": self._pieces.created,
            "model": self._pieces.model,
            "choices": choices,
            "usage": usage_of(answer),
        }).encode()  # fmt: skip

    def _logprobs_json(self, delta: Delta) -> str:
        return "null" if delta.logprobs is None else _json(self._logprobs([delta]))

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, list[Any]] | None:
        rows: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        text_of = self._tokenizer.token_text
        for delta in deltas:
            if delta.token is None or delta.logprobs is None:
                continue
            offset = self._shown.get(delta.choice, 0)
            self._shown[delta.choice] = offset + len(delta.text)
            rows["tokens"].append(text_of(delta.token))
            rows["token_logprobs"].append(_finite(delta.logprobs.chosen))
            top = {text_of(token): _finite(value) for token, value in delta.logprobs.top}
            rows["top_logprobs"].append(top)
            rows["text_offset"].append(offset)
        return rows if rows["tokens"] else None


class ChatFormat:
    def __init__(self, answer: Answer, model: str, tokenizer: Tokenizer, usage: UsageOn) -> None:
        self._pieces = _Pieces(answer, model, "chat.completion.chunk", usage)
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        head, tail = self._pieces.head, self._pieces.tail
        return "".join([
            f'{head},"choices":[{{"index":{delta.choice},"delta":{{{self._role(delta.choice)}'
            f'"content":{encode_basestring(delta.text)}}}'
            f',"logprobs":{"null" if delta.logprobs is None else _json(self._logprobs([delta]))}'
            f',"finish_reason":{_finish(delta)}}}]{tail(delta)}'
            for delta in deltas
        ]).encode()  # fmt: skip

    def usage_chunk(self) -> bytes:
        return self._pieces.usage_chunk()

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        answer = self._pieces.answer
        choices = []
        for choice in answer.choices:
            own = [delta for delta in deltas if delta.choice == choice.index]
            content = "".join(delta.text for delta in own)
            choices.append({
                "index": choice.index,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": self._logprobs(own),
                "finish_reason": own[-1].finish,
            })  # fmt: skip
        return _json({
            "id": answer.id,
            "object": "chat.completion",
            "created": self._pieces.created,
            "model": self._pieces.model,
            "choices": choices,
            "usage": usage_of(answer),
        }).encode()  # fmt: skip

    def _role(self, choice: int) -> str:
        """Who speaks is said with the first token."""
        if choice in self._begun:
            return ""
        self._begun.add(choice)
        return '"role":"assistant",'

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        content = [
            {
                **self._named(delta.token, delta.logprobs.chosen),
                "top_logprobs": [self._named(*pair) for pair in delta.logprobs.top],
            }
            for delta in deltas
            if delta.token is not None and delta.logprobs is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self._tokenizer.token_bytes(token)
        text = spelling.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(spelling)}


def _finish(delta: Delta) -> str:
    return "null" if delta.finish is None else f'"{delta.finish.value}"'


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be drawn."""
    return max(logprob, -9999.0)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
