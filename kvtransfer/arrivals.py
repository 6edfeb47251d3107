"""The target side of an instance's transfers: room, copies, and nothing used unconfirmed.

Reserved blocks of an aborted transfer stay reserved until every copy into them has ended. `admit`
alone takes blocks: whoever calls it knows that nobody reads free ones any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.errors import LayoutMismatch
from engine.messages import (
    Cancelled,
    Confirmed,
    Fenced,
    Offer,
    Pulled,
    Ready,
    Renew,
    Reserved,
    Sealed,
    TransferKind,
)
from engine.request import Sequence
from kvtransfer.plan import check_compatible
from kvtransfer.transfer import Incoming, PullCancel, TransferSettings, TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.blocks import BlockPool
    from engine.errors import TransferError
    from engine.layout import KvLayout
    from engine.messages import Message
    from kvtransfer.transfer import PullOrder

    Send = Callable[[str, Message], None]
    HasRoom = Callable[[int], bool]

REMEMBERED = 4096
"""Ended transfers kept in mind, so that a late offer does not start one again."""


@dataclass(frozen=True, slots=True)
class Arrived:
    gateway: str
    sequence: Sequence
    copied_blocks: int


class Arrivals:
    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        settings: TransferSettings,
        send: Send,
        has_room: HasRoom,
    ) -> None:
        self.layout, self.settings = layout, settings
        self._pool, self._send, self._has_room = pool, send, has_room
        self._open: dict[str, Incoming] = {}
        self._fencing: dict[str, Incoming] = {}
        self._ended: dict[str, None] = {}
        self._next_word_s: dict[str, float] = {}
        self._pulls: list[PullOrder | PullCancel] = []
        self._growing: dict[str, Ready | Sealed] = {}
        """What was said last of a sequence that grew past its reservation while it moved."""

    def __len__(self) -> int:
        return len(self._open) + len(self._fencing)

    @property
    def open(self) -> tuple[Incoming, ...]:
        return tuple(self._open.values())

    @property
    def wanted_blocks(self) -> int:
        """Of offers without a reservation; some may find a part of theirs here already."""
        size = self.layout.block_tokens
        return sum(
            blocks_for(incoming.offer.tokens, size)
            for incoming in self._open.values()
            if incoming.state is TransferState.OFFERED
        )

    def of(self, request_id: str) -> list[Incoming]:
        return [i for i in self._open.values() if i.offer.request.id == request_id]

    def take_pulls(self) -> list[PullOrder | PullCancel]:
        pulls, self._pulls = self._pulls, []
        return pulls

    # What the source says.

    def offer(self, sender: str, offer: Offer, now: float) -> None:
        if offer.transfer in self._open:
            self._heard(offer.transfer, sender, now)
            return
        if offer.transfer in self._ended:
            return
        refusal = self._refusal(offer)
        if refusal is not None:
            self._end(offer.transfer)
            self._send(sender, Cancelled(offer.transfer, *refusal))
            self._send(sender, Fenced(offer.transfer))
            return
        lease_until_s = now + self.settings.lease_s
        prefix = self._pool.hashes(offer.request.prompt, offer.request.tenant)
        compares = self.settings.checksums
        self._open[offer.transfer] = Incoming(offer, sender, lease_until_s, now, prefix, compares)
        self._next_word_s[offer.transfer] = now + self.settings.heartbeat_s

    def admit(self, now: float) -> None:
        """Reserve for what grew, then for waiting offers, the most urgent first, as far as there
        is room."""
        self._grow(now)
        waiting = [i for i in self._open.values() if i.state is TransferState.OFFERED]
        waiting.sort(key=lambda i: (-i.offer.request.priority, i.arrived_s, i.id))
        for incoming in waiting:
            if self._sibling_brings_the_prompt(incoming, now):
                continue
            if not self._reserve(incoming):
                return
            self._say(incoming, Reserved(incoming.id), now)

    def ready(self, sender: str, ready: Ready, now: float) -> None:
        incoming = self._heard(ready.transfer, sender, now)
        if incoming is not None and incoming.state is not TransferState.OFFERED:
            self._follow(incoming, ready, now)

    def sealed(self, sender: str, sealed: Sealed, now: float) -> None:
        incoming = self._heard(sealed.transfer, sender, now)
        if incoming is None or incoming.state is TransferState.OFFERED:
            return
        if incoming.sealed is None:
            self._follow(incoming, sealed, now)
        else:
            self._report(incoming, now)

    def confirmed(self, sender: str, message: Confirmed, now: float) -> Arrived | None:
        """The sequence that may go on here, its KV complete and owned."""
        incoming = self._heard(message.transfer, sender, now)
        if incoming is None or not (incoming.has(message.computed) and incoming.checked):
            return None
        incoming.commit()
        self._forget(incoming)
        self._pool.claim(incoming.reserved)
        sequence = _sequence_of(incoming, message)
        self._remember_prefix(sequence)
        copied = blocks_for(sequence.computed, self.layout.block_tokens) - len(incoming.shared)
        return Arrived(incoming.offer.gateway, sequence, copied)

    def cancelled(self, sender: str, message: Cancelled) -> None:
        incoming = self._open.get(message.transfer)
        if incoming is not None and incoming.source == sender:
            self._abort(incoming)
        elif message.transfer not in self._fencing:
            self._send(sender, Fenced(message.transfer))

    def renew(self, sender: str, message: Renew, now: float) -> None:
        self._heard(message.transfer, sender, now)

    # What happens here.

    def pull_finished(
        self, transfer: str, number: int, error: TransferError | None, now: float
    ) -> None:
        fencing = self._fencing.get(transfer)
        if fencing is not None:
            del fencing.outstanding[number]
            self._settle(fencing)
            return
        incoming = self._open[transfer]
        if error is None:
            incoming.order_done(number)
            self._report(incoming, now)
        else:
            del incoming.outstanding[number]
            self.give_up(incoming, type(error).__name__, str(error))

    def give_up(self, incoming: Incoming, error: str, reason: str) -> None:
        self._send(incoming.source, Cancelled(incoming.id, error, reason))
        self._abort(incoming)

    def lost(self, peer: str) -> None:
        for incoming in list(self._open.values()):
            if incoming.source == peer:
                self._abort(incoming)

    def tick(self, now: float) -> None:
        for incoming in list(self._open.values()):
            if now > incoming.lease_until_s:
                self.give_up(incoming, "LeaseExpired", f"nothing heard from {incoming.source}")
            elif now >= self._next_word_s[incoming.id]:
                self._say(incoming, self._last_word(incoming), now)

    def _refusal(self, offer: Offer) -> tuple[str, str] | None:
        theirs, ours = offer.layout.block_tokens, self.layout.block_tokens
        if theirs != ours:
            return "LayoutMismatch", f"block_tokens: {theirs} at the source, {ours} here"
        try:
            check_compatible(offer.layout, self.layout)
        except LayoutMismatch as error:
            return "LayoutMismatch", str(error)
        needed = blocks_for(offer.tokens, self.layout.block_tokens)
        if needed > self._pool.total_blocks:
            return "OutOfBlocks", f"{needed} blocks wanted of {self._pool.total_blocks}"
        waiting = sum(1 for i in self._open.values() if i.state is TransferState.OFFERED)
        if waiting >= self.settings.max_offers:
            return "Overloaded", f"{waiting} offers are waiting already"
        return None

    def _sibling_brings_the_prompt(self, incoming: Incoming, now: float) -> bool:
        """Whether to wait for another answer to the same prompt that is on its way here: once it
        has come, its prompt's blocks are shared. Finished KV waits half of what it may wait."""
        hand_off = incoming.offer.kind is TransferKind.HANDOFF
        if hand_off and now - incoming.arrived_s > self.settings.offer_wait_s / 2:
            return False
        return bool(incoming.prefix) and any(
            other.state is not TransferState.OFFERED and other.prefix[-1:] == incoming.prefix[-1:]
            for other in self._open.values()
        )

    def _reserve(self, incoming: Incoming) -> bool:
        shared = self._pool.share_prefix(incoming.prefix)
        missing = blocks_for(incoming.offer.tokens, self.layout.block_tokens) - len(shared)
        if not self._has_room(missing):
            self._pool.release(shared)
            return False
        incoming.reserve(shared, self._pool.reserve(missing))
        return True

    def _follow(self, incoming: Incoming, said: Ready | Sealed, now: float) -> None:
        """Orders what may be read by now, or keeps it in mind until there are blocks for it."""
        if self._missing(incoming, said) > 0:
            self._growing[incoming.id] = said
            return
        if isinstance(said, Sealed):
            incoming.sealed = said
            self._pulls.extend(incoming.order_rest())
        else:
            self._pulls.extend(incoming.order(said))
        self._report(incoming, now)

    def _grow(self, now: float) -> None:
        """A sequence that grew past its reservation while it moved gets more, or is refused."""
        growing, self._growing = self._growing, {}
        for transfer, said in growing.items():
            incoming = self._open[transfer]
            missing = self._missing(incoming, said)
            if missing > self._pool.available:
                reason = f"{missing} more blocks wanted while copying"
                self.give_up(incoming, "OutOfBlocks", reason)
            else:
                incoming.reserved.extend(self._pool.reserve(missing))
                self._follow(incoming, said, now)

    def _missing(self, incoming: Incoming, said: Ready | Sealed) -> int:
        """A sealed sequence needs room for the token after those that are computed, too."""
        tokens = said.computed + 1 if isinstance(said, Sealed) else said.tokens
        return blocks_for(tokens, self.layout.block_tokens) - len(incoming.blocks)

    def _report(self, incoming: Incoming, now: float) -> None:
        if incoming.may_compare:
            self._pulls.append(incoming.order_comparison())
        tokens = incoming.complete_tokens
        if tokens is not None and tokens > incoming.reported:
            incoming.reported = tokens
            self._say(incoming, Pulled(incoming.id, tokens, incoming.checked), now)

    def _last_word(self, incoming: Incoming) -> Message:
        if incoming.state is TransferState.RESERVED:
            return Reserved(incoming.id)
        if incoming.reported:
            return Pulled(incoming.id, incoming.reported, incoming.checked)
        return Renew(incoming.id)

    def _say(self, incoming: Incoming, message: Message, now: float) -> None:
        self._next_word_s[incoming.id] = now + self.settings.heartbeat_s
        self._send(incoming.source, message)

    def _heard(self, transfer: str, sender: str, now: float) -> Incoming | None:
        incoming = self._open.get(transfer)
        if incoming is None or incoming.source != sender:
            return None
        incoming.lease_until_s = now + self.settings.lease_s
        return incoming

    def _abort(self, incoming: Incoming) -> None:
        incoming.become(TransferState.ABORTED)
        self._forget(incoming)
        self._fencing[incoming.id] = incoming
        if incoming.outstanding:
            self._pulls.append(PullCancel(incoming.id))
        self._settle(incoming)

    def _settle(self, incoming: Incoming) -> None:
        """Once nothing is written any more, the blocks are free and the source may know."""
        if incoming.outstanding:
            return
        del self._fencing[incoming.id]
        self._pool.release(incoming.shared)
        self._pool.unreserve(incoming.reserved)
        self._send(incoming.source, Fenced(incoming.id))

    def _remember_prefix(self, sequence: Sequence) -> None:
        tokens = sequence.tokens[: sequence.computed]
        hashes = self._pool.hashes(tokens, sequence.request.tenant)
        self._pool.remember(sequence.blocks, hashes)

    def _forget(self, incoming: Incoming) -> None:
        del self._open[incoming.id]
        del self._next_word_s[incoming.id]
        self._growing.pop(incoming.id, None)
        self._end(incoming.id)

    def _end(self, transfer: str) -> None:
        self._ended[transfer] = None
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]


def _sequence_of(incoming: Incoming, confirmed: Confirmed) -> Sequence:
    request = incoming.offer.request
    sequence = Sequence(request, incoming.offer.epoch, [*request.prompt, *confirmed.output])
    sequence.blocks = incoming.blocks
    sequence.computed = confirmed.computed
    return sequence
