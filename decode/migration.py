"""What a decode-capable instance does beside computing: let running sequences move away.

Full rounds are copied while the sequence goes on decoding. When the rest can move within the
pause budget it stops at a step's end and is sealed; once all is copied the gateway is asked to
swap the owner. The sequence keeps its blocks here until the target's first token has been
delivered, so that a target that dies costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import StaleEpoch
from engine.messages import Claim, Dropped, Migrated, Resume, TransferKind, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.messages import Message
    from engine.request import Sequence
    from kvtransfer.departures import Departures
    from kvtransfer.transfer import Outgoing

    Send = Callable[[str, Message], None]


@dataclass(slots=True)
class _Asked:
    """Copied in full; the gateway decides who goes on."""

    out: Outgoing
    next_claim_s: float


@dataclass(slots=True)
class _Given:
    """Committed; the target's first token has not been delivered yet."""

    out: Outgoing
    until_s: float


class Migrations:
    def __init__(self, name: str, departures: Departures, send: Send) -> None:
        self._name, self._departures, self._send = name, departures, send
        self._settings = departures.settings
        self._sealing: dict[str, Outgoing] = {}
        self._asked: dict[str, _Asked] = {}
        self._given: dict[str, _Given] = {}
        self._void: dict[str, int] = {}
        """Per sequence, the epoch of a hand-off that was given up: its target refuses it from then
        on."""

    @property
    def held(self) -> set[str]:
        """Sequences that take no token now."""
        stopping = {out.sequence.id for out in self._departures.open if self._stops(out)}
        return stopping | set(self._asked) | set(self._given)

    @property
    def busy(self) -> bool:
        """Whether a sequence may be about to leave, or has just left."""
        offered = (out.kind is TransferKind.MIGRATION for out in self._departures.open)
        return bool(self._asked or self._given) or any(offered)

    @property
    def given(self) -> int:
        return len(self._given)

    def is_given(self, request_id: str) -> bool:
        return request_id in self._given

    def is_undecided(self, request_id: str) -> bool:
        """Whether only the gateway may say who goes on with the request."""
        return request_id in self._asked or request_id in self._given

    def start(self, sequence: Sequence, gateway: str, target: str, reason: str, now: float) -> None:
        self._departures.offer(
            TransferKind.MIGRATION,
            sequence,
            gateway=gateway,
            target=target,
            epoch=max(sequence.epoch, self._void.get(sequence.id, 0)) + 1,
            now=now,
            reason=reason,
        )

    def void(self, out: Outgoing) -> None:
        """A hand-off came to nothing, and its sequence stays here."""
        self._void[out.sequence.id] = out.epoch

    def reserved(self, out: Outgoing, now: float) -> None:
        self._next_round(out, now)

    def pulled(self, out: Outgoing, now: float) -> None:
        if out.fully_pulled:
            if out.sequence.id not in self._asked:
                self._claim(out, now)
        elif out.sealed is None and out.pulled_tokens >= out.round_tokens:
            self._measure(out, now)
            self._next_round(out, now)

    def at_step_end(self, now: float) -> None:
        """No batch is under way: sequences about to stop can be sealed."""
        for out in list(self._sealing.values()):
            del self._sealing[out.id]
            self._departures.seal(out, now)

    def verdict(self, gateway: str, verdict: Verdict, now: float) -> None:
        asked = self._asked.get(verdict.request_id)
        if asked is None or asked.out.gateway != gateway or asked.out.epoch != verdict.epoch:
            return
        out = self._asked.pop(verdict.request_id).out
        if not verdict.granted:
            self._close(out, StaleEpoch.__name__, now)
            return
        self._given[verdict.request_id] = _Given(out, now + self._settings.accept_lease_s)
        if out.over:
            self._give_back(out, "the target gave up before the gateway decided")
        else:
            self._departures.commit(out, now)

    def accepted(self, request_id: str, epoch: int, now: float) -> bool:
        """Whether the sequence has left for good: its blocks may go."""
        given = self._given.get(request_id)
        if given is None or epoch < given.out.epoch:
            return False
        del self._given[request_id]
        self._tell(given.out, "committed", now)
        return True

    def resume(self, sequence: Sequence, resume: Resume, now: float) -> None:
        """The target will not go on: continue here as if nothing had been."""
        given = self._given.pop(sequence.id, None)
        if given is not None:
            self._tell(given.out, "PeerLost", now)
        out = self._departures.of(sequence.id)
        if out is not None:
            self.abort(out, "PeerLost", "the gateway gave the request back", now)
        self._asked.pop(sequence.id, None)
        sequence.epoch = resume.epoch

    def abort(self, out: Outgoing, error: str, reason: str, now: float) -> None:
        self._departures.abort(out, error, reason, now)
        self.failed(out, error, now)

    def failed(self, out: Outgoing, error: str, now: float) -> None:
        """The transfer is over without a commit: the sequence goes on here, unless the gateway
        has been asked already, for then only its answer counts."""
        self._sealing.pop(out.id, None)
        if out.sequence.id not in self._asked:
            self._tell(out, error, now)

    def refused_late(self, transfer: str) -> None:
        """The target gave up while the confirmation was on its way to it."""
        for given in self._given.values():
            if given.out.id == transfer:
                self._give_back(given.out, "the target gave up before it was confirmed")

    def forget(self, request_id: str, now: float) -> None:
        """The request has ended here; who waits for a move that was about to be decided is told."""
        for moving in (self._asked.pop(request_id, None), self._given.pop(request_id, None)):
            if moving is not None:
                self._tell(moving.out, StaleEpoch.__name__, now)
        self._void.pop(request_id, None)

    def tick(self, now: float) -> list[str]:
        """Repeat unanswered claims; returns requests whose gateway never spoke again."""
        for asked in self._asked.values():
            if now >= asked.next_claim_s:
                self._claim(asked.out, now)
        expired = [name for name, given in self._given.items() if now > given.until_s]
        for name in expired:
            self._tell(self._given.pop(name).out, "LeaseExpired", now)
        return expired

    def _stops(self, out: Outgoing) -> bool:
        if out.kind is not TransferKind.MIGRATION:
            return False
        return out.sealed is not None or out.id in self._sealing

    def _close(self, out: Outgoing, error: str, now: float) -> None:
        if out.over:
            self._tell(out, error, now)
        else:
            self.abort(out, error, "the gateway refused the new owner", now)

    def _give_back(self, out: Outgoing, reason: str) -> None:
        """Tell the gateway that the owner it granted will never speak; it answers Resume."""
        self._send(out.gateway, Dropped(out.sequence.id, out.epoch, "TransferError", reason))

    def _next_round(self, out: Outgoing, now: float) -> None:
        """Another round of what is computed by now, or the end of decoding here."""
        if self._rest_fits_the_pause(out) or out.rounds >= self._settings.max_rounds:
            self._sealing[out.id] = out
            return
        out.rounds += 1
        out.round_started_s = now
        out.round_from, out.round_tokens = out.pulled_tokens, out.sequence.computed
        layers = range(self._departures.layout.layers)
        self._departures.ready(out, out.sequence.computed, layers, now)

    def _rest_fits_the_pause(self, out: Outgoing) -> bool:
        if out.tokens_per_s is None:
            return False
        budget_s = min(self._settings.pause_budget_s, out.sequence.request.slo.tpot_s)
        rest = out.sequence.computed - out.pulled_tokens
        return rest / out.tokens_per_s <= budget_s

    def _measure(self, out: Outgoing, now: float) -> None:
        """How fast the last round went; a time too short to see counts as a microsecond."""
        copied = max(out.round_tokens - out.round_from, 1)
        out.tokens_per_s = copied / max(now - out.round_started_s, 1e-6)

    def _claim(self, out: Outgoing, now: float) -> None:
        sequence = out.sequence
        self._asked[sequence.id] = _Asked(out, now + self._settings.heartbeat_s)
        self._send(out.gateway, Claim(sequence.id, sequence.epoch, out.epoch, out.target))

    def _tell(self, out: Outgoing, outcome: str, now: float) -> None:
        pause_s = 0.0 if out.sealed_at_s is None else now - out.sealed_at_s
        layout = self._departures.layout
        token_bytes = layout.instance_block_bytes / layout.block_tokens
        self._send(
            out.gateway,
            Migrated(
                out.sequence.id,
                self._name,
                out.target,
                out.reason,
                outcome,
                pause_s,
                now - out.started_s,
                int(out.pulled_tokens * token_bytes),
            ),
        )
