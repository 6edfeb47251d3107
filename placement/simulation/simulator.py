"""A deployment in virtual time: the real router, batchers and block pools over a latency model.

Deterministic: events at one moment happen in the order they were scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from heapq import heappop, heappush
from math import ceil, isnan
from typing import TYPE_CHECKING, Any

from engine.blocks import BlockPool
from engine.request import Request, Sampling, start_sequence
from engine.slo import Slo
from placement.routing.router import Router
from placement.simulation.balancing import Balancing
from placement.simulation.counted_pool import CountedPool
from placement.simulation.crowding import Crowd
from placement.simulation.dynamics import FleetRecord
from placement.simulation.fleet import SimulatedFleet
from placement.simulation.gate import Gate
from placement.simulation.instance import SimulatedInstance
from placement.simulation.migration import Migrations
from placement.simulation.outcome import Ledger
from placement.view import View

if TYPE_CHECKING:
    from engine.request import Sequence
    from placement.simulation.deployment import Deployment, InstanceModel
    from placement.simulation.dynamics import Dynamics
    from placement.simulation.outcome import Outcome
    from placement.workload import Workload

Action = Callable[[Any, float], None]
PREFIX_TOKEN = 1 << 24
COARSE_BLOCK_TOKENS = 1 << 30
"""Prompts need not be told apart where none shares a prefix."""
LOOK_AHEAD_ARRIVALS = 25
"""How often it is asked whether attainment is out of reach."""


def simulate(
    deployment: Deployment,
    workload: Workload,
    attainment: float | None = None,
    dynamics: Dynamics | None = None,
) -> Outcome:
    """Every request to its end; with an attainment, given up once it is out of reach."""
    return Simulation(deployment, workload, attainment, dynamics).run()


class Simulation:
    def __init__(
        self,
        deployment: Deployment,
        workload: Workload,
        attainment: float | None = None,
        dynamics: Dynamics | None = None,
    ) -> None:
        may_miss = None if attainment is None else int((1 - attainment) * len(workload) + 1e-9)
        self._may_stop = attainment is not None
        slo = deployment.slo
        self._deployment = deployment
        self._workload = workload
        self.ledger = Ledger(workload, slo.ttft_s, slo.tpot_s, may_miss)
        alike = workload.slo_ttft_s is None and workload.slo_tpot_s is None
        self._slo = slo if alike else None
        self.tpot_s = slo.tpot_s if workload.slo_tpot_s is None else None
        self._events: list[tuple[float, int, Action, Any]] = []
        self._scheduled = 0
        self._now = 0.0
        self._arrived = 0
        self._crowds: dict[str, Crowd] = {}
        self.instances = {
            name: SimulatedInstance(name, model, deployment, self)
            for name, model in zip(deployment.names, deployment.instances, strict=True)
        }
        self._gone: list[SimulatedInstance] = []
        self._waiting: dict[str, tuple[Sequence, float]] = {}
        """For an instance, and since when."""
        settings = deployment.router
        if workload.prefix_id is None:
            settings = replace(settings, prefix_block_tokens=COARSE_BLOCK_TOKENS)
        self._router = Router(settings)
        self.record = FleetRecord()
        admission = None if dynamics is None else dynamics.admission
        self._gate = None if admission is None else Gate(self, self._router, admission)
        self._living = None if dynamics is None else _Living(self, deployment, dynamics)

    def run(self) -> Outcome:
        arrivals: list[float] = self._workload.arrival_s.tolist()
        while not (self._may_stop and self.ledger.hopeless):
            following = self._arrived
            due_s = arrivals[following] if following < len(arrivals) else None
            if due_s is not None and (not self._events or due_s <= self._events[0][0]):
                self._arrived += 1
                self._arrive(following, due_s)
                if self._may_stop and self._arrived % LOOK_AHEAD_ARRIVALS == 0:
                    self.ledger.look_ahead(due_s, self._arrived)
            elif self._events:
                now, _, action, subject = heappop(self._events)
                self._now = now
                action(subject, now)
            else:
                break
        for request_id in list(self._waiting):
            self.failed(request_id)
        return self._outcome()

    def _arrive(self, index: int, now: float) -> None:
        self._now = now
        request = self._request(index)
        if self._living is not None:
            self._living.fleet.tally.prompt_tokens += len(request.prompt)
        way_s = self.in_company(self._deployment.overheads.arrival_s)
        if way_s:
            self.at(now + way_s, self._enter, start_sequence(request, 0))
        else:
            self._enter(start_sequence(request, 0), now)

    def _enter(self, sequence: Sequence, now: float) -> None:
        if self._gate is None:
            self.send(sequence, now)
        else:
            targets = self._workload.slo_ttft_s
            strict = targets is not None and not isnan(targets[int(sequence.request.id)])
            self._gate.arrive(sequence, now, strict=strict)

    def in_company(self, seconds: float) -> float:
        """What processes take so long for that wait for processors as instances do."""
        if not (seconds and self._crowds):
            return seconds
        return seconds * sum([crowd.times for crowd in self._crowds.values()]) / len(self._crowds)

    @property
    def all_instances(self) -> list[SimulatedInstance]:
        """With those that are gone."""
        return [*self._gone, *self.instances.values()]

    def view(self, now: float) -> View:
        return View(now, tuple([one.view(now) for one in self.instances.values()]))

    def send(self, sequence: Sequence, now: float) -> None:
        """To where it is answered, or to wait for an instance."""
        request = sequence.request
        route = self._router.choose(request, self.view(now))
        if route is None:
            self._waiting[request.id] = sequence, now
            return
        self._router.dispatched(request, route, now)
        target = None if route.decode is None else self.instances[route.decode]
        self.instances[route.prefill].submit(sequence, target, now)

    def _request(self, index: int) -> Request:
        workload, ledger = self._workload, self.ledger
        return Request(
            str(index),
            self._prompt(index, int(workload.prompt_tokens[index])),
            _sampling(ledger.output_tokens[index]),
            self._slo or Slo(ledger.slo_ttft_s[index], ledger.slo_tpot_s[index]),
            0 if workload.priority is None else int(workload.priority[index]),
            ledger.arrival_s[index],
        )

    def _prompt(self, index: int, tokens: int) -> tuple[int, ...]:
        """Tokens that agree with another prompt's as far as both share a prefix."""
        if self._workload.prefix_id is None:
            return _any_prompt(tokens)
        head: list[int] = []
        for prefix, shared in self._workload.prefix_parts(index):
            head += [PREFIX_TOKEN + prefix] * shared
        own = tokens - len(head)
        return (*head, index + 1, *_any_prompt(own - 1)) if own else tuple(head)

    def _outcome(self) -> Outcome:
        instances = self.all_instances
        beyond: dict[str, None] = {}
        for one in instances:
            found = one.model.latency.outside(one.most_tokens, one.most_kv_read_tokens)
            beyond.update(dict.fromkeys(found))
        busy_s = {one.name: one.busy_s for one in instances}
        preemptions = sum(one.batcher.decode.preemptions for one in instances)
        refused = 0 if self._gate is None else self._gate.refused
        return self.ledger.outcome(busy_s, preemptions, tuple(beyond), refused)

    # What instances tell.

    def at(self, time_s: float, action: Action, subject: Any) -> None:
        self._scheduled += 1
        heappush(self._events, (time_s, self._scheduled, action, subject))

    def pool(self, blocks: int) -> BlockPool:
        """Where no request finds a prefix, which block holds what does not matter, except that
        what had to give way is computed again from its beginning."""
        size = self._deployment.block_tokens
        counted = self._workload.prefix_id is None or not self._deployment.cache_prefixes
        return CountedPool(blocks, size) if counted else BlockPool(blocks, size)

    def crowd(self, node: str) -> Crowd:
        return self._crowds.setdefault(node, Crowd())

    def moment(self, name: str, request_id: str, now: float) -> None:
        self.ledger.moment(name, int(request_id), now)

    def first_token(self, request_id: str, now: float) -> None:
        self.ledger.first_token(int(request_id), now)
        self._router.prefilled(request_id, now)
        if self._gate is not None:
            self._gate.prefilled(request_id, now)
        if self._living is not None:
            self._living.fleet.tally.output_tokens += 1
            ttft_share, _ = self.ledger.shares(int(request_id))
            self._living.fleet.tally.ttft_shares.append(ttft_share)

    def finished(self, request_id: str, now: float) -> None:
        index = int(request_id)
        self.ledger.finished(index, now)
        self._router.ended(request_id)
        if self._gate is not None:
            self._gate.ended(request_id, now)
        if self._living is not None:
            _, tpot_share = self.ledger.shares(index)
            if tpot_share is not None:
                self._living.fleet.tally.tpot_shares.append(tpot_share)
            if not self.unfinished:
                self._living.fleet.end(now)

    def failed(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self.ledger.failed(int(request_id))
        self._router.ended(request_id)
        if self._gate is not None:
            self._gate.ended(request_id, self._now)

    def gap(self, seconds: float, count: int) -> None:
        self.ledger.gap(seconds, count)
        if self._living is not None:
            self._living.fleet.tally.output_tokens += count

    def lost(self, sequence: Sequence, now: float) -> None:
        """Its instance is gone, which is noticed a little later."""
        assert self._living is not None
        self.record.replays += 1
        self.at(now + self._living.dynamics.notice_s, self.replay, sequence)

    def replay(self, sequence: Sequence, now: float) -> None:
        """It is answered anew, after what was delivered."""
        self._router.ended(sequence.id)
        epoch, output = sequence.epoch + 1, tuple(sequence.output)
        self.send(start_sequence(sequence.request, epoch, output), now)

    # What the fleet asks.

    @property
    def unfinished(self) -> bool:
        return self.ledger.ended < len(self._workload)

    def look_again_s(self, now: float, every_s: float) -> float:
        """When what looks so often does so next: not while all who came have gone."""
        looks = 1
        if self._arrived == self.ledger.ended:
            due_s = float(self._workload.arrival_s[self._arrived])
            looks = max(ceil((due_s - now) / every_s), 1)
        return now + looks * every_s

    @property
    def waiting_requests(self) -> int:
        return len(self._waiting)

    def bring_up(self, name: str, model: InstanceModel, now: float) -> None:
        node = name if len({one.node for one in self._deployment.instances}) > 1 else model.node
        self.instances[name] = SimulatedInstance(
            name, replace(model, node=node), self._deployment, self
        )
        self.ready(now)

    def ready(self, now: float) -> None:
        """There may be an instance for those that wait for one."""
        waiting, self._waiting = self._waiting, {}
        for sequence, _ in waiting.values():
            self.send(sequence, now)

    def give_up(self, since_s: float, now: float) -> None:
        """Requests that have waited for an instance since then."""
        for request_id, (_, began_s) in list(self._waiting.items()):
            if began_s <= since_s:
                self.failed(request_id)
        if self._living is not None and not self.unfinished:
            self._living.fleet.end(now)

    def take_down(self, name: str) -> None:
        self._gone.append(self.instances.pop(name))

    def moved(self, request_id: str, *, committed: bool) -> None:
        assert self._living is not None
        self._living.balancing.moved(request_id, committed=committed)


class _Living:
    """What acts on the instances of a simulation by itself."""

    def __init__(self, world: Simulation, deployment: Deployment, dynamics: Dynamics) -> None:
        self._world, self.dynamics = world, dynamics
        self.fleet = SimulatedFleet(world, deployment, dynamics)
        self.migrations = Migrations(world, deployment, dynamics)
        self.balancing = Balancing(world, self.migrations, dynamics)
        self.fleet.begin()
        self.balancing.begin()
        world.at(dynamics.patience_s, self._tire, None)
        for failure in dynamics.failures:
            world.at(failure.time_s, self._fail, failure.instance)

    def _tire(self, _: None, now: float) -> None:
        self._world.give_up(now - self.dynamics.patience_s, now)
        if self._world.unfinished:
            next_s = self._world.look_again_s(now, self.dynamics.patience_s / 10)
            self._world.at(next_s, self._tire, None)

    def _fail(self, name: str, now: float) -> None:
        """An instance that is not there any more cannot fail."""
        gone = self._world.instances.get(name)
        if gone is None:
            return
        self._world.take_down(name)
        self.migrations.instance_lost(gone, now)
        self.fleet.lost(gone, now)
        gone.fail(now)


@lru_cache(maxsize=4096)
def _sampling(output_tokens: int) -> Sampling:
    return Sampling(max_tokens=output_tokens, ignore_eos=True)


@lru_cache(maxsize=4096)
def _any_prompt(tokens: int) -> tuple[int, ...]:
    return (0,) * tokens
