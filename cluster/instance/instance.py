"""One instance of the model, as a decider: messages in, batches, copies and messages out.

It holds no socket, clock or tensor, so the cluster's host, the tests and the simulation run the
very same object. `Residents` knows where each sequence is, `Transfers` moves them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.instance.residents import Residents
from cluster.instance.transfers import Transfers
from cluster.instance.trials import Trials
from engine.errors import BatchFailed, InstanceLost, OutOfBlocks, StaleEpoch, TandemError
from engine.messages import (
    Abort,
    Dropped,
    InstanceState,
    Load,
    Lost,
    Message,
    Start,
    Token,
    Tokens,
)
from engine.request import Sequence, start_sequence
from kvtransfer.departures import Departures
from kvtransfer.transfer import TransferSettings
from placement.role import RoleBatcher, RoleSettings
from prefill.handoff import Destination, Handoffs

if TYPE_CHECKING:
    from engine.batch import Batch, Chunk, Drawn, StepResult
    from engine.blocks import BlockPool
    from engine.errors import TransferError
    from engine.layout import KvLayout
    from engine.messages import Role
    from kvtransfer.transfer import PullCancel, PullOrder
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
        departures = Departures(pool, layout, settings.transfer, self._send)
        self._handoffs = Handoffs(departures)
        self._residents = Residents(
            pool, self._batcher, self._handoffs, tombstones=settings.tombstones
        )
        self._transfers = Transfers(
            name,
            pool,
            self._residents,
            decode=self._decode,
            departures=departures,
            handoffs=self._handoffs,
            send=self._send,
        )
        self._groups = layout.layer_groups(0, settings.transfer.layer_groups)
        self._trials = Trials()
        self._steps: list[Step] = []
        """Under way, in their order: one, and perhaps one that was launched behind it."""
        self._outbox: list[Envelope] = []

    # Messages.

    def receive(self, sender: str, message: Message, now: float) -> None:
        match message:
            case Start():
                self._start(sender, message)
            case Abort(request_id, epoch):
                self._abort(request_id, epoch, now)
            case Lost(name):
                self._lost(name, now)
            case _:
                self._transfers.receive(sender, message, now)
        self._transfers.between_steps(now)

    def take_outbox(self) -> list[Envelope]:
        outbox, self._outbox = self._outbox, []
        return outbox

    def take_pulls(self) -> list[PullOrder | PullCancel]:
        return self._transfers.take_pulls()

    # Batches.

    def next_batch(self, now: float) -> Batch | None:
        assert not self._steps, "a batch is under way"
        self._transfers.between_steps(now)
        step = self._trials.cut(self._batcher.next_step(now, self._transfers.held))
        for request_id in step.decode_step.preempted:
            self._transfers.stop(request_id, "OutOfBlocks", "preempted at the source", now)
        for sequence in step.decode_step.outgrown:
            self._outgrown(sequence, now)
        return self._begin(step, now) if step.batch else None

    @property
    def may_be_followed(self) -> bool:
        """Whether `next_ahead` may know of a batch after the one that has just begun."""
        return self._steps[0].is_plain(self._eos)

    def next_ahead(self, now: float) -> Batch | None:
        """The batch after the one under way, to be launched before the tokens of that one are read;
        None where they, or somebody who waits or moves, decide what comes next. It ends after the
        one under way, by `finish` or `fail_batch`, or by `discard`."""
        waited_for = self._trials.pending or self._transfers.migrating
        if len(self._steps) != 1 or waited_for or self._residents.has_namesakes:
            return None
        step = self._batcher.step_ahead(self._steps[0], self._eos)
        return None if step is None else self._begin(step, now)

    def discard(self, batch: Batch) -> None:
        """The batch that was launched last, or could not be, came to nothing: its sequences keep
        their places and their blocks, and are asked for the same tokens again."""
        step = self._steps.pop()
        assert step.batch is batch
        self._residents.over(batch)
        self._residents.release_doomed(remember=True)

    @property
    def hands_layers_on(self) -> bool:
        """Whether KV of the batch under way may move before the batch is over."""
        if not self._steps or self._layout.pipeline_parallel > 1:
            return False
        prefills = self._steps[0].prefills
        return any(self._handoffs.in_pieces(chunk.request_id, chunk.end) for chunk in prefills)

    def layer_group_done(self, group: int, now: float) -> None:
        """KV of this group of layers stands, for the batch under way. Stages after the first
        report nothing, so with pipeline parallelism KV is ready when the batch is."""
        if not self._steps or self._layout.pipeline_parallel > 1:
            return
        for chunk in self._steps[0].prefills:
            in_pieces = self._handoffs.in_pieces(chunk.request_id, chunk.end)
            if in_pieces and chunk.request_id in self._prefill:
                sequence = self._residents.find(chunk.request_id)
                assert sequence is not None
                self._handoffs.computed(sequence, chunk.end, self._groups[group], now)

    def finish(self, batch: Batch, result: StepResult, now: float) -> None:
        step = self._end_step(batch)
        self._trials.passed()
        self._batcher.measured(step, result.duration_s)
        drawn = {one.request_id: one for one in result.drawn}
        tokens: dict[str, list[Token]] = {}
        for chunk in step.decodes:
            if not self._residents.is_doomed(chunk.request_id):
                self._decoded(chunk, drawn.get(chunk.request_id), tokens, now)
        for chunk in step.prefills:
            if not self._residents.is_doomed(chunk.request_id):
                self._prefilled(chunk, drawn.get(chunk.request_id), tokens, now)
        self._residents.release_doomed(remember=True)
        for gateway, items in tokens.items():
            self._send(gateway, Tokens(tuple(items)))
        self._transfers.between_steps(now)

    def fail_batch(self, batch: Batch, error: Exception, now: float) -> None:
        """The batch gave nothing: the request behind it is found by running parts of it again,
        and given back to its gateway. Raises InstanceLost where no request is to blame."""
        self._end_step(batch)
        assert not self._steps, "the batch behind it is not over"
        self._residents.release_doomed(remember=False)
        reason = f"{type(error).__name__}: {error}"
        if not batch.chunks:
            raise InstanceLost(f"{self.name}: moving blocks failed: {reason}")
        for swap in batch.swaps:
            # Nobody knows whether its blocks were moved.
            self._give_back(swap.request_id, reason, now)
        blamed = self._trials.failed(batch)
        if blamed is not None:
            self._blame(blamed, error, reason, now)
        self._transfers.between_steps(now)

    def _blame(self, request_id: str, error: Exception, reason: str, now: float) -> None:
        in_a_row = self._trials.blamed_in_a_row
        unexplained = not isinstance(error, TandemError)
        if unexplained and in_a_row >= self._settings.blamed_in_a_row:
            raise InstanceLost(f"{self.name}: {in_a_row} requests in a row failed alone: {reason}")
        self._give_back(request_id, reason, now)

    def _give_back(self, request_id: str, reason: str, now: float) -> None:
        sequence = self._residents.find(request_id)
        if sequence is None:
            return
        gateway = self._residents.gateway(request_id)
        failed = Dropped(request_id, sequence.epoch, BatchFailed.__name__, reason)
        self._send(gateway, failed)
        # What it has computed may be as bad as its batch: no prefix of it is kept.
        sequence.computed = 0
        self._transfers.end(request_id, now)

    def _begin(self, step: Step, now: float) -> Batch:
        self._steps.append(step)
        self._residents.under_way += (step.batch,)
        for chunk in step.prefills:
            self._prefill_begins(chunk, now)
        for chunk in step.decodes:
            if chunk.draw is not None and chunk.draw.position == 1:
                self._residents.stamps[chunk.request_id].setdefault("decode_started_s", now)
        return step.batch

    def _end_step(self, batch: Batch) -> Step:
        step = self._steps.pop(0)
        assert step.batch is batch
        self._residents.over(batch)
        return step

    def pull_finished(
        self, transfer: str, number: int, error: TransferError | None, now: float
    ) -> None:
        self._transfers.pull_finished(transfer, number, error, now)
        self._transfers.between_steps(now)

    def tick(self, now: float) -> None:
        self._transfers.tick(now)
        self._transfers.between_steps(now)

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

    @property
    def gist(self) -> tuple[object, ...]:
        """What makes a load worth telling before its heartbeat is due; looked at after every step,
        and so without going through the sequences."""
        places = len(self._prefill), len(self._handoffs.held), len(self._decode.running)
        return self.role, self.state, places, self._residents.changes, self._transfers.gist

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
            step_s=self._batcher.pace_s,
            sequences=tuple(self._transfers.listed()),
            wanted_blocks=self._wanted_blocks,
        )

    @property
    def _wanted_blocks(self) -> int:
        waiting = (self._prefill, self._decode, self._transfers)
        return sum(one.wanted_blocks for one in waiting)

    # Requests.

    def _start(self, gateway: str, start: Start) -> None:
        request = start.request
        if self._residents.is_buried(request.id, start.epoch):
            # Too late, and nobody waits for it, unless another gateway's caller has used the id.
            reason = "a later epoch was aborted"
            self._send(gateway, Dropped(request.id, start.epoch, StaleEpoch.__name__, reason))
            return
        here = self._residents.find(request.id)
        if here is not None:
            # An older epoch is ended by the Abort that the gateway sent before this.
            return
        sequence = start_sequence(request, start.epoch, start.output)
        try:
            self._prefill.add(sequence)
        except OutOfBlocks as error:
            self._send(gateway, Dropped(request.id, start.epoch, "OutOfBlocks", str(error)))
            return
        self._residents.enter(request.id, gateway)
        if start.target is not None and start.target != self.name:
            assert start.target_epoch is not None
            destination = Destination(gateway, start.target, start.target_epoch)
            self._handoffs.plan(request.id, destination)

    def _abort(self, request_id: str, epoch: int, now: float) -> None:
        self._residents.bury(request_id, epoch)
        self._transfers.refuse_arrivals(request_id, epoch)
        sequence = self._residents.find(request_id)
        if sequence is not None and sequence.epoch <= epoch:
            self._transfers.end(request_id, now)

    def _lost(self, name: str, now: float) -> None:
        for request_id in self._residents.of_gateway(name):
            self._transfers.end(request_id, now)
        self._transfers.lost(name, now)

    # Steps.

    def _prefill_begins(self, chunk: Chunk, now: float) -> None:
        stamps = self._residents.stamps[chunk.request_id]
        stamps.setdefault("prefill_started_s", now)
        stamps.setdefault("cached_tokens", float(chunk.start))
        sequence = self._residents.find(chunk.request_id)
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
        self._residents.stamps[sequence.id]["first_token_s"] = now
        if self._append(sequence, drawn, tokens, now):
            return
        self._prefill.remove(sequence.id)
        if sequence.id in self._handoffs:
            self._transfers.prefilled(sequence, now)
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
        stamps = self._residents.stamps[sequence.id]
        if index == 1:
            stamps["second_token_s"] = now
        told = tuple(stamps.items()) if index <= 1 else ()
        if index <= 1:
            stamps.clear()
        token = Token(sequence.id, sequence.epoch, index, drawn.token, finish, drawn.logprobs, told)
        tokens.setdefault(self._residents.gateway(sequence.id), []).append(token)
        if finish is not None:
            self._transfers.end(sequence.id, now)
        return finish is not None

    def _outgrown(self, sequence: Sequence, now: float) -> None:
        reason = f"{len(sequence.tokens)} tokens do not fit {self.pool.total_blocks} blocks"
        gateway = self._residents.gateway(sequence.id)
        self._send(gateway, Dropped(sequence.id, sequence.epoch, "OutOfBlocks", reason))
        self._transfers.outgrown(sequence, reason, now)

    def _send(self, to: str, message: Message) -> None:
        self._outbox.append(Envelope(to, message))
