"""What a client asks for, whichever door it came through, and the rules it must keep."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import BadRequest
from engine.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REQUEST_ID = re.compile(r"[\x21-\x22\x24-\x7e]{1,128}")
"""Printable, without `#`, which numbers the answers of one request."""

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask for."""

    prompts: int = 64
    """Prompts in one request."""
    answers: int = 128
    """Prompts times n."""
    n: int = 64
    stops: int = 16
    stop_characters: int = 1000
    stop_token_ids: int = 64
    logprobs: int = 20
    logit_bias: int = 1024
    grammar_characters: int = 100_000
    chat_messages: int = 4096
    prompt_characters: int = 4_000_000


@dataclass(frozen=True, slots=True)
class Targets:
    """A request's own latency targets, where it states them."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client: one or more prompts, each answered n times."""

    prompts: tuple[Prompt, ...] = ()
    chat: tuple[Mapping[str, Any], ...] | None = None
    """A conversation instead of prompts."""
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    """None: as many as the model's context leaves."""
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    echo: bool = False
    priority: int = 0
    targets: Targets = Targets()
    tenant: str = ""
    request_id: str | None = None
    id_prefix: str = "req-"
    trace: str | None = None
    """The caller's W3C traceparent."""

    @property
    def answers(self) -> int:
        return self.n * (1 if self.chat is not None else len(self.prompts))


def check_call(call: Call, limits: RequestLimits, vocabulary: int) -> None:
    """Raises BadRequest for the first rule that is broken."""
    if call.request_id is not None and not REQUEST_ID.fullmatch(call.request_id):
        rule = "must be 1 to 128 printable ASCII characters without spaces and #"
        raise BadRequest("request_id", call.request_id, rule)
    _check_prompts(call, limits, vocabulary)
    _within("n", call.n, 1, limits.n)
    _at_most("prompt", call.answers, limits.answers, "answers in one request")
    _check_stops(call, limits)
    _within("priority", call.priority, -1000, 1000)
    for name in ("ttft_s", "tpot_s"):
        target = getattr(call.targets, name)
        if target is not None and not (math.isfinite(target) and target > 0.0):
            raise BadRequest(f"slo_{name}", target, "must be a positive number of seconds")
    if call.seed is not None:
        _within("seed", call.seed, -(2**63), 2**63 - 1)
    if call.max_tokens is not None and call.max_tokens < 1:
        raise BadRequest("max_tokens", call.max_tokens, "must be at least 1")
    if call.echo and call.sampling.logprobs is not None:
        raise BadRequest("logprobs", call.sampling.logprobs, "cannot be had together with echo")
    _check_sampling(call.sampling, limits, vocabulary)


def _check_prompts(call: Call, limits: RequestLimits, vocabulary: int) -> None:
    if call.chat is not None:
        check_chat(call.chat, limits)
        return
    if not call.prompts:
        raise BadRequest("prompt", [], "must not be empty")
    _at_most("prompt", len(call.prompts), limits.prompts, "prompts")
    for prompt in call.prompts:
        if not isinstance(prompt, str):
            check_tokens("prompt", prompt, vocabulary)


def check_chat(messages: Sequence[Mapping[str, Any]], limits: RequestLimits) -> None:
    if not messages:
        raise BadRequest("messages", [], "must hold at least one message")
    _at_most("messages", len(messages), limits.chat_messages, "messages")


def check_text(field_name: str, text: str, limits: RequestLimits) -> None:
    _at_most(field_name, len(text), limits.prompt_characters, "characters")


def check_tokens(field_name: str, tokens: tuple[int, ...], vocabulary: int) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary)
        raise BadRequest(field_name, wrong, f"token ids must lie in [0, {vocabulary})")


def _check_stops(call: Call, limits: RequestLimits) -> None:
    _at_most("stop", len(call.stop), limits.stops, "stop strings")
    for stop in call.stop:
        if not stop:
            raise BadRequest("stop", stop, "a stop string must not be empty")
        _at_most("stop", len(stop), limits.stop_characters, "characters in a stop string")


def _check_sampling(sampling: Sampling, limits: RequestLimits, vocabulary: int) -> None:
    _within("temperature", sampling.temperature, 0.0, 2.0)
    _within("top_p", sampling.top_p, 0.0, 1.0)
    if sampling.top_p == 0.0:
        raise BadRequest("top_p", sampling.top_p, "must be above 0")
    _within("min_p", sampling.min_p, 0.0, 1.0)
    if sampling.top_k is not None:
        _within("top_k", sampling.top_k, 1, 2**31)
    _within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _within("repetition_penalty", sampling.repetition_penalty, 0.01, 10.0)
    _within("min_tokens", sampling.min_tokens, 0, 2**31)
    if sampling.logprobs is not None:
        _within("logprobs", sampling.logprobs, 0, limits.logprobs)
    _at_most("stop_token_ids", len(sampling.stop_token_ids), limits.stop_token_ids, "tokens")
    check_tokens("stop_token_ids", sampling.stop_token_ids, vocabulary)
    _at_most("logit_bias", len(sampling.logit_bias), limits.logit_bias, "tokens")
    check_tokens("logit_bias", tuple(token for token, _ in sampling.logit_bias), vocabulary)
    for _, bias in sampling.logit_bias:
        _within("logit_bias", bias, -100.0, 100.0)
    if sampling.grammar is not None:
        size = len(sampling.grammar.text)
        _at_most("response_format", size, limits.grammar_characters, "characters")


def _within(field_name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequest(field_name, value, f"must lie between {low:g} and {high:g}")


def _at_most(field_name: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise BadRequest(field_name, count, f"at most {most} {what}")
