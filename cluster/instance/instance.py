"""One instance of the model, as a decider: messages in, batches, copies and messages out.

It holds no socket, clock or tensor, so the cluster's host, the tests and the simulation run the
very same object. A sequence is in one place at a time: the prefill scheduler, held for its
hand-off, the decode scheduler, or, if it ended while its batch runs, doomed until that is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.instance.trials import Trials
from decode.migration import Migrations
from engine.blocks import prefix_hashes
from engine.errors import BatchFailed, InstanceLost, OutOfBlocks, TandemError
from engine.messages import (
    Abort,
    Accepted,
    Cancelled,
    Confirmed,
    Dropped,
    Fenced,
    InstanceState,
    Kept,
    Load,
    Lost,
    Message,
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
    Start,
    Token,
    Tokens,
    TransferKind,
    Verdict,
)
from engine.request import Sequence, SequenceState, start_sequence
from kvtransfer.arrivals import Arrivals
from kvtransfer.departures import Departures
from kvtransfer.transfer import TransferSettings, TransferState
from placement.role import RoleBatcher, RoleSettings
from prefill.handoff import Destination, Handoffs

if TYPE_CHECKING:
    from engine.batch import Batch, Chunk, Drawn, StepResult
    from engine.blocks import BlockPool
    from engine.errors import TransferError
    from engine.layout import KvLayout
    from engine.messages import Role
    from kvtransfer.arrivals import Arrived
    from kvtransfer.transfer import Outgoing, PullCancel, PullOrder
    from placement.role import Step


@dataclass(frozen=True, slots=True)
class InstanceSettings:
    role: RoleSettings = field(default_factory=RoleSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    tombstones: int = 10_000
    """Aborted requests remembered, so that a Start that comes late does not revive one."""
    blamed_in_a_row: int = 3
    """So many requests that fail alone, with no batch in between that ran, and it is the
    instance that is broken, unless the error is one that a request's content explains."""


@dataclass(frozen=True, slots=True)
class Envelope:
    to: str
    message: Message


class Instance:
    def __init__(
        self,
        name: str,
        role: Role,
        pool: BlockPool,
        layout: KvLayout,
        *,
        settings: InstanceSettings,
        eos: frozenset[int],
    ) -> None:
        self.name, self.role, self.pool = name, role, pool
        self.state = InstanceState.READY
        self._layout, self._settings, self._eos = layout, settings, eos
        self._batcher = RoleBatcher(pool, settings.role)
        self._prefill, self._decode = self._batcher.prefill, self._batcher.decode
        self._departures = Departures(pool, layout, settings.transfer, self._send)
        self._handoffs = Handoffs(self._departures)
        self._migrations = Migrations(name, self._departures, self._send)
        self._arrivals = Arrivals(
            pool, layout, settings.transfer, self._send, self._decode.has_room
        )
        self._groups = layout.layer_groups(0, settings.transfer.layer_groups)
        self._gateways: dict[str, str] = {}
        self._stamps: dict[str, dict[str, float]] = {}
        self._tombstones: dict[str, int] = {}
        self._doomed: dict[str, Sequence] = {}
        self._trials = Trials()
        self._step: Step | None = None
        self._step_s = 0.0
        self._outbox: list[Envelope] = []

    # Messages.

    def receive(self, sender: str, message: Message, now: float) -> None:
        match message:
            case Start():
                self._start(sender, message)
            case Abort(request_id, epoch):
                self._abort(request_id, epoch, now)
            case Verdict():
                self._migrations.verdict(sender, message, now)
            case Accepted(request_id, epoch):
                self._accepted(request_id, epoch, now)
            case Resume():
                self._resume(message, now)
            case Migrate():
                self._migrate(message, now)
            case Lost(name):
                self._lost(name, now)
            case _:
                self._receive_transfer(sender, message, now)
        self._between_steps(now)

    def take_outbox(self) -> list[Envelope]:
        outbox, self._outbox = self._outbox, []
        return outbox

    def take_pulls(self) -> list[PullOrder | PullCancel]:
        return self._arrivals.take_pulls()

    # Batches.

    def next_batch(self, now: float) -> Batch | None:
        assert self._step is None, "a batch is under way"
        self._between_steps(now)
        step = self._trials.cut(self._batcher.next_step(now, self._migrations.held))
        for request_id in step.decode_step.preempted:
            self._stop_moving(request_id, "OutOfBlocks", "preempted at the source", now)
        for sequence in step.decode_step.outgrown:
            self._outgrown(sequence, now)
        if not step.batch:
            return None
        self._step = step
        for chunk in step.prefills:
            self._prefill_begins(chunk, now)
        for chunk in step.decodes:
            if chunk.draw is not None and chunk.draw.position == 1:
                self._stamps[chunk.request_id].setdefault("decode_started_s", now)
        return step.batch

    def layer_group_done(self, group: int, now: float) -> None:
        """KV of this group of layers stands, for the batch under way. Stages after the first
        report nothing, so with pipeline parallelism KV is ready when the batch is."""
        if self._step is None or self._layout.pipeline_parallel > 1:
            return
        for chunk in self._step.prefills:
            if chunk.request_id in self._prefill and chunk.request_id in self._handoffs:
                sequence = self._sequence(chunk.request_id)
                assert sequence is not None
                self._handoffs.computed(sequence, chunk.end, self._groups[group], now)

    def finish(self, batch: Batch, result: StepResult, now: float) -> None:
        step = self._end_step(batch)
        self._trials.passed()
        self._batcher.measured(step, result.duration_s)
        self._step_s = result.duration_s
        drawn = {one.request_id: one for one in result.drawn}
        tokens: dict[str, list[Token]] = {}
        for chunk in step.decodes:
            if chunk.request_id not in self._doomed:
                self._decoded(chunk, drawn.get(chunk.request_id), tokens, now)
        for chunk in step.prefills:
            if chunk.request_id not in self._doomed:
                self._prefilled(chunk, drawn.get(chunk.request_id), tokens, now)
        self._release_doomed()
        for gateway, items in tokens.items():
            self._send(gateway, Tokens(tuple(items)))
        self._between_steps(now)

    def fail_batch(self, batch: Batch, error: Exception, now: float) -> None:
        """The batch gave nothing: the request behind it is found by running parts of it again,
        and given back to its gateway. Raises InstanceLost where no request is to blame."""
        self._end_step(batch)
        self._release_doomed()
        reason = f"{type(error).__name__}: {error}"
        if not batch.chunks:
            raise InstanceLost(f"{self.name}: moving blocks failed: {reason}")
        for swap in batch.swaps:
            # Nobody knows whether its blocks were moved.
            self._give_back(swap.request_id, reason, now)
        blamed = self._trials.failed(batch)
        if blamed is not None:
            self._blame(blamed, error, reason, now)
        self._between_steps(now)

    def _blame(self, request_id: str, error: Exception, reason: str, now: float) -> None:
        in_a_row = self._trials.blamed_in_a_row
        unexplained = not isinstance(error, TandemError)
        if unexplained and in_a_row >= self._settings.blamed_in_a_row:
            raise InstanceLost(f"{self.name}: {in_a_row} requests in a row failed alone: {reason}")
        self._give_back(request_id, reason, now)

    def _give_back(self, request_id: str, reason: str, now: float) -> None:
        sequence = self._sequence(request_id)
        if sequence is None:
            return
        gateway = self._gateways[request_id]
        failed = Dropped(request_id, sequence.epoch, BatchFailed.__name__, reason)
        self._send(gateway, failed)
        # What it has computed may be as bad as its batch: no prefix of it is kept.
        sequence.computed = 0
        self._end(request_id, now)

    def _end_step(self, batch: Batch) -> Step:
        step, self._step = self._step, None
        assert step is not None
        assert step.batch is batch
        return step

    def _release_doomed(self) -> None:
        for sequence in self._doomed.values():
            self.pool.release(sequence.blocks)
        self._doomed.clear()

    def pull_finished(
        self, transfer: str, number: int, error: TransferError | None, now: float
    ) -> None:
        self._arrivals.pull_finished(transfer, number, error, now)
        self._between_steps(now)

    def tick(self, now: float) -> None:
        for out in self._departures.tick(now):
            self._departure_failed(out, "LeaseExpired", "the target fell silent", now)
        for out in self._handoffs.unwanted(now):
            self._keep(out, now)
        self._arrivals.tick(now)
        for request_id in self._migrations.tick(now):
            self._end(request_id, now)
        self._between_steps(now)

    # Operations.

    def drain(self) -> None:
        """Routers stop sending work; what is here ends or is moved away."""
        self.state = InstanceState.DRAINING

    def set_role(self, role: Role) -> None:
        """What is here goes on as it began; only new work follows the role."""
        self.role = role

    @property
    def preemptions(self) -> int:
        return self._decode.preemptions

    def load(self) -> Load:
        counts = self.pool.counts()
        running = self._decode.running
        return Load(
            instance=self.name,
            role=self.role,
            state=self.state,
            queue_requests=len(self._prefill) + len(self._handoffs.held),
            queued_tokens=self._prefill.queued_tokens,
            running_sequences=len(running),
            running_tokens=sum(len(sequence.tokens) for sequence in running),
            free_blocks=counts.available,
            total_blocks=self.pool.total_blocks,
            block_tokens=self.pool.block_tokens,
            pinned_blocks=counts.pinned,
            cached_blocks=counts.cached,
            step_s=self._step_s,
            sequences=tuple(self._running()),
        )

    # Requests.

    def _start(self, gateway: str, start: Start) -> None:
        request = start.request
        if self._tombstones.get(request.id, -1) >= start.epoch:
            return
        here = self._sequence(request.id)
        if here is not None:
            # An older epoch is ended by the Abort that the gateway sent before this.
            return
        sequence = start_sequence(request, start.epoch, start.output)
        try:
            self._prefill.add(sequence)
        except OutOfBlocks as error:
            self._send(gateway, Dropped(request.id, start.epoch, "OutOfBlocks", str(error)))
            return
        self._gateways[request.id] = gateway
        self._stamps[request.id] = {}
        if start.target is not None and start.target != self.name:
            assert start.target_epoch is not None
            destination = Destination(gateway, start.target, start.target_epoch)
            self._handoffs.plan(request.id, destination)

    def _abort(self, request_id: str, epoch: int, now: float) -> None:
        self._tombstones[request_id] = max(epoch, self._tombstones.get(request_id, epoch))
        while len(self._tombstones) > self._settings.tombstones:
            del self._tombstones[next(iter(self._tombstones))]
        for incoming in self._arrivals.of(request_id):
            if incoming.offer.epoch <= epoch:
                self._arrivals.give_up(incoming, "StaleEpoch", "the request was aborted")
        sequence = self._sequence(request_id)
        if sequence is not None and sequence.epoch <= epoch:
            self._end(request_id, now)

    def _accepted(self, request_id: str, epoch: int, now: float) -> None:
        if self._migrations.accepted(request_id, epoch, now):
            self._end(request_id, now)

    def _resume(self, resume: Resume, now: float) -> None:
        sequence = self._sequence(resume.request_id)
        if sequence is not None and sequence.epoch == resume.old_epoch:
            self._migrations.resume(sequence, resume, now)

    def _migrate(self, migrate: Migrate, now: float) -> None:
        """A running sequence moves with its KV; a prompt that waits is simply sent elsewhere."""
        request_id = migrate.request_id
        sequence = self._sequence(request_id)
        if sequence is None:
            return
        gateway = self._gateways[request_id]
        moves = self._departures.of(request_id) is not None
        settled = not moves and not self._migrations.is_undecided(request_id)
        if settled and self._is_decoding(sequence):
            self._migrations.start(sequence, gateway, migrate.target, migrate.reason, now)
        elif settled and request_id in self._prefill and not sequence.blocks:
            self._send(gateway, Dropped(request_id, sequence.epoch, "Overloaded", migrate.reason))
            self._end(request_id, now)
        else:
            busy = (migrate.target, migrate.reason, "Unsupported", 0.0, 0.0, 0)
            self._send(gateway, Migrated(request_id, self.name, *busy))

    def _lost(self, name: str, now: float) -> None:
        for request_id, gateway in list(self._gateways.items()):
            if gateway == name:
                self._end(request_id, now)
        for out in self._departures.lost(name, now):
            self._departure_failed(out, "PeerLost", f"{name} is gone", now)
        for incoming in self._arrivals.open:
            if incoming.offer.gateway == name:
                self._arrivals.give_up(incoming, "PeerLost", f"{name} is gone")
        self._arrivals.lost(name)

    # Transfers.

    def _receive_transfer(self, sender: str, message: Message, now: float) -> None:
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

    def _offered(self, sender: str, offer: Offer, now: float) -> None:
        if self._tombstones.get(offer.request.id, -1) >= offer.epoch:
            self._send(sender, Cancelled(offer.transfer, "StaleEpoch", "the request was aborted"))
            self._send(sender, Fenced(offer.transfer))
        else:
            self._arrivals.offer(sender, offer, now)

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
            return
        gone = self._handoffs.pulled(out, now)
        if gone is not None:
            self.pool.release(gone.blocks)
            self._forget(gone.id)

    def _arrived(self, arrived: Arrived | None, now: float) -> None:
        if arrived is None:
            return
        sequence = arrived.sequence
        if self._sequence(sequence.id) is not None:
            self._end(sequence.id, now)
        self._gateways[sequence.id] = arrived.gateway
        kv_bytes = arrived.copied_blocks * self._layout.instance_block_bytes
        self._stamps[sequence.id] = {"transferred_s": now, "kv_bytes": float(kv_bytes)}
        self._decode.add(sequence)

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

    def _departure_failed(self, out: Outgoing, error: str, reason: str, now: float) -> None:
        sequence = out.sequence
        if out.kind is TransferKind.MIGRATION:
            self._migrations.failed(out, error, now)
            return
        self._send(out.gateway, Dropped(sequence.id, sequence.epoch, error, reason))
        self._end(sequence.id, now)

    def _keep(self, out: Outgoing, now: float) -> None:
        """The target has had no room for long: decode here, where the KV is."""
        sequence = out.sequence
        self._departures.abort(out, "Overloaded", "waited too long for room", now)
        self._handoffs.forget(sequence.id)
        self._decode.add(sequence)
        self._send(out.gateway, Kept(sequence.id, sequence.epoch))

    def _stop_moving(self, request_id: str, error: str, reason: str, now: float) -> None:
        out = self._departures.of(request_id)
        if out is None:
            return
        if out.kind is TransferKind.MIGRATION:
            self._migrations.abort(out, error, reason, now)
        else:
            self._departures.abort(out, error, reason, now)

    def _between_steps(self, now: float) -> None:
        """What must not happen while a batch runs: seals, and new use of blocks that a swap in
        that batch is still reading."""
        if self._step is None:
            self._migrations.at_step_end(now)
        if self._step is None or not self._step.batch.swaps:
            self._arrivals.admit(now)

    # Steps.

    def _prefill_begins(self, chunk: Chunk, now: float) -> None:
        self._stamps[chunk.request_id].setdefault("prefill_started_s", now)
        sequence = self._sequence(chunk.request_id)
        assert sequence is not None
        self._handoffs.admitted(sequence, now)

    def _prefilled(
        self, chunk: Chunk, drawn: Drawn | None, tokens: dict[str, list[Token]], now: float
    ) -> None:
        sequence = self._prefill.computed(chunk)
        layers = range(self._layout.layers)
        self._handoffs.computed(sequence, sequence.computed, layers, now)
        if drawn is None:
            return
        self._stamps[sequence.id]["first_token_s"] = now
        if self._append(sequence, drawn, tokens, now):
            return
        self._prefill.remove(sequence.id)
        if sequence.id in self._handoffs:
            self._pulled(self._handoffs.drawn(sequence, now), now)
        else:
            self._decode.add(sequence)

    def _decoded(
        self, chunk: Chunk, drawn: Drawn | None, tokens: dict[str, list[Token]], now: float
    ) -> None:
        sequence = self._decode.computed(chunk)
        if drawn is not None:
            self._append(sequence, drawn, tokens, now)

    def _append(
        self, sequence: Sequence, drawn: Drawn, tokens: dict[str, list[Token]], now: float
    ) -> bool:
        """Add and tell a token; returns whether it was the last one."""
        sequence.tokens.append(drawn.token)
        index = sequence.output_tokens - 1
        finish = sequence.finish_reason(self._eos)
        stamps = self._stamps[sequence.id]
        if index == 1:
            stamps["second_token_s"] = now
        told = tuple(stamps.items()) if index <= 1 else ()
        if index <= 1:
            stamps.clear()
        token = Token(sequence.id, sequence.epoch, index, drawn.token, finish, drawn.logprobs, told)
        tokens.setdefault(self._gateways[sequence.id], []).append(token)
        if finish is not None:
            self._end(sequence.id, now)
        return finish is not None

    def _outgrown(self, sequence: Sequence, now: float) -> None:
        reason = f"{len(sequence.tokens)} tokens do not fit {self.pool.total_blocks} blocks"
        gateway = self._gateways[sequence.id]
        self._send(gateway, Dropped(sequence.id, sequence.epoch, "OutOfBlocks", reason))
        self._stop_moving(sequence.id, "OutOfBlocks", reason, now)
        self.pool.release(sequence.blocks)
        self._forget(sequence.id)

    # Where sequences are.

    def _sequence(self, request_id: str) -> Sequence | None:
        return (
            self._prefill.find(request_id)
            or self._decode.find(request_id)
            or self._handoffs.find(request_id)
        )

    def _is_decoding(self, sequence: Sequence) -> bool:
        return sequence.state is SequenceState.RUNNING and sequence.id in self._decode

    def _end(self, request_id: str, now: float) -> None:
        """Take a request out of wherever it is; its blocks are freed, or kept as a prefix."""
        self._stop_moving(request_id, "StaleEpoch", "the request has ended", now)
        sequence = self._remove(request_id)
        if sequence is None:
            return
        if self._runs_now(request_id):
            self._doomed[request_id] = sequence
        else:
            self._remember_prefix(sequence)
            self.pool.release(sequence.blocks)
        self._forget(request_id)

    def _remove(self, request_id: str) -> Sequence | None:
        if request_id in self._prefill:
            return self._prefill.remove(request_id)
        if request_id in self._decode:
            return self._decode.remove(request_id)
        return self._handoffs.forget(request_id)

    def _runs_now(self, request_id: str) -> bool:
        """Whether the batch under way reads or writes the blocks of this sequence; one that was
        started again under the same id has none yet."""
        if self._step is None or request_id in self._doomed:
            return False
        return any(chunk.request_id == request_id for chunk in self._step.batch.chunks)

    def _remember_prefix(self, sequence: Sequence) -> None:
        """A conversation's next turn, or a replay, finds what was computed."""
        full = sequence.tokens[: sequence.computed]
        hashes = prefix_hashes(full, self.pool.block_tokens, sequence.request.tenant)
        self.pool.remember(sequence.blocks, hashes)

    def _forget(self, request_id: str) -> None:
        self._handoffs.forget(request_id)
        self._migrations.forget(request_id)
        del self._gateways[request_id]
        del self._stamps[request_id]

    def _running(self) -> list[Running]:
        here = [*self._prefill.sequences, *self._handoffs.held, *self._decode.sequences]
        sequences = [
            Running(
                s.id,
                s.epoch,
                self._state_of(s),
                s.request.priority,
                s.prompt_tokens,
                s.output_tokens,
                len(s.blocks),
            )
            for s in here
        ]
        for incoming in self._arrivals.open:
            request, blocks = incoming.offer.request, len(incoming.blocks)
            epoch, state = incoming.offer.epoch, incoming.state.value
            sequences.append(
                Running(request.id, epoch, state, request.priority, len(request.prompt), 0, blocks)
            )
        return sequences

    def _state_of(self, sequence: Sequence) -> str:
        if self._migrations.is_given(sequence.id):
            return TransferState.COMMITTED.value
        return sequence.state.value

    def _send(self, to: str, message: Message) -> None:
        self._outbox.append(Envelope(to, message))
