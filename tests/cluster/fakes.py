"""An instance that computes nothing: the next token is a hash of the seed and the position.

It speaks every message that gateways see, hand-off and migration included, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from engine.batch import Logprobs
from engine.messages import (
    Abort,
    Accepted,
    Claim,
    Dropped,
    InstanceState,
    Load,
    Message,
    Migrate,
    Resume,
    Role,
    Running,
    Start,
    Token,
    Tokens,
    Verdict,
)
from engine.request import FinishReason, Request

VOCABULARY = 256

Draw = Callable[[Request, int], int]


def hash_token(request: Request, index: int) -> int:
    """Every instance draws the same token at the same position of the same request."""
    key = f"{request.sampling.seed}/{len(request.prompt)}/{index}".encode()
    return blake2b(key, digest_size=2).digest()[0] % VOCABULARY


def hash_tokens(request: Request) -> list[int]:
    return [hash_token(request, index) for index in range(request.sampling.max_tokens)]


@dataclass(frozen=True)
class Handed:
    """A whole transfer in one message: what the target needs to go on."""

    request: Request
    epoch: int
    gateway: str
    output: tuple[int, ...]


@dataclass
class FakeSequence:
    request: Request
    epoch: int
    gateway: str
    output: list[int]
    target: str | None = None
    target_epoch: int | None = None
    claiming: Claim | None = None
    given_to: str | None = None
    """Handed over; kept until the gateway has accepted the new owner's first token."""

    @property
    def state(self) -> str:
        return "running" if self.given_to is None else "committed"

    @property
    def decodes(self) -> bool:
        return self.claiming is None and self.given_to is None


@dataclass
class EchoInstance:
    name: str
    role: Role = Role.MIXED
    draw: Draw = hash_token
    eos: int | None = None
    total_blocks: int = 1024
    sequences: dict[str, FakeSequence] = field(default_factory=dict)
    outbox: list[tuple[str, Message]] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    buried: dict[str, int] = field(default_factory=dict)
    """The epochs up to which requests were aborted."""
    state: InstanceState = InstanceState.READY

    def receive(self, sender: str, message: Message) -> None:
        match message:
            case Start():
                self._start(sender, message)
            case Handed():
                self._arrived(message)
            case Abort(request_id, epoch):
                self.buried[request_id] = max(epoch, self.buried.get(request_id, epoch))
                self._drop(request_id, epoch)
            case Accepted(request_id, epoch):
                self._drop(request_id, epoch - 1)
            case Verdict():
                self._decided(message)
            case Resume(request_id, old_epoch, epoch):
                sequence = self.sequences.get(request_id)
                if sequence is not None and sequence.epoch == old_epoch:
                    sequence.epoch, sequence.claiming, sequence.given_to = epoch, None, None
            case Migrate(request_id, target):
                self._migrate(request_id, target)

    def step(self) -> list[Token]:
        """One token for each sequence that decodes, sent to its gateway."""
        by_gateway: dict[str, list[Token]] = {}
        for sequence in list(self.sequences.values()):
            if sequence.decodes:
                by_gateway.setdefault(sequence.gateway, []).append(self._next_token(sequence))
        for gateway, tokens in by_gateway.items():
            self.outbox.append((gateway, Tokens(tuple(tokens))))
        return [token for tokens in by_gateway.values() for token in tokens]

    def take_outbox(self) -> list[tuple[str, Message]]:
        sent, self.outbox = self.outbox, []
        return sent

    def load(self) -> Load:
        running = tuple(
            Running(one.request.id, one.epoch, one.state, 0, len(one.request.prompt), 0, 1)
            for one in self.sequences.values()
        )
        free = self.total_blocks - len(running)
        return Load(
            self.name, self.role, self.state, 0, 0, len(running), 0, free, self.total_blocks,
            16, 0, 0, 0.001, running,
        )  # fmt: skip

    def _start(self, sender: str, start: Start) -> None:
        held = self.sequences.get(start.request.id)
        if self.buried.get(start.request.id, 0) >= start.epoch:
            stale = Dropped(start.request.id, start.epoch, "StaleEpoch", "aborted")
            self.outbox.append((sender, stale))
        elif held is None or held.epoch < start.epoch:
            self.starts.append(start)
            self.sequences[start.request.id] = FakeSequence(
                start.request, start.epoch, sender, list(start.output),
                start.target, start.target_epoch,
            )  # fmt: skip

    def _next_token(self, sequence: FakeSequence) -> Token:
        request, index = sequence.request, len(sequence.output)
        token = self.draw(request, index)
        sequence.output.append(token)
        finish = self._finish(sequence, token)
        logprobs = None
        if request.sampling.logprobs is not None:
            top = tuple((token + n, -0.5 - n) for n in range(request.sampling.logprobs))
            logprobs = Logprobs(-0.5, top)
        if finish is not None:
            del self.sequences[request.id]
        elif sequence.target is not None:
            self._hand_over(sequence, sequence.target, sequence.target_epoch or 0)
        return Token(request.id, sequence.epoch, index, token, finish, logprobs)

    def _finish(self, sequence: FakeSequence, token: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if len(sequence.output) >= sampling.min_tokens and (
            token in sampling.stop_token_ids or (token == self.eos and not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.output) >= sampling.max_tokens else None

    def _hand_over(self, sequence: FakeSequence, target: str, epoch: int) -> None:
        handed = Handed(sequence.request, epoch, sequence.gateway, tuple(sequence.output))
        sequence.given_to = target
        self.outbox.append((target, handed))

    def _arrived(self, handed: Handed) -> None:
        held = self.sequences.get(handed.request.id)
        if held is None or held.epoch < handed.epoch:
            self.sequences[handed.request.id] = FakeSequence(
                handed.request, handed.epoch, handed.gateway, list(handed.output)
            )

    def _migrate(self, request_id: str, target: str) -> None:
        sequence = self.sequences.get(request_id)
        if sequence is not None and sequence.decodes and sequence.target is None:
            sequence.claiming = Claim(request_id, sequence.epoch, sequence.epoch + 1, target)
            self.outbox.append((sequence.gateway, sequence.claiming))

    def ask_again(self) -> None:
        """Repeat the claims that have no verdict yet."""
        for sequence in self.sequences.values():
            if sequence.claiming is not None and sequence.given_to is None:
                self.outbox.append((sequence.gateway, sequence.claiming))

    def _decided(self, verdict: Verdict) -> None:
        sequence = self.sequences.get(verdict.request_id)
        claim = None if sequence is None else sequence.claiming
        if sequence is None or claim is None or claim.epoch != verdict.epoch:
            return
        sequence.claiming = None
        if verdict.granted:
            self._hand_over(sequence, claim.target, claim.epoch)

    def _drop(self, request_id: str, epoch: int) -> None:
        held = self.sequences.get(request_id)
        if held is not None and held.epoch <= epoch:
            del self.sequences[request_id]
