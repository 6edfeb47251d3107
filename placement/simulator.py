"""A deployment in virtual time: the real router, batchers and block pools over a latency model.

Deterministic: events at one moment happen in the order they were scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from engine.request import Request, Sampling
from engine.slo import Slo
from placement.outcome import Ledger
from placement.router import Router
from placement.simulated_instance import SimulatedInstance
from placement.view import View

if TYPE_CHECKING:
    from placement.deployment import Deployment
    from placement.outcome import Outcome
    from placement.workload import Workload

Action = Callable[[float], None]
PREFIX_TOKEN = 1 << 24
COARSE_BLOCK_TOKENS = 1 << 14
"""Prefixes need not be told apart where no request shares one."""
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
        self._events: list[tuple[float, int, Action]] = []
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
        while not self.ledger.hopeless:
            due_s = arrivals[following] + delay_s if following < len(arrivals) else None
            if due_s is not None and (not self._events or due_s <= self._events[0][0]):
                self._arrive(following, due_s)
                following += 1
                if self._may_stop and following % LOOK_AHEAD_ARRIVALS == 0:
                    self.ledger.look_ahead(due_s, following)
            elif self._events:
                now, _, action = heappop(self._events)
                action(now)
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
        self.instances[route.prefill].submit(request, target, now)

    def _request(self, index: int) -> Request:
        workload, ledger = self._workload, self.ledger
        prompt, output = int(workload.prompt_tokens[index]), int(workload.output_tokens[index])
        return Request(
            str(index),
            self._prompt(index, prompt),
            Sampling(max_tokens=output, ignore_eos=True),
            Slo(ledger.slo_ttft_s[index], ledger.slo_tpot_s[index]),
            0 if workload.priority is None else int(workload.priority[index]),
            float(workload.arrival_s[index]),
        )

    def _prompt(self, index: int, tokens: int) -> tuple[int, ...]:
        """Tokens that agree with another prompt's as far as both share a prefix."""
        workload, shared = self._workload, 0
        head: tuple[int, ...] = ()
        if workload.prefix_id is not None and workload.prefix_tokens is not None:
            prefix = int(workload.prefix_id[index])
            shared = int(workload.prefix_tokens[index]) if prefix >= 0 else 0
            head = (PREFIX_TOKEN + prefix,) * shared
        if shared == tokens:
            return head
        return (*head, index + 1, *((0,) * (tokens - shared - 1)))

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

    def at(self, time_s: float, action: Action) -> None:
        self._scheduled += 1
        heappush(self._events, (time_s, self._scheduled, action))

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

    def gap(self, seconds: float, count: int) -> None:
        self.ledger.gaps.append((seconds, count))


def _names(deployment: Deployment) -> list[str]:
    """role-number, as the cluster names its instances."""
    counts: dict[str, int] = {}
    names = []
    for model in deployment.instances:
        role = model.role.value
        names.append(f"{role}-{counts.get(role, 0)}")
        counts[role] = counts.get(role, 0) + 1
    return names
