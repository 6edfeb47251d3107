"""One instance in virtual time: the real batcher and block pool; a latency model for a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import OutOfBlocks
from engine.messages import InstanceState, Load
from engine.request import SequenceState
from placement.latency.model import Step, steps_to_reach
from placement.simulation.handoff import Handoff, Inbox
from placement.simulation.listing import Listing
from placement.simulation.run import Run, with_decodes, work_of
from placement.simulation.steady import Flow, SteadyBatcher
from placement.view import InstanceView

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Chunk
    from engine.blocks import BlockPool
    from engine.messages import Role, Running
    from engine.request import Sequence
    from placement.latency.model import LatencyModel
    from placement.role import RoleSettings
    from placement.role import Step as RoleStep
    from placement.simulation.crowding import Crowd
    from placement.simulation.deployment import Deployment, InstanceModel


class World(Protocol):
    """What an instance tells about its requests, and who calls it back later."""

    tpot_s: float | None
    """Where all requests have the same target."""

    def pool(self, blocks: int) -> BlockPool: ...
    def crowd(self, node: str) -> Crowd: ...
    def at(self, time_s: float, action: Callable[[Any, float], None], subject: Any) -> None: ...
    def moment(self, name: str, request_id: str, now: float) -> None: ...
    def first_token(self, request_id: str, now: float) -> None: ...
    def finished(self, request_id: str, now: float) -> None: ...
    def failed(self, request_id: str) -> None: ...
    def lost(self, sequence: Sequence, now: float) -> None: ...
    def gap(self, seconds: float, count: int) -> None: ...


class SimulatedInstance:
    def __init__(
        self, name: str, model: InstanceModel, deployment: Deployment, world: World
    ) -> None:
        self.name = name
        self.model = model
        self.role: Role = model.role
        self.state = InstanceState.READY
        self._deployment = deployment
        self._world = world
        self.pool = world.pool(deployment.blocks(model))
        self.batcher = SteadyBatcher(self.pool, _with_speed(model), world.tpot_s)
        self._reserve = int(self.pool.total_blocks * model.settings.decode.watermark)
        self._flow = Flow(self.pool)
        self._steady = True
        """Whether all decodes are in the flow; else the batcher decides every step."""
        self.busy_s = 0.0
        self.most_tokens = self.most_kv_read_tokens = 0
        self.egress_free_s = self.ingress_free_s = 0.0
        self.inbox = Inbox(self, deployment, world)
        self._targets: dict[str, SimulatedInstance | None] = {}
        self._started_s: dict[str, float] = {}
        self._fresh: dict[str, None] = {}
        """Decoding sequences that have not taken a step here."""
        self._draining: dict[str, Sequence] = {}
        """Prompts in the last stages of a pipeline."""
        self._held: dict[str, Handoff] = {}
        self._run: Run | None = None
        self._run_number = 0
        self._ending = False
        self._between: list[Callable[[float], None]] = []
        """To be done before the next run."""
        self._listing = Listing()
        self._view: InstanceView | None = None
        self._crowd = None if model.crowded is None else world.crowd(model.node)

    # What others ask of it.

    def submit(self, sequence: Sequence, target: SimulatedInstance | None, now: float) -> None:
        """Prefill here; with a target, hand it off afterwards."""
        try:
            self.batcher.prefill.add(sequence)
        except OutOfBlocks:
            self._world.failed(sequence.id)
            return
        self._targets[sequence.id] = target
        self._listing.add(sequence)
        self._poke(now)

    def freed(self, handoff: Handoff, now: float) -> None:
        """The target has the KV: the source may reuse its blocks."""
        del self._held[handoff.sequence.id]
        self._release(handoff.sequence)
        self.nudge(now)

    def keep(self, handoff: Handoff, now: float) -> None:
        """The target is gone: decode here."""
        del self._held[handoff.sequence.id]
        self.join(handoff.sequence, now)

    def join(self, sequence: Sequence, now: float, *, fresh: bool = True) -> None:
        """Decode a sequence whose KV is here."""
        self.batcher.decode.add(sequence)
        if fresh:
            self._fresh[sequence.id] = None
        self._listing.add(sequence)
        self._poke(now)

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

    def between_steps(self, action: Callable[[float], None], now: float) -> None:
        """Once the step under way has ended."""
        if self._run is None:
            action(now)
        else:
            self._between.append(action)
            self._poke(now)

    def nudge(self, now: float) -> None:
        """There may be more room than before."""
        self.inbox.take(now)
        self._poke(now)

    def withdraw(self, request_id: str) -> Sequence:
        """Works on it no longer; its blocks are still held. Between steps only."""
        assert self._run is None
        if request_id in self._flow:
            self._flow.remove(request_id)
        self._fresh.pop(request_id, None)
        self._listing.remove(request_id)
        self._view = None
        if request_id in self.batcher.prefill:
            self._targets.pop(request_id)
            return self.batcher.prefill.remove(request_id)
        return self.batcher.decode.remove(request_id)

    def fail(self, now: float) -> None:
        """All that is here is lost, but for the tokens that have been delivered."""
        self.state = InstanceState.STOPPED
        run, self._run = self._run, None
        self._run_number += 1
        if run is not None:
            self.busy_s += now - run.start_s - run.moved_s
            done = steps_to_reach(now - run.start_s, run.first_step_s, run.growth_s) - 1
            self._flow.advance(done if run.steady else 0)
        if self._crowd is not None:
            self._crowd.settle(self, now)
        self._flow.release()
        self.inbox.abandon(now)
        for handoff in self._held.values():
            handoff.target.inbox.forget(handoff)
        held = [handoff.sequence for handoff in self._held.values()]
        prompts = [*self.batcher.prefill.sequences, *self._draining.values()]
        self._held.clear()
        self._draining.clear()
        for sequence in [*self.batcher.decode.sequences, *prompts, *held]:
            self._world.lost(sequence, now)

    def has_room(self, blocks: int, now: float) -> bool:
        """Asked while a run goes on, only what it surely leaves is given before it ends."""
        run = self._run
        if run is None:
            return self._grown_if_tight(blocks) and self.batcher.decode.has_room(blocks)
        if run.steady and self._is_tight(blocks, run.steps):
            self._poke(now)
            return False
        return self.batcher.decode.has_room(blocks)

    def view(self) -> InstanceView:
        """As the router sees it, with the requests that are new; built only after a change."""
        if self._view is None:
            self._view = self._view_of(self._listing.news())
        return self._view

    def whole_view(self) -> InstanceView:
        """As the balancer sees it."""
        self._flow.catch_up_all()
        return self._view_of((*self._listing.everything(), *self.inbox.listed))

    def load(self) -> Load:
        """Without what is on it."""
        return self._load(())

    def turn(self, role: Role) -> None:
        """What is here goes on as it began; only new work follows the role."""
        self.role, self._view = role, None

    def become(self, state: InstanceState) -> None:
        self.state, self._view = state, None

    @property
    def is_empty(self) -> bool:
        idle = self._run is None and not len(self.inbox) and not self._held
        scheduled = len(self.batcher.decode) + len(self.batcher.prefill) + len(self._draining)
        return idle and not scheduled and self.pool.available == self.pool.total_blocks

    # Running.

    def _poke(self, now: float) -> None:
        """Something came: start, or stop a run of decodes after its current step."""
        self._view = None
        run = self._run
        if run is None:
            if not self._ending:
                self._start(now)
        elif run.steps > 1:
            steps = steps_to_reach(now - run.start_s, run.first_step_s, run.growth_s)
            if steps < run.steps:
                run.steps = steps
                self._schedule(run)

    @property
    def computes(self) -> bool:
        return self._run is not None

    def hurry_or_slow(self, now: float) -> None:
        run = self._run
        assert run is not None
        run.go_on(self._slowed(run.crowded_ratio), now)
        self._schedule(run)

    def _slowed(self, crowded_ratio: float) -> float:
        share = 0.0 if self._crowd is None else self._crowd.share(self)
        return 1.0 + share * (crowded_ratio - 1.0)

    def _start(self, now: float) -> None:
        self._start_run(now)
        if self._crowd is not None:
            self._crowd.settle(self, now)

    def _start_run(self, now: float) -> None:
        if self._steady and self._start_steady(now):
            return
        if self._steady:
            self._flow.release()
            self._steady = False
        step = self.batcher.next_step(now)
        for sequence in step.decode_step.outgrown:
            self._give_up(sequence)
        if step.batch.chunks:
            self._launch(step, len(step.decodes), work_of((*step.decodes, *step.prefills)), now, 1)
        elif not len(self.batcher.decode):
            self._steady = True

    def _start_steady(self, now: float) -> bool:
        """Start what is known without asking for a whole step; False if too little is known."""
        flow, prompts = self._flow, len(self.batcher.prefill)
        newcomers = self.batcher.steady_decode.has_newcomers
        open_blocks = self.pool.total_blocks // 2 if prompts else len(flow) + 1
        if (prompts or newcomers) and not self._grown_if_tight(open_blocks):
            return False
        if newcomers and not self._let_in():
            return False
        decodes = len(flow)
        if not decodes and not prompts:
            return True
        lasting = self._rounds_in_memory(decodes)
        if lasting < 1:
            return False
        step = self.batcher.prompts_beside(now, decodes)
        if step.prefills:
            work = with_decodes(work_of(step.prefills), decodes, flow.kv_read_tokens)
            self._launch(step, decodes, work, now, 1)
        elif decodes:
            work = Step(decodes, decodes, 0, flow.kv_read_tokens)
            self._launch(step, decodes, work, now, min(flow.steps_to_end, lasting))
        return True

    def _let_in(self) -> bool:
        newcomers = self.batcher.steady_decode.let_all_in()
        if newcomers is None:
            return False
        for sequence in newcomers:
            self._flow.add(sequence)
        return True

    def _rounds_in_memory(self, decodes: int) -> int:
        if not decodes:
            return 1
        lasting = self._flow.steps_in_memory
        if lasting < 1 and self._flow.grow():
            lasting = self._flow.steps_in_memory
        return lasting

    def _grown_if_tight(self, blocks: int) -> bool:
        """Give out blocks that are spoken for, where that may change what is decided."""
        return not self._is_tight(blocks) or self._flow.grow()

    def _is_tight(self, blocks: int, more_steps: int = 0) -> bool:
        spoken_for = self._flow.most_ungrown_blocks(more_steps)
        return spoken_for > 0 and spoken_for + blocks + self._reserve > self.pool.available

    def _launch(self, step: RoleStep, decodes: int, work: Step, now: float, steps: int) -> None:
        self.most_tokens = max(self.most_tokens, work.tokens)
        self.most_kv_read_tokens = max(self.most_kv_read_tokens, work.kv_read_tokens)
        first_s = self._step_s(self.model.latency, work, decodes=decodes > 0)
        if step.batch.swaps:
            first_s += self._swap_s(step)
        growth_s = self._growth_s(decodes) if steps > 1 else 0.0
        run = Run(step, decodes, now, first_s, growth_s, steps, self._steady)
        if self.model.crowded is not None:
            crowded_s = self._step_s(self.model.crowded, work, decodes=decodes > 0)
            run.crowded_ratio = crowded_s / first_s
            run.go_on(self._slowed(run.crowded_ratio), now)
        self._run = run
        for chunk in step.prefills:
            if chunk.request_id not in self._started_s:
                self._started_s[chunk.request_id] = now
                self._world.moment("prefill_started_s", chunk.request_id, now)
        if self._fresh:
            self._mark_first_steps(run)
        self._schedule(run)

    def _schedule(self, run: Run) -> None:
        self._run_number += 1
        self._world.at(run.start_s + run.duration_s, self._end, self._run_number)

    def _mark_first_steps(self, run: Run) -> None:
        """Everyone decodes in a steady run; else those in the step."""
        taking = (
            list(self._fresh) if run.steady else [chunk.request_id for chunk in run.step.decodes]
        )
        for request_id in taking:
            if request_id in self._fresh:
                del self._fresh[request_id]
                self._world.moment("decode_started_s", request_id, run.start_s)
                self._world.moment("second_token_s", request_id, run.start_s + run.first_step_s)

    def _step_s(self, latency: LatencyModel, work: Step, *, decodes: bool) -> float:
        """A pass, or with stages working at once: a round of passes over parts of the batch."""
        stages = self.model.pipeline_parallel
        if not self.model.pipelined or stages == 1:
            return latency.step_s(work)
        if not decodes:
            return latency.stage_s(work)
        part = Step(
            -(-work.tokens // stages),
            -(-work.draws // stages),
            work.pairs // stages,
            work.kv_read_tokens // stages,
        )
        return latency.step_s(part)

    def _growth_s(self, batch: int) -> float:
        stages = self.model.pipeline_parallel if self.model.pipelined else 1
        return self.model.latency.read_s * batch / stages

    def _swap_s(self, step: RoleStep) -> float:
        """Half of the there and back that a swapped block costs."""
        blocks = sum(len(swap.blocks) for swap in step.batch.swaps)
        return blocks * self.model.settings.decode.swap_block_s / 2

    def _drain_s(self, run: Run) -> float:
        """How long prompts are still in later stages when the next batch may start."""
        stages = self.model.pipeline_parallel
        if not self.model.pipelined or stages == 1 or run.decodes:
            return 0.0
        return run.first_step_s * (stages - 1)

    def _end(self, number: int, now: float) -> None:
        if number != self._run_number:
            return
        run = self._run
        assert run is not None
        self._run = self._view = None
        self._ending = True
        duration_s = run.lasted_s
        self.busy_s += duration_s
        if run.step.prefills:
            self.batcher.measured(run.step, run.first_step_s)
        else:
            self.batcher.measured_run(run.first_step_s, run.growth_s, run.steps)
        if run.decodes:
            self._world.gap(duration_s / run.steps, run.steps * run.decodes)
        ended = self._flow.advance(run.steps) if run.steady else self._take_tokens(run)
        for sequence in ended:
            self._finish(self.batcher.decode.remove(sequence.id), now)
        for chunk in run.step.prefills:
            self._apply_prefill(chunk, now, self._drain_s(run))
        if not run.steady:
            self._try_steady()
        while self._between:
            self._between.pop(0)(now)
        if self.inbox.waits:
            self.inbox.take(now)
        self._ending = False
        self._start(now)

    def _take_tokens(self, run: Run) -> list[Sequence]:
        """One step as the batcher made it; those that end with it."""
        ended = []
        for chunk in run.step.decodes:
            sequence = self.batcher.decode.computed(chunk)
            if chunk.draw is None:
                continue
            sequence.tokens.append(0)
            if sequence.output_tokens >= sequence.request.sampling.max_tokens:
                ended.append(sequence)
        return ended

    def _try_steady(self) -> None:
        """Back to counting rounds, once everyone runs with all of its KV and room to grow."""
        scheduler = self.batcher.steady_decode
        running = scheduler.running
        if not scheduler.all_run or any(s.uncomputed != 1 for s in running):
            return
        if self.pool.available < len(running):
            return
        for sequence in running:
            self._flow.add(sequence)
        self._steady = True

    def _finish(self, sequence: Sequence, now: float) -> None:
        self._release(sequence)
        sequence.state = SequenceState.FINISHED
        self._world.finished(sequence.id, now)

    def _give_up(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._fresh.pop(sequence.id, None)
        self._world.failed(sequence.id)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._listing.remove(sequence.id)
        self._view = None

    def _apply_prefill(self, chunk: Chunk, now: float, drain_s: float) -> None:
        sequence = self.batcher.prefill.computed(chunk)
        if chunk.draw is None:
            return
        self.batcher.prefill.remove(sequence.id)
        if drain_s == 0.0:
            self._prefilled(sequence, len(chunk.tokens), now)
        else:
            self._draining[sequence.id] = sequence
            self._world.at(now + drain_s, self._drained, (sequence, len(chunk.tokens)))

    def _drained(self, prompt: tuple[Sequence, int], now: float) -> None:
        sequence, last_chunk_tokens = prompt
        if self._draining.pop(sequence.id, None) is sequence:
            self._prefilled(sequence, last_chunk_tokens, now)

    def _prefilled(self, sequence: Sequence, last_chunk_tokens: int, now: float) -> None:
        """The next token is out: decode here, or offer the KV to who will."""
        sequence.tokens.append(0)
        self._world.first_token(sequence.id, now)
        target = self._targets.pop(sequence.id)
        started_s = self._started_s.pop(sequence.id)
        if sequence.output_tokens >= sequence.request.sampling.max_tokens:
            self._finish(sequence, now)
        elif target is None or target is self or target.state is InstanceState.STOPPED:
            self.join(sequence, now)
        else:
            sequence.state = SequenceState.HELD
            last_share = last_chunk_tokens / (len(sequence.tokens) - 1)
            tail_share = last_share / self._deployment.overheads.layer_groups
            handoff = Handoff(sequence, self, target, started_s, now, tail_share)
            self._held[sequence.id] = handoff
            target.inbox.add(handoff, now)

    # What others see.

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
        free_blocks = self.pool.available - self._flow.most_ungrown_blocks()
        return Load(
            instance=self.name,
            role=self.role,
            state=self.state,
            queue_requests=len(self.batcher.prefill),
            queued_tokens=self.batcher.prefill.queued_tokens,
            running_sequences=len(self.batcher.decode),
            running_tokens=self._flow.kv_read_tokens,
            free_blocks=max(0, free_blocks),
            total_blocks=self.pool.total_blocks,
            block_tokens=self.pool.block_tokens,
            pinned_blocks=0,
            cached_blocks=0,
            step_s=self.batcher.decode_step_s,
            sequences=sequences,
        )


def _with_speed(model: InstanceModel) -> RoleSettings:
    """The batcher's first guess of the prefill rate, from the latency model."""
    settings = model.settings
    budget = settings.prefill.token_budget
    per_s = budget / model.latency.prefill_s([(budget, 0)])
    return replace(settings, prefill=replace(settings.prefill, tokens_per_s=per_s))
