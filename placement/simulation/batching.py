"""One batch after another in virtual time: the real batcher and block pool, no device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

from engine.request import SequenceState
from placement.latency.machine import REST_S
from placement.latency.model import Step, steps_to_reach
from placement.simulation.flow import Flow
from placement.simulation.pace import Pace
from placement.simulation.run import Run, work_of
from placement.simulation.steady import SteadyBatcher
from placement.simulation.unsteadiness import unsteadiness

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.request import Sequence
    from placement.role import RoleSettings
    from placement.role import Step as RoleStep
    from placement.simulation.deployment import Deployment, InstanceModel
    from placement.simulation.world import World


class Batching(ABC):
    """What a device does: runs of steps, each from an end of the one before.

    What answers begin, end or find no room for is for the instance around it to deal with.
    """

    def __init__(
        self, name: str, model: InstanceModel, deployment: Deployment, world: World
    ) -> None:
        self.name = name
        self.model = model
        self._world = world
        self.pool = world.pool(deployment.blocks(model))
        self.batcher = SteadyBatcher(self.pool, _with_speed(model), world.tpot_s)
        self._pace = Pace(model, model.latency)
        self._crowded_pace = None if model.crowded is None else Pace(model, model.crowded)
        self._machine = model.machine
        self._unsteady = unsteadiness(name, model.machine)
        self._ended_s = -inf
        self._after_prompts = False
        alone = model.crowded is None and model.machine is None
        self._crowd = None if alone else world.crowd(model.node)
        self._flow = Flow(self.pool)
        self._steady = True
        """Whether all decodes are in the flow; else the batcher decides every step."""
        self.busy_s = 0.0
        self.most_tokens = self.most_kv_read_tokens = 0
        self._started_s: dict[str, float] = {}
        """Prompts of which some tokens have been computed."""
        self._fresh: dict[str, None] = {}
        """Decoding sequences that have not taken a step here."""
        self._run: Run | None = None
        self._run_number = 0
        self._ending = False
        self._between: list[Callable[[float], None]] = []
        """To be done before the next run."""
        self._changed = True
        """Since it was last looked at."""

    # What the instance around it does.

    @abstractmethod
    def _prefilled(self, sequence: Sequence, last_chunk_tokens: int, now: float) -> None:
        """Its next token is out."""

    @abstractmethod
    def _let_go(self, sequence: Sequence) -> None:
        """It needs its blocks no longer."""

    @abstractmethod
    def _drain(self, sequence: Sequence, last_chunk_tokens: int, end_s: float) -> None:
        """It is prefilled once it has left the last stage of a pipeline."""

    @abstractmethod
    def _take_offers(self, now: float) -> None:
        """There may be more room than before."""

    # Between runs.

    @property
    def slowed(self) -> float | None:
        return None if self._run is None else self._run.slowed

    def between_steps(self, action: Callable[[float], None], now: float) -> None:
        """Once the step under way has ended."""
        if self._run is None:
            action(now)
        else:
            self._between.append(action)
            self._poke(now)

    def has_room(self, blocks: int, now: float) -> bool:
        """Asked while a run goes on, only what it surely leaves is given before it ends."""
        run = self._run
        decode = self.batcher.decode
        if run is None:
            return self._flow.grow() and decode.has_room(blocks)
        if not run.steady:
            return decode.has_room(blocks)
        needed = self._flow.ungrown_blocks_after(run.steps)
        if not needed:
            return decode.has_room(blocks)
        reserve = int(self.pool.total_blocks * self.model.settings.decode.watermark)
        if needed + blocks + reserve > self.pool.available:
            self._poke(now)
            return False
        return decode.has_room(blocks)

    def _poke(self, now: float) -> None:
        """Something came: start, or stop a run of decodes after its current step."""
        self._changed = True
        run = self._run
        if run is None:
            if not self._ending:
                self._start(now)
        elif run.steps > 1:
            steps = steps_to_reach(now - run.start_s, run.first_step_s, run.growth_s)
            if steps < run.steps:
                run.steps = steps
                self._schedule(run)

    def _catch_up(self, now: float) -> None:
        """Count the steps of the run under way that have ended, as if another had begun then."""
        run = self._run
        if run is None or run.steps == 1:
            return
        ended = steps_to_reach(now - run.start_s, run.first_step_s, run.growth_s) - 1
        if 0 < ended < run.steps:
            self._account_for(run.split(ended))
            self._flow.advance(ended)
            self._changed = True

    def _finish(self, sequence: Sequence, now: float) -> None:
        self._let_go(sequence)
        sequence.state = SequenceState.FINISHED
        self._world.finished(sequence.request.id, now)

    def _stop(self, now: float) -> None:
        """It is gone in the middle of whatever it does."""
        run, self._run = self._run, None
        self._run_number += 1
        if run is not None:
            self.busy_s += now - run.start_s - run.moved_s
            done = steps_to_reach(now - run.start_s, run.first_step_s, run.growth_s) - 1
            self._flow.advance(done if run.steady else 0)
        if self._crowd is not None:
            self._crowd.settle(self, now)
        self._flow.release()

    # Neighbours.

    def hurry_or_slow(self, now: float) -> None:
        """Between two runs the next one will begin at the right pace."""
        run = self._run
        if run is not None:
            run.go_on(self._slowed(run), now)
            self._schedule(run)

    def _slowed(self, run: Run) -> float:
        assert self._crowd is not None
        return self._crowd.slowed(self, run.crowded_ratio, prompts=bool(run.step.prefills))

    # Starting.

    def _start(self, now: float) -> None:
        if not (self._steady and self._start_steady(now)):
            self._start_step(now)
        if self._crowd is not None:
            self._crowd.settle(self, now)

    def _start_steady(self, now: float) -> bool:
        """Start what is known without asking for a whole step; False if too little is known."""
        batcher, flow = self.batcher, self._flow
        newcomers = batcher.steady_decode.has_newcomers
        if not (len(flow) or newcomers or len(batcher.prefill)):
            return True
        if not flow.grow():
            return False
        if newcomers:
            if not batcher.steady_decode.is_steady:
                return False
            for sequence in batcher.steady_decode.let_in():
                flow.add(sequence)
        decodes = len(flow)
        if not decodes and batcher.steady_decode.has_newcomers:
            return False
        step = batcher.prompts_beside(now, decodes)
        if step.prefills:
            work = work_of(step.prefills, decodes, flow.kv_read_tokens, mixed=decodes > 0)
            self._launch(step, decodes, work, now, 1)
        elif decodes:
            work = Step(decodes, decodes, 0, flow.kv_read_tokens)
            self._launch(step, decodes, work, now, flow.steps_in_memory(flow.steps_to_end))
        return True

    def _start_step(self, now: float) -> None:
        """One step, as the batcher decides it."""
        if self._steady:
            self._flow.release()
            self._steady = False
        step = self.batcher.next_step(now)
        for sequence in step.decode_step.outgrown:
            self._give_up(sequence)
        if step.batch.chunks:
            mixed = bool(step.decodes and step.prefills)
            work = work_of((*step.decodes, *step.prefills), mixed=mixed)
            self._launch(step, len(step.decodes), work, now, 1)
        elif not len(self.batcher.decode):
            self._steady = True

    def _launch(self, step: RoleStep, decodes: int, work: Step, now: float, steps: int) -> None:
        self.most_tokens = max(self.most_tokens, work.tokens)
        self.most_kv_read_tokens = max(self.most_kv_read_tokens, work.kv_read_tokens)
        first_s = self._pace.step_s(work, decodes=decodes > 0)
        if step.batch.swaps:
            first_s += self._swap_s(step)
        growth_s = self._pace.growth_s(decodes) if steps > 1 else 0.0
        if self._machine is not None:
            if self._is_cold(step, now):
                first_s, steps = first_s + self._machine.cold_s, 1
            if self._unsteady is not None:
                first_s, growth_s, steps = self._unsteady.go(first_s, growth_s, steps, now)
        run = self._run = Run(step, decodes, now, first_s, growth_s, steps, self._steady)
        if self._crowd is not None:
            self._share(run, work, now)
        for chunk in step.prefills:
            if chunk.request_id not in self._started_s:
                self._started_s[chunk.request_id] = now
                self._world.moment("prefill_started_s", chunk.request_id, now)
        if self._fresh:
            self._mark_first_steps(run)
        self._schedule(run)

    def _share(self, run: Run, work: Step, now: float) -> None:
        """The machine, with its neighbours and with what serves their tokens."""
        if self._crowded_pace is not None:
            crowded_s = self._crowded_pace.step_s(work, decodes=run.decodes > 0)
            run.crowded_ratio = crowded_s / self._pace.step_s(work, decodes=run.decodes > 0)
        run.go_on(self._slowed(run), now)

    def _is_cold(self, step: RoleStep, now: float) -> bool:
        """The first pass after a rest, or of decodes alone after prompts."""
        return (self._after_prompts and not step.prefills) or now - self._ended_s > REST_S

    def _schedule(self, run: Run) -> None:
        self._run_number += 1
        self._world.at(run.start_s + run.duration_s, self._end, self._run_number)

    def _mark_first_steps(self, run: Run) -> None:
        """Of those in the step; in a steady run that is everyone who has been let in."""
        if run.steady:
            taking = [one for one in self._fresh if one in self._flow]
        else:
            decodes = [chunk.request_id for chunk in run.step.decodes]
            taking = [one for one in decodes if one in self._fresh]
        for request_id in taking:
            del self._fresh[request_id]
            self._world.moment("decode_started_s", request_id, run.start_s)
            self._world.moment("second_token_s", request_id, run.start_s + run.first_step_s)

    def _swap_s(self, step: RoleStep) -> float:
        """Half of the there and back that a swapped block costs."""
        blocks = sum(len(swap.blocks) for swap in step.batch.swaps)
        return blocks * self.model.settings.decode.swap_block_s / 2

    # Ending.

    def _end(self, number: int, now: float) -> None:
        """Of a run that was scheduled anew, only the last end counts."""
        if number != self._run_number:
            return
        run = self._run
        assert run is not None
        self._run, self._changed, self._ending = None, True, True
        self._ended_s = now
        self._after_prompts = bool(run.step.prefills)
        self._account_for(run)
        ended = self._flow.advance(run.steps) if run.steady else self._take_tokens(run)
        for sequence in ended:
            self._finish(self.batcher.decode.remove(sequence.request.id), now)
        if run.step.prefills:
            self._compute_prompts(run, now)
        if not run.steady:
            self._try_steady()
        while self._between:
            self._between.pop(0)(now)
        self._take_offers(now)
        self._ending = False
        self._start(now)

    def _account_for(self, run: Run) -> None:
        """What it took, and what the batcher learns from it."""
        duration_s = run.lasted_s
        self.busy_s += duration_s
        if run.step.prefills:
            self.batcher.measured(run.step, run.first_step_s)
        else:
            self.batcher.measured_run(run.first_step_s, run.growth_s, run.steps)
        if run.decodes:
            self._world.gap(duration_s / run.steps, run.steps * run.decodes)

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

    def _compute_prompts(self, run: Run, now: float) -> None:
        prefill = self.batcher.prefill
        drain_s = 0.0 if run.decodes else self._pace.drain_s(run.first_step_s)
        for chunk in run.step.prefills:
            sequence = prefill.computed(chunk)
            if chunk.draw is None:
                continue
            prefill.remove(chunk.request_id)
            if drain_s:
                self._drain(sequence, len(chunk.tokens), now + drain_s)
            else:
                self._prefilled(sequence, len(chunk.tokens), now)

    def _try_steady(self) -> None:
        """Back to counting rounds, once nobody who had to give way is still away, and all who run
        have all of their KV."""
        running = self.batcher.decode.running
        if not self.batcher.steady_decode.is_steady or any(s.uncomputed != 1 for s in running):
            return
        for sequence in running:
            self._flow.add(sequence)
        self._steady = True

    def _give_up(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        self._fresh.pop(sequence.id, None)
        self._world.failed(sequence.id)


def _with_speed(model: InstanceModel) -> RoleSettings:
    """The batcher's first guess of the prefill rate, from the latency model."""
    settings = model.settings
    budget = settings.prefill.token_budget
    per_s = budget / model.latency.prefill_s([(budget, 0)])
    return replace(settings, prefill=replace(settings.prefill, tokens_per_s=per_s))
