"""An instance's part in its transfers: what it hands off, what migrates away, and what arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decode.migration import Migrations
from engine.errors import NotFound, Unsupported
from engine.messages import (
    Accepted,
    Cancelled,
    Confirmed,
    Dropped,
    Fenced,
    Kept,
    Migrate,
    Migrated,
    Offer,
    Pulled,
    Ready,
    Renew,
    Reserved,
    Resume,
    Running,
    Sealed,
    TransferKind,
    Verdict,
)
from kvtransfer.arrivals import Arrivals
from kvtransfer.transfer import TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.instance.residents import Residents
    from decode.scheduler import DecodeScheduler
    from engine.blocks import BlockPool
    from engine.errors import TransferError
    from engine.messages import Message
    from engine.request import Sequence
    from kvtransfer.arrivals import Arrived
    from kvtransfer.departures import Departures
    from kvtransfer.transfer import Outgoing, PullCancel, PullOrder
    from prefill.handoff import Handoffs

    Send = Callable[[str, Message], None]


class Transfers:
    def __init__(
        self,
        name: str,
        pool: BlockPool,
        residents: Residents,
        *,
        decode: DecodeScheduler,
        departures: Departures,
        handoffs: Handoffs,
        send: Send,
    ) -> None:
        self._name, self._pool, self._residents, self._decode = name, pool, residents, decode
        self._departures, self._handoffs, self._send = departures, handoffs, send
        self._layout, settings = departures.layout, departures.settings
        self._migrations = Migrations(name, departures, send)
        self._arrivals = Arrivals(pool, self._layout, settings, send, decode.has_room)

    def receive(self, sender: str, message: Message, now: float) -> None:
        match message:
            case Offer():
                self._offered(sender, message, now)
            case Ready():
                self._arrivals.ready(sender, message, now)
            case Sealed():
                self._arrivals.sealed(sender, message, now)
            case Confirmed():
                self._arrived(self._arrivals.confirmed(sender, message, now), now)
            case Reserved():
                self._reserved(self._departures.reserved(sender, message, now), now)
            case Pulled():
                self._pulled(self._departures.pulled(sender, message, now), now)
            case Fenced():
                self._departures.fenced(sender, message)
            case Cancelled():
                self._cancelled(sender, message, now)
            case Renew():
                self._renewed(sender, message, now)
            case _:
                self._receive_migration(sender, message, now)

    def _receive_migration(self, sender: str, message: Message, now: float) -> None:
        match message:
            case Migrate():
                self._migrate(sender, message, now)
            case Verdict():
                self._migrations.verdict(sender, message, now)
            case Accepted(request_id, epoch):
                self._accepted(request_id, epoch, now)
            case Resume():
                self._resume(message, now)

    def take_pulls(self) -> list[PullOrder | PullCancel]:
        return self._arrivals.take_pulls()

    def pull_finished(
        self, transfer: str, number: int, error: TransferError | None, now: float
    ) -> None:
        self._arrivals.pull_finished(transfer, number, error, now)

    def tick(self, now: float) -> None:
        for out in self._departures.tick(now):
            self._departure_failed(out, "LeaseExpired", "the target fell silent", now)
        for out in self._handoffs.unwanted(now):
            self._keep(out, now)
        self._arrivals.tick(now)
        for request_id in self._migrations.tick(now):
            self.end(request_id, now)

    def between_steps(self, now: float) -> None:
        """What must not happen while a batch runs: seals, and new use of blocks that a swap in
        that batch is still reading."""
        under_way = self._residents.under_way
        if not under_way:
            self._migrations.at_step_end(now)
        if not any(batch.swaps for batch in under_way):
            self._arrivals.admit(now)

    @property
    def held(self) -> set[str]:
        """Sequences that stand still because they are about to move."""
        return self._migrations.held

    @property
    def migrating(self) -> bool:
        return self._migrations.busy

    @property
    def wanted_blocks(self) -> int:
        return self._arrivals.wanted_blocks

    @property
    def gist(self) -> tuple[object, ...]:
        """What is on its way here, and how many have been given away."""
        coming = tuple((one.offer.request.id, one.state) for one in self._arrivals.open)
        return coming, self._migrations.given

    def listed(self) -> list[Running]:
        """Every request here, and those that have a reservation here."""
        here = [
            Running(
                one.id,
                one.epoch,
                self._state_of(one),
                one.request.priority,
                one.prompt_tokens,
                one.output_tokens,
                len(one.blocks),
                self._handoffs.target(one.id),
            )
            for one in self._residents.all()
        ]
        for incoming in self._arrivals.open:
            request, blocks = incoming.offer.request, len(incoming.blocks)
            epoch, state = incoming.offer.epoch, incoming.state.value
            here.append(
                Running(request.id, epoch, state, request.priority, len(request.prompt), 0, blocks)
            )
        return here

    # What ends.

    def end(self, request_id: str, now: float) -> None:
        """The request is over here, and with it whatever was moving it."""
        self.stop(request_id, "StaleEpoch", "the request has ended", now)
        if self._residents.end(request_id):
            self._migrations.forget(request_id, now)

    def stop(self, request_id: str, error: str, reason: str, now: float) -> None:
        """The sequence stays: whatever was moving it is given up."""
        out = self._departures.of(request_id)
        if out is None:
            return
        if out.kind is TransferKind.MIGRATION:
            self._migrations.abort(out, error, reason, now)
        else:
            self._departures.abort(out, error, reason, now)

    def outgrown(self, sequence: Sequence, reason: str, now: float) -> None:
        """The scheduler has put out a sequence that its whole pool cannot hold."""
        self.stop(sequence.id, "OutOfBlocks", reason, now)
        self._gone(sequence, now)

    def refuse_arrivals(self, request_id: str, epoch: int) -> None:
        for incoming in self._arrivals.of(request_id):
            if incoming.offer.epoch <= epoch:
                self._arrivals.give_up(incoming, "StaleEpoch", "the request was aborted")

    def lost(self, name: str, now: float) -> None:
        """An instance or a gateway is gone."""
        for out in self._departures.lost(name, now):
            self._departure_failed(out, "PeerLost", f"{name} is gone", now)
        for incoming in self._arrivals.open:
            if incoming.offer.gateway == name:
                self._arrivals.give_up(incoming, "PeerLost", f"{name} is gone")
        self._arrivals.lost(name)

    def _departure_failed(self, out: Outgoing, error: str, reason: str, now: float) -> None:
        sequence = out.sequence
        if out.kind is TransferKind.MIGRATION:
            self._migrations.failed(out, error, now)
            return
        dropped = Dropped(sequence.id, sequence.epoch, error, reason, handoff=True)
        self._send(out.gateway, dropped)
        self.end(sequence.id, now)

    def _gone(self, sequence: Sequence, now: float) -> None:
        """It is in none of the places any more."""
        self._pool.release(sequence.blocks)
        self._residents.forget(sequence.id)
        self._migrations.forget(sequence.id, now)

    # Both sides.

    def _cancelled(self, sender: str, message: Cancelled, now: float) -> None:
        """Either side cancels, and an instance may be on both sides of different transfers."""
        if self._departures.find(message.transfer, sender) is not None:
            out = self._departures.cancelled(sender, message, now)
            assert out is not None
            self._departure_failed(out, message.error, message.reason, now)
        else:
            self._migrations.refused_late(message.transfer)
            self._arrivals.cancelled(sender, message)

    def _renewed(self, sender: str, message: Renew, now: float) -> None:
        if self._departures.find(message.transfer, sender) is not None:
            self._departures.renew(sender, message, now)
        else:
            self._arrivals.renew(sender, message, now)

    # What leaves.

    def _reserved(self, out: Outgoing | None, now: float) -> None:
        if out is None:
            return
        if out.kind is TransferKind.HANDOFF:
            self._handoffs.reserved(out, now)
        else:
            self._migrations.reserved(out, now)

    def _pulled(self, out: Outgoing | None, now: float) -> None:
        if out is None:
            return
        if out.kind is TransferKind.MIGRATION:
            self._migrations.pulled(out, now)
        else:
            self._handed_off(out, now)

    def _handed_off(self, out: Outgoing, now: float) -> None:
        gone = self._handoffs.pulled(out, now)
        if gone is not None:
            self._gone(gone, now)

    def prefilled(self, sequence: Sequence, now: float) -> None:
        """The first token of a prompt that is to be handed off is out."""
        out = self._handoffs.drawn(sequence, now)
        if out is not None:
            self._handed_off(out, now)

    def _keep(self, out: Outgoing, now: float) -> None:
        """The target has had no room for long: decode here, where the KV is."""
        sequence = out.sequence
        self._departures.abort(out, "Overloaded", "waited too long for room", now)
        self._handoffs.forget(sequence.id)
        self._decode.add(sequence)
        self._migrations.void(out)
        self._send(out.gateway, Kept(sequence.id, sequence.epoch))

    def _migrate(self, asker: str, migrate: Migrate, now: float) -> None:
        """A running sequence moves with its KV; a prompt that waits is simply sent elsewhere."""
        request_id = migrate.request_id
        sequence = self._residents.find(request_id)
        if sequence is None:
            self._send(asker, self._not_moved(migrate, NotFound.__name__))
            return
        gateway = self._residents.gateway(request_id)
        moves = self._departures.of(request_id) is not None
        settled = not moves and not self._migrations.is_undecided(request_id)
        if settled and self._residents.is_decoding(sequence):
            self._migrations.start(sequence, gateway, migrate.target, migrate.reason, now)
        elif settled and self._residents.waits_for_prefill(sequence):
            self._send(gateway, Dropped(request_id, sequence.epoch, "Overloaded", migrate.reason))
            self.end(request_id, now)
        else:
            self._send(gateway, self._not_moved(migrate, Unsupported.__name__))

    def _not_moved(self, migrate: Migrate, error: str) -> Migrated:
        how = (migrate.target, migrate.reason, error, 0.0, 0.0, 0)
        return Migrated(migrate.request_id, self._name, *how)

    def _accepted(self, request_id: str, epoch: int, now: float) -> None:
        if self._migrations.accepted(request_id, epoch, now):
            self.end(request_id, now)

    def _resume(self, resume: Resume, now: float) -> None:
        sequence = self._residents.find(resume.request_id)
        if sequence is not None and sequence.epoch == resume.old_epoch:
            self._migrations.resume(sequence, resume, now)

    def _state_of(self, sequence: Sequence) -> str:
        if self._migrations.is_given(sequence.id):
            return TransferState.COMMITTED.value
        return sequence.state.value

    # What arrives.

    def _offered(self, sender: str, offer: Offer, now: float) -> None:
        if self._residents.is_buried(offer.request.id, offer.epoch):
            self._send(sender, Cancelled(offer.transfer, "StaleEpoch", "the request was aborted"))
            self._send(sender, Fenced(offer.transfer))
        else:
            self._arrivals.offer(sender, offer, now)

    def _arrived(self, arrived: Arrived | None, now: float) -> None:
        if arrived is None:
            return
        sequence = arrived.sequence
        if self._residents.find(sequence.id) is not None:
            self.end(sequence.id, now)
        kv_bytes = arrived.copied_blocks * self._layout.instance_block_bytes
        stamps = {"transferred_s": now, "kv_bytes": float(kv_bytes)}
        self._residents.enter(sequence.id, arrived.gateway, stamps)
        self._decode.add(sequence)
