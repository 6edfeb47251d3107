"""One instance in virtual time: what it takes on, hands off, shows and loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import OutOfBlocks
from engine.messages import InstanceState, Load
from engine.request import SequenceState
from placement.simulation.batching import Batching
from placement.simulation.handoff import Handoff, Inbox
from placement.simulation.listing import Listing
from placement.view import InstanceView

if TYPE_CHECKING:
    from engine.messages import Role, Running
    from engine.request import Sequence
    from placement.simulation.deployment import Deployment, InstanceModel
    from placement.simulation.world import World

HEARTBEAT_S = 0.25
"""An instance in the midst of decodes tells routers where it stands this often, as a real one."""


class SimulatedInstance(Batching):
    def __init__(
        self, name: str, model: InstanceModel, deployment: Deployment, world: World
    ) -> None:
        super().__init__(name, model, deployment, world)
        self.role: Role = model.role
        self.state = InstanceState.READY
        overheads = deployment.overheads
        self._layer_groups = overheads.layer_groups
        whole_bytes = overheads.piece_bytes * overheads.layer_groups
        self._tokens_in_pieces = whole_bytes / deployment.kv_bytes_per_token
        self.egress_free_s = self.ingress_free_s = 0.0
        self.inbox = Inbox(self, deployment, world)
        self._targets: dict[str, SimulatedInstance | None] = {}
        self._draining: dict[str, Sequence] = {}
        """Prompts in the last stages of a pipeline."""
        self._held: dict[str, Handoff] = {}
        self._listing = Listing()
        self._view: InstanceView | None = None

    # Taking on and letting go.

    def submit(self, sequence: Sequence, target: SimulatedInstance | None, now: float) -> None:
        """Prefill here; with a target, hand it off afterwards."""
        try:
            self.batcher.prefill.add(sequence)
        except OutOfBlocks:
            self._world.failed(sequence.id)
            return
        self._targets[sequence.request.id] = target
        self._listing.add(sequence)
        self._poke(now)

    def join(self, sequence: Sequence, now: float, *, fresh: bool = True) -> None:
        """Decode a sequence whose KV is here."""
        self.batcher.decode.add(sequence)
        if fresh:
            self._fresh[sequence.request.id] = None
        self._listing.add(sequence)
        self._poke(now)

    def freed(self, handoff: Handoff, now: float) -> None:
        """The target has the KV: the source may reuse its blocks."""
        del self._held[handoff.sequence.request.id]
        self._let_go(handoff.sequence)
        self.nudge(now)

    def keep(self, handoff: Handoff, now: float) -> None:
        """The target is gone: decode here."""
        del self._held[handoff.sequence.id]
        self.join(handoff.sequence, now)

    def hands_to(self, other: SimulatedInstance) -> bool:
        """Whether it has prompts whose KV the other is to have."""
        return other in self._targets.values()

    def nudge(self, now: float) -> None:
        """There may be more room than before."""
        self._take_offers(now)
        self._poke(now)

    def withdraw(self, request_id: str) -> Sequence:
        """Works on it no longer; its blocks are still held. Between steps only."""
        assert self._run is None
        if request_id in self._flow:
            self._flow.remove(request_id)
        self._fresh.pop(request_id, None)
        self._listing.remove(request_id)
        self._changed = True
        if request_id in self.batcher.prefill:
            self._targets.pop(request_id)
            return self.batcher.prefill.remove(request_id)
        return self.batcher.decode.remove(request_id)

    def fail(self, now: float) -> None:
        """All that is here is lost, but for the tokens that have been delivered."""
        self.state = InstanceState.STOPPED
        self._stop(now)
        self.inbox.abandon(now)
        for handoff in self._held.values():
            handoff.target.inbox.forget(handoff)
        held = [handoff.sequence for handoff in self._held.values()]
        prompts = [*self.batcher.prefill.sequences, *self._draining.values()]
        self._held.clear()
        self._draining.clear()
        for sequence in [*self.batcher.decode.sequences, *prompts, *held]:
            self._world.lost(sequence, now)

    def turn(self, role: Role) -> None:
        """What is here goes on as it began; only new work follows the role."""
        self.role, self._changed = role, True

    def become(self, state: InstanceState) -> None:
        self.state, self._changed = state, True

    # What its batches come to.

    def _prefilled(self, sequence: Sequence, last_chunk_tokens: int, now: float) -> None:
        """The next token is out: decode here, or offer the KV to who will."""
        request = sequence.request
        sequence.tokens.append(0)
        self._world.first_token(request.id, now)
        target = self._targets.pop(request.id)
        started_s = self._started_s.pop(request.id)
        if sequence.output_tokens >= request.sampling.max_tokens:
            self._finish(sequence, now)
        elif target is None or target is self or target.state is InstanceState.STOPPED:
            self.join(sequence, now)
        else:
            sequence.state = SequenceState.HELD
            prompt_tokens = len(sequence.tokens) - 1
            tail_share = 1.0
            if prompt_tokens >= self._tokens_in_pieces:
                tail_share = last_chunk_tokens / prompt_tokens / self._layer_groups
            handoff = Handoff(sequence, self, target, started_s, now, tail_share)
            self._held[request.id] = handoff
            target.inbox.add(handoff, now)

    def _drain(self, sequence: Sequence, last_chunk_tokens: int, end_s: float) -> None:
        self._draining[sequence.id] = sequence
        self._world.at(end_s, self._drained, (sequence, last_chunk_tokens))

    def _drained(self, prompt: tuple[Sequence, int], now: float) -> None:
        sequence, last_chunk_tokens = prompt
        if self._draining.pop(sequence.id, None) is sequence:
            self._prefilled(sequence, last_chunk_tokens, now)

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._listing.remove(sequence.request.id)
        self._changed = True

    def _take_offers(self, now: float) -> None:
        if self.inbox.waits:
            self.inbox.take(now)

    # What others see.

    def find(self, request_id: str) -> Sequence | None:
        """A sequence that decodes here, or a prompt that has not begun."""
        self._flow.catch_up(request_id)
        prompt = self.batcher.prefill.find(request_id)
        if prompt is not None:
            return None if prompt.blocks else prompt
        return self.batcher.decode.find(request_id)

    @property
    def decodes_for_others(self) -> bool:
        """Whether it decodes what its role does not take on."""
        return not self.role.decodes and len(self.batcher.decode) > 0

    @property
    def is_empty(self) -> bool:
        idle = self._run is None and not len(self.inbox) and not self._held
        scheduled = len(self.batcher.decode) + len(self.batcher.prefill) + len(self._draining)
        return idle and not scheduled and self.pool.available == self.pool.total_blocks

    def view(self, now: float) -> InstanceView:
        """As the router sees it, with the requests that are new; built only after a change, or
        a heartbeat's time."""
        run = self._run
        if run is not None and now - run.start_s > HEARTBEAT_S:
            self._catch_up(now)
        if self._changed or self._view is None:
            self._view = self._view_of(self._listing.news())
            self._changed = False
        return self._view

    def whole_view(self, now: float) -> InstanceView:
        """As the balancer sees it."""
        self._catch_up(now)
        self._flow.catch_up_all()
        return self._view_of((*self._listing.everything(), *self.inbox.listed))

    def load(self, now: float) -> Load:
        """Without what is on it."""
        self._catch_up(now)
        return self._load(())

    def _view_of(self, sequences: tuple[Running, ...]) -> InstanceView:
        model = self.model
        return InstanceView(
            self._load(sequences),
            model.node,
            model.device,
            model.tensor_parallel,
            model.pipeline_parallel,
        )

    def _load(self, sequences: tuple[Running, ...]) -> Load:
        batcher, pool, flow = self.batcher, self.pool, self._flow
        return Load(
            instance=self.name,
            role=self.role,
            state=self.state,
            queue_requests=len(batcher.prefill),
            queued_tokens=batcher.prefill.queued_tokens,
            running_sequences=len(batcher.decode),
            running_tokens=flow.kv_read_tokens,
            free_blocks=max(0, pool.available - flow.ungrown_blocks),
            total_blocks=pool.total_blocks,
            block_tokens=pool.block_tokens,
            pinned_blocks=0,
            cached_blocks=0,
            step_s=batcher.pace_s,
            sequences=sequences,
            wanted_blocks=batcher.prefill.wanted_blocks + batcher.decode.wanted_blocks,
        )
