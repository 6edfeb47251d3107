"""The source side of an instance's transfers: what it offers, keeps readable and confirms.

Blocks stay pinned from the moment the target may read them until the transfer committed, the
target fenced its copies, or the target is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.messages import (
    Cancelled,
    Confirmed,
    Fenced,
    Offer,
    Pulled,
    Renew,
    Reserved,
    TransferKind,
)
from kvtransfer.transfer import Outgoing, TransferSettings, TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.blocks import BlockPool
    from engine.layout import KvLayout
    from engine.messages import Message
    from engine.request import Sequence

    Send = Callable[[str, Message], None]

REMEMBERED = 4096
"""Committed transfers kept in mind, to answer a repeated question about them."""


@dataclass(frozen=True, slots=True)
class _Fencing:
    """Blocks of an aborted transfer that its target may still be reading."""

    target: str
    blocks: tuple[int, ...]
    until_s: float


class Departures:
    def __init__(
        self, pool: BlockPool, layout: KvLayout, settings: TransferSettings, send: Send
    ) -> None:
        self.layout, self.settings = layout, settings
        self._pool, self._send = pool, send
        self._offered = 0
        self._open: dict[str, Outgoing] = {}
        self._fencing: dict[str, _Fencing] = {}
        self._committed: dict[str, tuple[str, Confirmed]] = {}
        self._next_word_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._fencing)

    @property
    def open(self) -> tuple[Outgoing, ...]:
        return tuple(self._open.values())

    def find(self, transfer: str, sender: str) -> Outgoing | None:
        """The open transfer of this name to this target."""
        out = self._open.get(transfer)
        return out if out is not None and out.target == sender else None

    def of(self, request_id: str) -> Outgoing | None:
        return next((out for out in self._open.values() if out.sequence.id == request_id), None)

    # What the source does.

    def offer(
        self,
        kind: TransferKind,
        sequence: Sequence,
        *,
        gateway: str,
        target: str,
        epoch: int,
        now: float,
        reason: str = "",
    ) -> Outgoing:
        lease_until_s = now + self.settings.lease_s
        self._offered += 1
        name = f"{sequence.id}@{epoch}.{self._offered}"
        out = Outgoing(name, kind, sequence, gateway, target, epoch, now, lease_until_s, reason)
        self._open[name] = out
        self._say(out, self._offer_of(out), now)
        return out

    def ready(self, out: Outgoing, tokens: int, layers: range, now: float) -> None:
        """Let the target read the first `tokens` positions of these layers."""
        self._pin(out, tokens)
        if out.state is TransferState.RESERVED:
            out.become(TransferState.COPYING)
        self._say(out, out.ready(tokens, layers), now)

    def seal(self, out: Outgoing, now: float) -> None:
        self._pin(out, out.sequence.computed)
        if out.state is TransferState.RESERVED:
            out.become(TransferState.COPYING)
        self._say(out, out.seal(now), now)

    def commit(self, out: Outgoing, now: float) -> None:
        """The blocks were held for the whole copy: the target may use it."""
        assert out.sealed is not None
        out.become(TransferState.COMMITTED)
        confirmed = Confirmed(out.id, out.sealed.output, out.sealed.computed)
        self._say(out, confirmed, now)
        self._pool.unpin(out.pinned)
        self._forget(out)
        self._committed[out.id] = out.target, confirmed
        while len(self._committed) > REMEMBERED:
            del self._committed[next(iter(self._committed))]

    def abort(self, out: Outgoing, error: str, reason: str, now: float) -> None:
        """Give up; the blocks stay pinned until the target says that it reads no more."""
        self._send(out.target, Cancelled(out.id, error, reason))
        self._quarantine(out, now)

    # What the target says.

    def reserved(self, sender: str, message: Reserved, now: float) -> Outgoing | None:
        """The transfer, if this is news."""
        out = self._heard(message.transfer, sender, now)
        if out is None or out.state is not TransferState.OFFERED:
            return None
        out.become(TransferState.RESERVED)
        return out

    def pulled(self, sender: str, message: Pulled, now: float) -> Outgoing | None:
        """The transfer, if the target got further; a question about an unknown one fails it."""
        out = self._heard(message.transfer, sender, now)
        if out is None or (out.sealed is None and message.tokens <= out.pulled_tokens):
            return None
        out.pulled_tokens = max(message.tokens, out.pulled_tokens)
        out.checked = out.checked or message.checked
        return out

    def cancelled(self, sender: str, message: Cancelled, now: float) -> Outgoing | None:
        """The target gives up: the transfer, if it was open."""
        out = self.find(message.transfer, sender)
        if out is not None:
            self._quarantine(out, now)
        return out

    def fenced(self, sender: str, message: Fenced) -> None:
        fencing = self._fencing.get(message.transfer)
        if fencing is not None and fencing.target == sender:
            self._pool.unpin(self._fencing.pop(message.transfer).blocks)

    def renew(self, sender: str, message: Renew, now: float) -> None:
        self._heard(message.transfer, sender, now)

    def lost(self, peer: str, now: float) -> list[Outgoing]:
        """Transfers that ended because their target is gone: it reads nothing any more."""
        ended = [out for out in self._open.values() if out.target == peer]
        for out in ended:
            self._quarantine(out, now)
        for name, fencing in list(self._fencing.items()):
            if fencing.target == peer:
                self._pool.unpin(self._fencing.pop(name).blocks)
        return ended

    def tick(self, now: float) -> list[Outgoing]:
        """Repeat the last word where it is due; returns transfers whose lease ran out."""
        expired = [out for out in self._open.values() if now > out.lease_until_s]
        for out in expired:
            self.abort(out, "LeaseExpired", f"nothing heard from {out.target}", now)
        for name, fencing in list(self._fencing.items()):
            if now > fencing.until_s:
                self._pool.unpin(self._fencing.pop(name).blocks)
        for out in self._open.values():
            if now >= self._next_word_s[out.id]:
                self._say(out, self._last_word(out), now)
        return expired

    def _offer_of(self, out: Outgoing) -> Offer:
        """Room for what is there and for what a step or a few will add meanwhile."""
        sequence = out.sequence
        growth = 1 if out.kind is TransferKind.HANDOFF else 2 * self.layout.block_tokens
        tokens = len(sequence.tokens) + growth
        request = sequence.request
        return Offer(out.id, out.kind, request, out.epoch, out.gateway, self.layout, tokens)

    def _last_word(self, out: Outgoing) -> Message:
        if out.state is TransferState.OFFERED:
            return self._offer_of(out)
        return out.sealed or Renew(out.id)

    def _say(self, out: Outgoing, message: Message, now: float) -> None:
        self._next_word_s[out.id] = now + self.settings.heartbeat_s
        self._send(out.target, message)

    def _heard(self, transfer: str, sender: str, now: float) -> Outgoing | None:
        out = self.find(transfer, sender)
        if out is not None:
            out.lease_until_s = now + self.settings.lease_s
            return out
        target, confirmed = self._committed.get(transfer, (None, None))
        if target == sender and confirmed is not None:
            self._send(sender, confirmed)
        else:
            self._send(sender, Cancelled(transfer, "LeaseExpired", "the source has let go"))
        return None

    def _pin(self, out: Outgoing, tokens: int) -> None:
        needed = blocks_for(tokens, self.layout.block_tokens)
        fresh = out.sequence.blocks[len(out.pinned) : needed]
        self._pool.pin(fresh)
        out.pinned.extend(fresh)

    def _quarantine(self, out: Outgoing, now: float) -> None:
        out.become(TransferState.ABORTED)
        self._forget(out)
        if out.pinned:
            until_s = now + self.settings.lease_s
            self._fencing[out.id] = _Fencing(out.target, tuple(out.pinned), until_s)

    def _forget(self, out: Outgoing) -> None:
        del self._open[out.id]
        del self._next_word_s[out.id]
