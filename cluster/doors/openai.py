"""The bodies of OpenAI's API as this server takes them, and the calls they make.

Unknown fields are refused. Fields of OpenAI's that are not supported are known by name and taken
only with the value that changes nothing. How much of everything one request may ask for is the
gateway's to say: `limits.requests`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.doors.openai_replies import UsageOn
from cluster.gateway.call import Call, Targets
from engine.errors import BadRequest
from engine.request import Grammar, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN_MAX = 2**31 - 1
DEFAULT_COMPLETION_TOKENS = 16
NOT_SUPPORTED = "is not supported by this server"
MOST_ERRORS = 1000
"""That one body may have and still be told its first: each takes memory a hundredfold."""

TokenId = Annotated[int, Field(ge=0, le=TOKEN_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
"""As long as a body may be: of a million wrong ones the first is enough to be told."""
StopText = Annotated[str, Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Target = Annotated[float, Field(gt=0.0, le=86400.0)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Shape):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With include_usage: the usage so far on every chunk, as in vLLM."""
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Shape):
    name: str = Field(default="", max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Shape):
    type: Literal["text"]


class JsonObjectFormat(Shape):
    type: Literal["json_object"]


class JsonSchemaFormat(Shape):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Shape):
    type: Literal["regex"]
    regex: str


class ChoiceFormat(Shape):
    type: Literal["choice"]
    choices: list[str] = Field(min_length=1, fail_fast=True)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat,
    Field(discriminator="type"),
]


class SamplingBody(Shape):
    """What completions and chat completions have in common."""

    model: str | None = Field(default=None, max_length=512)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
            Annotated[float, Field(ge=-100.0, le=100.0)],
        ]
        | None
    ) = Field(default=None, fail_fast=True)
    max_tokens: Annotated[int, Field(ge=1, le=TOKEN_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKEN_MAX)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=TOKEN_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=TOKEN_MAX)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=TOKEN_MAX)] | None = None
    """0 and -1 take every token, as in vLLM."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """Higher is more urgent."""
    response_format: ResponseFormat | None = None
    slo_ttft_s: Target | None = None
    slo_tpot_s: Target | None = None
    user: str | None = Field(default=None, max_length=1024)

    def call(self, **options: Any) -> Call:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Call(
            seed=self.seed,
            n=self.n or 1,
            stop=stop,
            priority=self.priority or 0,
            targets=Targets(self.slo_ttft_s, self.slo_tpot_s),
            **options,
        )

    def sampling(self, logprobs: int | None) -> Sampling:
        given = {
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        return Sampling(
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=bias,
            grammar=grammar_of(self.response_format),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    @property
    def usage(self) -> UsageOn:
        options = self.stream_options
        if options is None or not options.include_usage:
            return UsageOn.NO_CHUNK
        return UsageOn.EVERY_CHUNK if options.continuous_usage_stats else UsageOn.LAST_CHUNK

    def answer_tokens(self) -> int | None:
        """The limit on the answer, by its newer or its older name."""
        if self.max_completion_tokens is None or self.max_tokens is None:
            return self.max_tokens or self.max_completion_tokens
        if self.max_tokens != self.max_completion_tokens:
            raise BadRequest("max_tokens", self.max_tokens, "contradicts max_completion_tokens")
        return self.max_tokens


class CompletionBody(SamplingBody):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=TOKEN_MAX)] | None = None
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def to_call(self) -> Call:
        return self.call(
            prompts=tuple(_prompts(self.prompt)),
            sampling=self.sampling(self.logprobs),
            max_tokens=self.answer_tokens() or DEFAULT_COMPLETION_TOKENS,
            echo=self.echo,
            id_prefix="cmpl-",
        )


class TextPart(Shape):
    type: Literal["text"]
    text: str


class ChatMessage(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_call_id: str | None = Field(default=None, max_length=256)
    refusal: str | None = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None
    annotations: Nothing = None

    def to_template(self) -> dict[str, Any]:
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        named = {key: value for key, value in optional.items() if value is not None}
        return {"role": self.role, "content": content, **named}


class ChatBody(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOKEN_MAX)] | None = None
    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: Nothing = None
    metadata: Annotated[dict[str, str], Field(max_length=16, fail_fast=True)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    parallel_tool_calls: bool | None = None
    prediction: None = None
    prompt_cache_key: None = None
    reasoning_effort: None = None
    safety_identifier: str | None = Field(default=None, max_length=1024)
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Nothing = None
    verbosity: None = None
    web_search_options: None = None

    def to_call(self) -> Call:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs", self.top_logprobs, "needs logprobs to be true")
        return self.call(
            chat=tuple(message.to_template() for message in self.messages),
            sampling=self.sampling((self.top_logprobs or 0) if self.logprobs else None),
            max_tokens=self.answer_tokens(),
            id_prefix="chatcmpl-",
        )


class TokenizeBody(Shape):
    model: str | None = Field(default=None, max_length=512)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, fail_fast=True)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(Shape):
    model: str | None = Field(default=None, max_length=512)
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


Body = TypeVar("Body", bound=BaseModel)
UNSUPPORTED = frozenset({
    "annotations", "audio", "best_of", "function_call", "functions",
    "include_obfuscation", "modalities", "prediction", "prompt_cache_key", "reasoning_effort",
    "service_tier", "store", "suffix", "tool_calls", "tool_choice", "tools", "verbosity",
    "web_search_options",
})  # fmt: skip


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Raises BadRequest for the first thing that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MOST_ERRORS:
            rule = "errors: unknown fields, or items of a wrong type"
            raise BadRequest("body", error.error_count(), rule) from None
        raise _bad_request(error) from None


def grammar_of(given: ResponseFormat | None) -> Grammar | None:
    match given:
        case JsonObjectFormat():
            return Grammar("json_object", "")
        case JsonSchemaFormat(json_schema=schema):
            return Grammar("json_schema", json.dumps(schema.schema_))
        case RegexFormat(regex=regex):
            return Grammar("regex", regex)
        case ChoiceFormat(choices=choices):
            return Grammar("choice", json.dumps(choices))
        case _:
            return None


def _prompts(prompt: str | list[Any]) -> Iterator[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt[0], int):
        yield tuple(prompt)
    else:
        yield from (one if isinstance(one, str) else tuple(one) for one in prompt)


def _bad_request(error: ValidationError) -> BadRequest:
    """The first error, in terms of the field and not of the union it was tried against."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    value = _shown(first.get("input"))
    if not path:
        return BadRequest("body", value, first["msg"])
    name = path[0]
    if any(part in UNSUPPORTED for part in path) and first["type"] != "extra_forbidden":
        return BadRequest(name, value, NOT_SUPPORTED)
    if first["type"] == "extra_forbidden":
        return BadRequest(".".join(path), value, "unknown field")
    rules = sorted({each["msg"] for each in error.errors() if each["loc"][0] == first["loc"][0]})
    return BadRequest(name, value, "; ".join(rules[:4]))


def _shown(value: object) -> object:
    """A value short enough for an error message."""
    text = repr(value)
    return value if len(text) <= 80 else text[:77] + "..."
