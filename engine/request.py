"""What a client asked for (frozen) and the state of answering it (mutable, one owner)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.slo import Slo

GREEDY_BELOW = 1e-5
"""A temperature under which the most likely token is taken."""


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output; `kind` is json_object, json_schema, regex or choice."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `top_k` and `logprobs` are off when None."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None

    @property
    def reads_history(self) -> bool:
        """Whether the next draw depends on earlier tokens other than through the model."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or self.grammar is not None
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def is_filtered(self) -> bool:
        """Whether a draw is from the likelier tokens alone."""
        filters = self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0
        return filters and not self.is_greedy


@dataclass(frozen=True, slots=True)
class Request:
    """One stream of output tokens; the gateway turns n > 1 into n requests."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    slo: Slo = field(default_factory=Slo)
    priority: int = 0
    """Higher is more urgent."""
    arrival_s: float = 0.0
    tenant: str = ""
    """Salts the prefix cache: tenants never see each other's hits."""

    @property
    def ttft_deadline_s(self) -> float:
        return self.arrival_s + self.slo.ttft_s


class SequenceState(str, Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    HELD = "held"
    """Prefilled, its KV waiting to be pulled by the decode side."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on one instance: its tokens so far and the blocks that hold their KV."""

    request: Request
    epoch: int
    tokens: list[int]
    """Prompt, then every output token so far."""
    state: SequenceState = SequenceState.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Leading tokens whose KV is in `blocks`."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def ends_next(self) -> bool:
        """Whether the next token is the last one, whichever it is."""
        return self.output_tokens + 1 >= self.request.sampling.max_tokens

    def finish_reason(self, eos: frozenset[int]) -> FinishReason | None:
        """Why the last output token ends the answer, or None if it goes on."""
        sampling, last = self.request.sampling, self.tokens[-1]
        if self.output_tokens >= sampling.max_tokens:
            stops = self._stops_at(last, eos)
            return FinishReason.STOP if stops else FinishReason.LENGTH
        return FinishReason.STOP if self._stops_at(last, eos) else None

    def _stops_at(self, token: int, eos: frozenset[int]) -> bool:
        sampling = self.request.sampling
        if self.output_tokens < max(sampling.min_tokens, 1):
            return False
        return token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)


def start_sequence(request: Request, epoch: int, output: tuple[int, ...] = ()) -> Sequence:
    """A sequence with no KV yet; `output` is what was already delivered (replay)."""
    return Sequence(request, epoch, [*request.prompt, *output])
