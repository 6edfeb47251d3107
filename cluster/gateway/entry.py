"""What the journal knows of one request, its limits, and what it asks its driver to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.errors import TandemError
    from engine.messages import Message, Token
    from engine.request import Request


SUSPECT_CRASHES = 2


@dataclass(frozen=True, slots=True)
class JournalSettings:
    replays: int = 5
    """Attempts in a row without a token in between; then the request fails."""
    crashes: int = 3
    """Instances lost, and batches failed, under a request that has made no progress in between;
    then it is held responsible."""
    progress_tokens: int = 16
    """Delivered tokens after which a crash no longer counts."""
    gap_s: float = 1.0
    """How long a missing token is waited for while later ones arrive."""
    vanish_s: float = 3.0
    """How long a live owner may go without listing the request among its sequences."""
    reroute_s: float = 30.0
    """How long a request may wait for an instance that can take it, once it is its turn."""
    early_tokens: int = 512
    """Tokens held per request while an earlier one is missing."""
    tombstones: int = 10_000
    """Ended requests remembered, so that instances that still list them are told."""


@dataclass(frozen=True, slots=True)
class Send:
    to: str
    message: Message


@dataclass(frozen=True, slots=True)
class Deliver:
    token: Token


@dataclass(frozen=True, slots=True)
class Reroute:
    """The request needs a new route; `avoid` are instances it has just failed on."""

    request_id: str
    avoid: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Its owner goes on with it, whose migration came to nothing; the Resume may be repeated."""

    request_id: str
    owner: str


@dataclass(frozen=True, slots=True)
class Fail:
    request_id: str
    error: TandemError


Action = Send | Deliver | Reroute | Resumed | Fail


@dataclass(frozen=True, slots=True)
class Grant:
    """The owner to be: `claimed` by a migration, else fixed by the route."""

    epoch: int
    instance: str
    claimed: bool


@dataclass(slots=True, eq=False)
class Entry:
    """One request under way. Without an owner it waits for a route."""

    request: Request
    epoch: int = 1
    owner: str | None = None
    grant: Grant | None = None
    prefill: str | None = None
    output: list[int] = field(default_factory=list)
    early: dict[int, Token] = field(default_factory=dict)
    replays: int = 0
    replays_total: int = 0
    migrations: int = 0
    crashes: int = 0
    """Since it last made progress."""
    crashed_at: int = 0
    """Tokens delivered before the last of them."""
    evidence_s: float = 0.0
    """When an owner was last known to work on it."""
    stuck_since_s: float = 0.0
    """Since when it has waited for a route, its turn aside, or, while `early` holds any, for the
    next token."""
    resumed_from: int | None = None
    """The epoch a Resume replaced, until a token shows that the Resume arrived."""
    voided: int = 0
    """The epoch of a grant that came to nothing while its owner went on."""
    claimed_from: int | None = None
    """The epoch from which the present owner's claim was granted."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def highest(self) -> int:
        """The highest epoch anybody has been given."""
        return max(self.epoch, self.voided) if self.grant is None else self.grant.epoch

    @property
    def holders(self) -> tuple[str, ...]:
        """Instances that may hold blocks for it, without former owners told to let go."""
        owner = () if self.owner is None else (self.owner,)
        return owner if self.grant is None else (*owner, self.grant.instance)

    @property
    def needed_tokens(self) -> int:
        """What an instance must have room for to draw its next token."""
        return len(self.request.prompt) + len(self.output) + 1

    def count_crash(self, progress_tokens: int) -> None:
        """After so many tokens since the one before, it is the first one again."""
        if self._progressed(progress_tokens):
            self.crashes = 0
        self.crashes += 1
        self.crashed_at = len(self.output)

    def is_suspect(self, progress_tokens: int) -> bool:
        """Whether it was there at several crashes with no progress in between."""
        return self.crashes >= SUSPECT_CRASHES and not self._progressed(progress_tokens)

    def _progressed(self, tokens: int) -> bool:
        return len(self.output) - self.crashed_at >= tokens

    def knows(self, epoch: int) -> bool:
        return epoch == self.epoch or (self.grant is not None and epoch == self.grant.epoch)
