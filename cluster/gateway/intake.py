"""From a client's call to requests: rules, tokens, and one request for each answer."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

from cluster.gateway.answer import Answer, Choice
from cluster.gateway.call import check_call, check_text
from engine.detokenizer import Detokenizer, StopStrings
from engine.errors import BadRequest
from engine.events import Timeline
from engine.request import Request
from engine.slo import Slo

if TYPE_CHECKING:
    from cluster.gateway.call import Call, Prompt, RequestLimits
    from engine.request import Grammar
    from engine.tokenizer import Tokenizer

LONG_TEXT_CHARACTERS = 4000
"""Longer prompts are tokenized in a thread, so that streams go on meanwhile; so are as many tokens
made text."""


class GrammarCheck(Protocol):
    def check(self, grammar: Grammar) -> None:
        """Raises BadRequest if it cannot be compiled."""
        ...


class Intake:
    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        *,
        context_tokens: int,
        slo: Slo,
        grammars: GrammarCheck | None = None,
    ) -> None:
        """`slo` holds the targets of requests that state none."""
        self.tokenizer, self.limits = tokenizer, limits
        self.context_tokens, self.slo = context_tokens, slo
        self._grammars = grammars

    async def tokenize(
        self, text: str, *, of: str = "prompt", add_special_tokens: bool = True
    ) -> list[int]:
        """`of` is the field that it comes from, or is made of."""
        check_text(of, text, self.limits)
        if len(text) <= LONG_TEXT_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def detokenize(self, tokens: list[int]) -> str:
        """With special tokens."""
        if len(tokens) <= LONG_TEXT_CHARACTERS:
            return self.tokenizer.decode(tokens, skip_special_tokens=False)
        return await asyncio.to_thread(self.tokenizer.decode, tokens, skip_special_tokens=False)

    async def answer(self, call: Call, now: float) -> Answer:
        """The answer to be given, its requests not yet sent anywhere; raises BadRequest."""
        check_call(call, self.limits, self.tokenizer.vocab_size)
        if call.sampling.grammar is not None:
            await self._check_grammar(call.sampling.grammar)
        return self._answer(call, await self._prompts(call), now)

    async def _check_grammar(self, grammar: Grammar) -> None:
        if self._grammars is None:
            raise BadRequest("response_format", grammar.kind, "guided output is not available here")
        await asyncio.to_thread(self._grammars.check, grammar)

    async def _prompts(self, call: Call) -> list[tuple[int, ...]]:
        if call.chat is not None:
            conversation = list(call.chat)
            text = await asyncio.to_thread(self.tokenizer.render_chat, conversation)
            return [tuple(await self.tokenize(text, of="messages", add_special_tokens=False))]
        return [await self._prompt(prompt) for prompt in call.prompts]

    async def _prompt(self, prompt: Prompt) -> tuple[int, ...]:
        tokens = tuple(await self.tokenize(prompt)) if isinstance(prompt, str) else prompt
        if not tokens:
            raise BadRequest("prompt", prompt, "must hold at least one token")
        return tokens

    def _answer(self, call: Call, prompts: list[tuple[int, ...]], now: float) -> Answer:
        answer_id = call.request_id or call.id_prefix + secrets.token_hex(16)
        answer = Answer(answer_id, call.tenant, now, sum(map(len, prompts)))
        seed = secrets.randbits(62) if call.seed is None else call.seed
        for number, prompt in enumerate(prompts):
            echo = self._echo(call, number, prompt)
            for k in range(call.n):
                index = number * call.n + k
                request_id = answer_id if call.answers == 1 else f"{answer_id}#{index}"
                request = self._request(call, request_id, prompt, _seed_of(seed, k), now)
                answer.add(self._choice(call, answer, index, request, echo))
        return answer

    def _choice(
        self, call: Call, answer: Answer, index: int, request: Request, echo: str
    ) -> Choice:
        return Choice(
            answer,
            index,
            request,
            timeline=Timeline(request.arrival_s),
            text=Detokenizer(self.tokenizer),
            stops=StopStrings(call.stop) if call.stop else None,
            echo=echo,
        )

    def _echo(self, call: Call, number: int, prompt: tuple[int, ...]) -> str:
        if not call.echo:
            return ""
        given = "" if call.chat is not None else call.prompts[number]
        return given if isinstance(given, str) else self.tokenizer.decode(prompt)

    def _request(
        self, call: Call, request_id: str, prompt: tuple[int, ...], seed: int, now: float
    ) -> Request:
        left = self.context_tokens - len(prompt)
        wanted = left if call.max_tokens is None else call.max_tokens
        if left < 1 or wanted > left:
            rule = (
                f"this model's context is {self.context_tokens} tokens, of which the prompt takes "
                f"{len(prompt)}"
            )
            where = "prompt" if left < 1 else "max_tokens"
            raise BadRequest(where, len(prompt) if left < 1 else wanted, rule)
        if call.sampling.min_tokens > wanted:
            raise BadRequest("min_tokens", call.sampling.min_tokens, "exceeds max_tokens")
        sampling = replace(call.sampling, max_tokens=wanted, seed=seed)
        targets, default = call.targets, self.slo
        slo = Slo(targets.ttft_s or default.ttft_s, targets.tpot_s or default.tpot_s)
        return Request(request_id, prompt, sampling, slo, call.priority, now, call.tenant)


def _seed_of(seed: int, k: int) -> int:
    """The k-th answer's own seed; the first answer is the one that n = 1 would give."""
    if k == 0:
        return seed
    digest = blake2b(f"{seed}/{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2
