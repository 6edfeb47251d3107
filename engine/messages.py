"""What gateways, instances and the controller tell each other. Plain records; wire.py encodes.

Every message about a request carries the epoch its sender believes in, so that lost,
late and repeated messages do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.batch import Logprobs
from engine.layout import KvLayout
from engine.request import FinishReason, Request

# Gateway -> instance.


@dataclass(frozen=True, slots=True)
class Start:
    """Prefill prompt + output and draw the next token as owner `epoch`.

    With a target, hand the KV to it afterwards: it goes on as owner `target_epoch`, which the
    gateway accepts without being asked. Without one, this instance decodes too.
    """

    request: Request
    epoch: int
    output: tuple[int, ...] = ()
    target: str | None = None
    target_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop everything about the request up to and including `epoch`."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Answer to a Claim: whether the target became the owner under `epoch`."""

    request_id: str
    epoch: int
    granted: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first token of `epoch` was delivered: the owner before it may free its blocks."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Resume:
    """The target died before its first token: the source goes on as owner `epoch`."""

    request_id: str
    old_epoch: int
    epoch: int


# Instance -> gateway.


@dataclass(frozen=True, slots=True)
class Token:
    request_id: str
    epoch: int
    index: int
    """Position in the output."""
    token: int
    finish: FinishReason | None = None
    logprobs: Logprobs | None = None
    stamps: tuple[tuple[str, float], ...] = ()
    """Moments of events.Timeline that this token makes known, `kv_bytes` that were copied, and
    `cached_tokens` of the prompt that were not computed."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens of one step that belong to one gateway."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """Asks to make `target` the owner under `epoch`, if `old_epoch` still is one's own."""

    request_id: str
    old_epoch: int
    epoch: int
    target: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """The instance no longer works on this request; the gateway replays or fails it."""

    request_id: str
    epoch: int
    error: str
    """Name of the error's class in engine/errors.py."""
    reason: str
    handoff: bool = False
    """Whether that is because its hand-off, which had begun, did not commit."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The owner `epoch` found no room at its target and goes on decoding by itself."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Migrated:
    """How a migration ended, for status, metrics and the person watching."""

    request_id: str
    source: str
    target: str
    reason: str
    outcome: str
    """committed, or the name of the error that ended it."""
    pause_s: float
    total_s: float
    kv_bytes: int


class Role(str, Enum):
    """Which schedulers an instance runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class InstanceState(str, Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Running:
    """One sequence on an instance, as balancers see it."""

    request_id: str
    epoch: int
    state: str
    """A SequenceState, or the TransferState it is in."""
    priority: int
    prompt_tokens: int
    output_tokens: int
    blocks: int
    target: str | None = None
    """Who takes it over once its prompt is computed here."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an instance tells gateways and the controller, at changes and as its heartbeat."""

    instance: str
    role: Role
    state: InstanceState
    queue_requests: int
    queued_tokens: int
    """Prompt tokens still to compute, of requests waiting or under way."""
    running_sequences: int
    running_tokens: int
    """Context tokens of the running sequences."""
    free_blocks: int
    """Free or holding only a prefix that nobody uses."""
    total_blocks: int
    block_tokens: int
    pinned_blocks: int
    cached_blocks: int
    step_s: float
    """Smoothed duration of a step of decodes alone; 0 while nobody decodes."""
    sequences: tuple[Running, ...]
    wanted_blocks: int = 0
    """What those that wait here for room are short of."""


# Controller or gateway -> instance.


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move a running request to another instance."""

    request_id: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The named instance or gateway is gone."""

    name: str


# Source instance <-> target instance.


class TransferKind(str, Enum):
    HANDOFF = "handoff"
    MIGRATION = "migration"


@dataclass(frozen=True, slots=True)
class Offer:
    """KV that the target may come for, once it has reserved blocks for `tokens` tokens."""

    transfer: str
    kind: TransferKind
    request: Request
    epoch: int
    """The target's, once committed."""
    gateway: str
    layout: KvLayout
    tokens: int
    """Prompt and output tokens to make room for, growth included."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """The target has room; the source keeps the blocks readable from here on."""

    transfer: str


@dataclass(frozen=True, slots=True)
class Ready:
    """KV of the first `tokens` positions in layers [first_layer, last_layer) may be read."""

    transfer: str
    tokens: int
    first_layer: int
    last_layer: int
    blocks: tuple[int, ...]
    """The source's block table up to there."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """Nothing more will be written: the transfer is `computed` tokens of KV and this output."""

    transfer: str
    output: tuple[int, ...]
    computed: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pulled:
    """The target has a copy of the first `tokens` positions, in all layers."""

    transfer: str
    tokens: int
    checked: bool
    """Whether it has compared the copy with what was sealed, if it compares at all."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The source held its blocks for the whole copy: the target may use `computed` tokens of
    it and go on after this output."""

    transfer: str
    output: tuple[int, ...]
    computed: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Either side gives up; the other frees what it holds for this transfer."""

    transfer: str
    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fenced:
    """No copy of a cancelled transfer is in flight any more: the source may unpin."""

    transfer: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Heartbeat of a transfer in either direction."""

    transfer: str


# Gateway <-> gateway.


@dataclass(frozen=True, slots=True)
class Query:
    """One gateway asks another about what only the owner of a request knows."""

    number: int
    about: str
    body: bytes = b""
    """JSON, as the asker and the answerer of `about` agree."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to the Query of this number."""

    number: int
    body: bytes


Message = (
    Start
    | Abort
    | Load
    | Verdict
    | Accepted
    | Resume
    | Tokens
    | Claim
    | Dropped
    | Kept
    | Migrated
    | Migrate
    | Lost
    | Offer
    | Reserved
    | Ready
    | Sealed
    | Pulled
    | Confirmed
    | Cancelled
    | Fenced
    | Renew
    | Query
    | Reply
)
