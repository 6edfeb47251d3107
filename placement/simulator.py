"""A deployment in virtual time: the real router, batchers and block pools over a latency model.

Deterministic: events at one moment happen in the order they were scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from engine.blocks import BlockPool
from engine.request import Request, Sampling, start_sequence
from engine.slo import Slo
from placement.counted_pool import CountedPool
from placement.outcome import Ledger
from placement.router import Router
from placement.simulated_instance import SimulatedInstance
from placement.view import View

if TYPE_CHECKING:
    from engine.request import Sequence
    from placement.deployment import Deployment
    from placement.outcome import Outcome
    from placement.workload import Workload

Action = Callable[[Any, float], None]
PREFIX_TOKEN = 1 << 24
COARSE_BLOCK_TOKENS = 1 << 30
"""Prompts need not be told apart where none shares a prefix."""
LOOK_AHEAD_ARRIVALS = 25
"""How often it is asked whether attainment is out of reach."""


def simulate(
    deployment: Deployment, workload: Workload, attainment: float | None = None
) -> Outcome:
    """Every request to its end; with an attainment, given up once it is out of reach."""
    return Simulation(deployment, workload, attainment).run()


class Simulation:
    def __init__(
        self, deployment: Deployment, workload: Workload, attainment: float | None = None
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
        self.instances = {
            name: SimulatedInstance(name, model, deployment, self)
            for name, model in zip(_names(deployment), deployment.instances, strict=True)
        }
        settings = deployment.router
        if workload.prefix_id is None:
            settings = replace(settings, prefix_block_tokens=COARSE_BLOCK_TOKENS)
        self._router = Router(settings)

    def run(self) -> Outcome:
        arrivals: list[float] = self._workload.arrival_s.tolist()
        delay_s, following = self._deployment.overheads.arrival_s, 0
        while not (self._may_stop and self.ledger.hopeless):
            due_s = arrivals[following] + delay_s if following < len(arrivals) else None
            if due_s is not None and (not self._events or due_s <= self._events[0][0]):
                self._arrive(following, due_s)
                following += 1
                if self._may_stop and following % LOOK_AHEAD_ARRIVALS == 0:
                    self.ledger.look_ahead(due_s, following)
            elif self._events:
                now, _, action, subject = heappop(self._events)
                action(subject, now)
            else:
                break
        return self._outcome()

    def _arrive(self, index: int, now: float) -> None:
        request = self._request(index)
        view = View(now, tuple(one.view() for one in self.instances.values()))
        route = self._router.choose(request, view)
        assert route is not None, "every simulated instance takes requests"
        self._router.dispatched(request, route, now)
        target = None if route.decode is None else self.instances[route.decode]
        self.instances[route.prefill].submit(start_sequence(request, 0), target, now)

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
        workload = self._workload
        if workload.prefix_id is None or workload.prefix_tokens is None:
            return _any_prompt(tokens)
        prefix = int(workload.prefix_id[index])
        shared = int(workload.prefix_tokens[index]) if prefix >= 0 else 0
        head = (PREFIX_TOKEN + prefix,) * shared
        return head if shared == tokens else (*head, index + 1, *_any_prompt(tokens - shared - 1))

    def _outcome(self) -> Outcome:
        instances = self.instances.values()
        beyond: dict[str, None] = {}
        for one in instances:
            found = one.model.latency.outside(one.most_tokens, one.most_kv_read_tokens)
            beyond.update(dict.fromkeys(found))
        busy_s = {one.name: one.busy_s for one in instances}
        preemptions = sum(one.batcher.decode.preemptions for one in instances)
        return self.ledger.outcome(busy_s, preemptions, tuple(beyond))

    # What instances tell.

    def at(self, time_s: float, action: Action, subject: Any) -> None:
        self._scheduled += 1
        heappush(self._events, (time_s, self._scheduled, action, subject))

    def pool(self, blocks: int) -> BlockPool:
        """Where no request shares a prefix, which block holds what does not matter, except that
        what had to give way is computed again from its beginning."""
        size = self._deployment.block_tokens
        counted = self._workload.prefix_id is None
        return CountedPool(blocks, size) if counted else BlockPool(blocks, size)

    def moment(self, name: str, request_id: str, now: float) -> None:
        self.ledger.moments[name][int(request_id)] = now

    def first_token(self, request_id: str, now: float) -> None:
        self.ledger.first_token(int(request_id), now)
        self._router.prefilled(request_id, now)

    def finished(self, request_id: str, now: float) -> None:
        self.ledger.finished(int(request_id), now)
        self._router.ended(request_id)

    def failed(self, request_id: str) -> None:
        self.ledger.failed(int(request_id))
        self._router.ended(request_id)

    def lost(self, sequence: Sequence, now: float) -> None:
        raise NotImplementedError

    def gap(self, seconds: float, count: int) -> None:
        self.ledger.gap(seconds, count)


def _names(deployment: Deployment) -> list[str]:
    """role-number, as the cluster names its instances."""
    counts: dict[str, int] = {}
    names = []
    for model in deployment.instances:
        role = model.role.value
        names.append(f"{role}-{counts.get(role, 0)}")
        counts[role] = counts.get(role, 0) + 1
    return names


@lru_cache(maxsize=4096)
def _sampling(output_tokens: int) -> Sampling:
    return Sampling(max_tokens=output_tokens, ignore_eos=True)


@lru_cache(maxsize=4096)
def _any_prompt(tokens: int) -> tuple[int, ...]:
    return (0,) * tokens
