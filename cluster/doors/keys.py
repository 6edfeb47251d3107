"""API keys: hashed in a file that is read again when it changes, with tenants and rate limits."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.yaml_file import read_yaml
from engine.errors import BadConfig, BadRequest, Overloaded, TandemError

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.gateway.answer import Answer, Delta

LOG = logging.getLogger(__name__)
LOOK_AGAIN_S = 1.0
"""How often the file's time of change is looked at."""
SALT_BYTES = 16
VERIFIED_KEPT = 4096
OPEN_TENANT = ""


class Unauthorized(TandemError):
    pass


class NotAllowed(TandemError):
    """The key is known, but not for this."""


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    hash: Annotated[str, Field(pattern=r"^sha256\$[0-9a-f]{32}\$[0-9a-f]{64}$")]
    """What `tandem keys new` gives: sha256$SALT$DIGEST."""
    tenant: Annotated[str, Field(min_length=1, max_length=128)]
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """The highest priority that a request under this key may have."""
    requests_per_minute: Annotated[float, Field(gt=0.0)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0.0)] | None = None
    """Prompt tokens once they are known, output tokens as they come; the last request to be let in
    may overdraw it."""
    operator: bool = False
    """Whether it may use the gRPC Cluster service and see the live page."""


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keys: list[KeyEntry]


class Bucket:
    """Fills at a steady rate up to a minute's worth; may be overdrawn by the last taker."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._rate = per_minute / 60.0
        self._most = self._level = per_minute
        self._at_s = now

    def wait_s(self, now: float) -> float:
        """How long until there is anything to take."""
        self._level = min(self._most, self._level + (now - self._at_s) * self._rate)
        self._at_s = now
        least = min(1.0, self._most)
        return 0.0 if self._level >= least else (least - self._level) / self._rate

    def take(self, amount: float) -> None:
        self._level -= amount


@dataclass(slots=True, eq=False)
class Caller:
    """Who sends a request, and what is left of its rates."""

    tenant: str = OPEN_TENANT
    priority: int = 1000
    operator: bool = True
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def enter(self, now: float) -> None:
        """Count a request; raises Overloaded while a rate is used up."""
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            wait_s = 0.0 if bucket is None else bucket.wait_s(now)
            if wait_s > 0.0:
                raise Overloaded(f"this key's {what} per minute are used up", wait_s)
        if self.requests is not None:
            self.requests.take(1.0)

    def must_operate(self) -> None:
        """Raises NotAllowed unless the key is an operator's."""
        if not self.operator:
            raise NotAllowed("this key may not operate the cluster")

    def priority_of(self, asked: int | None) -> int:
        """What a request gets, also one that says nothing under a key that may not ask for 0."""
        if asked is None:
            return min(self.priority, 0)
        if asked > self.priority:
            raise BadRequest("priority", asked, f"this key's priority ends at {self.priority}")
        return asked

    def spend(self, tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(tokens)


EVERYONE = Caller()
"""Who calls a server without keys."""


class Metered:
    """An answer that is charged to its caller as it grows: others must not be let in on tokens that
    those under way have taken."""

    def __init__(self, answer: Answer, caller: Caller) -> None:
        self.answer = answer
        self._caller, self._charged_tokens = caller, 0
        self.charge()

    async def next(self) -> list[Delta]:
        deltas = await self.answer.next()
        self.charge()
        return deltas

    def charge(self) -> None:
        """For all since the last time."""
        tokens = self.answer.prompt_tokens + self.answer.output_tokens
        self._caller.spend(tokens - self._charged_tokens)
        self._charged_tokens = tokens


class Keyring:
    """The keys of one file. A file that turns bad keeps the keys it had, and says so."""

    def __init__(self, path: Path, now: float) -> None:
        self._path = path
        self._looked_s = now
        self._changed_ns = path.stat().st_mtime_ns if path.exists() else 0
        self._entries = read_keys(path)
        self._callers: dict[KeyEntry, Caller] = {}
        self._verified: dict[bytes, KeyEntry] = {}

    def caller(self, key: str | None, now: float) -> Caller:
        """Raises Unauthorized for a key that is missing or unknown."""
        if now - self._looked_s > LOOK_AGAIN_S:
            self._looked_s = now
            self._read_again()
        if not key:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY")
        entry = self._find(key)
        if entry is None:
            raise Unauthorized("the API key is not known")
        if entry not in self._callers:
            self._callers[entry] = _caller(entry, now)
        return self._callers[entry]

    def _find(self, key: str) -> KeyEntry | None:
        digest = hashlib.sha256(key.encode()).digest()
        if digest not in self._verified:
            # Every entry is compared, so that the time taken tells nothing.
            matching = [entry for entry in self._entries if matches(key, entry.hash)]
            if not matching:
                return None
            while len(self._verified) >= VERIFIED_KEPT:
                del self._verified[next(iter(self._verified))]
            self._verified[digest] = matching[0]
        return self._verified[digest]

    def _read_again(self) -> None:
        try:
            changed_ns = self._path.stat().st_mtime_ns
            if changed_ns == self._changed_ns:
                return
            self._changed_ns = changed_ns
            entries = read_keys(self._path)
        except (BadConfig, OSError) as error:
            LOG.warning("keys kept, file unreadable path=%s error=%s", self._path, error)
            return
        kept = set(entries)
        self._entries = entries
        self._verified.clear()
        self._callers = {entry: c for entry, c in self._callers.items() if entry in kept}
        LOG.info("keys read path=%s keys=%d", self._path, len(entries))


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    try:
        return tuple(KeyFile.model_validate(read_yaml(path)).keys)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        # The value is not shown: somebody may have put a key where its hash belongs.
        raise BadConfig(f"{path.name}: {where}", "(hidden)", first["msg"]) from None


def new_key() -> str:
    return "tk-" + secrets.token_urlsafe(32)


def hash_key(key: str, salt: bytes | None = None) -> str:
    """What to put into the file for a key. Keys are long and random, so one round is enough."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    return f"sha256${salt.hex()}${hashlib.sha256(salt + key.encode()).hexdigest()}"


def matches(key: str, hashed: str) -> bool:
    salt = bytes.fromhex(hashed.split("$")[1])
    return hmac.compare_digest(hash_key(key, salt), hashed)


def _caller(entry: KeyEntry, now: float) -> Caller:
    def bucket(per_minute: float | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, now)

    return Caller(
        entry.tenant,
        entry.priority,
        entry.operator,
        bucket(entry.requests_per_minute),
        bucket(entry.tokens_per_minute),
    )
