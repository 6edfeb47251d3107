"""A gateway reduced to its journal, its clients, and a router that chooses at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.gateway.entry import Action, Deliver, Fail, Reroute, Send
from cluster.gateway.journal import Journal
from engine.messages import InstanceState, Load, Message

if TYPE_CHECKING:
    from engine.request import Request
    from placement.routing.router import Route
    from tests.simulation.world import World

TICK_S = 0.2
RETRY_S = 0.3


class SimulatedGateway:
    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world
        self._journal = Journal()
        self._waiting: dict[str, Request] = {}
        """Wait for a first route."""
        self._rerouting: dict[str, tuple[str, ...]] = {}
        self._expected: dict[str, list[int]] = {}
        self._delivered: dict[str, int] = {}
        self.finished: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self._loads: dict[str, Load] = {}
        world.after(TICK_S, f"tick {name}", self._tick)

    def __len__(self) -> int:
        return len(self._journal) + len(self._waiting)

    def describe(self) -> str:
        return f"{self.name}: {[*self._waiting, *(e.id for e in self._journal.entries())]}"

    def submit(self, request: Request) -> None:
        self._expected[request.id] = self._world.expected(request)
        self._delivered[request.id] = 0
        self._waiting[request.id] = request
        self._route_waiting()

    def cancel(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        self._rerouting.pop(request_id, None)
        self._carry_out(self._journal.abort(request_id))

    def receive(self, sender: str, message: Message) -> None:
        if isinstance(message, Load):
            self._loads[message.instance] = message
        self._carry_out(self._journal.receive(sender, message, self._world.now))

    def _tick(self) -> None:
        if self._world.gateways.get(self.name) is not self:
            return
        self._carry_out(self._journal.tick(self._world.now))
        self._route_waiting()
        self._world.after(TICK_S, f"tick {self.name}", self._tick)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self._world.send(self.name, to, message)
                case Deliver(token):
                    self._deliver(token.request_id, token.index, token.token)
                    if token.finish is not None:
                        self._complete(token.request_id)
                case Reroute(request_id, avoid):
                    self._rerouting[request_id] = avoid
                case Fail(request_id, error):
                    self.failed[request_id] = type(error).__name__
                    self._rerouting.pop(request_id, None)

    def _deliver(self, request_id: str, index: int, token: int) -> None:
        expected = self._expected[request_id]
        assert index == self._delivered[request_id], f"{request_id} skipped or repeated {index}"
        assert token == expected[index], (
            f"seed {self._world.seed}: {request_id} token {index} is {token}, not {expected[index]}"
        )
        self._delivered[request_id] += 1
        self._world.delivered(request_id, index)

    def _complete(self, request_id: str) -> None:
        count = self._delivered[request_id]
        assert count == len(self._expected[request_id]), f"{request_id} ended after {count}"
        assert request_id not in self.finished
        self.finished[request_id] = count

    def _route_waiting(self) -> None:
        for request in list(self._waiting.values()):
            route = self._route(request)
            if route is not None:
                del self._waiting[request.id]
                self._carry_out(self._journal.open(request, route, self._world.now))
        for request_id in list(self._rerouting):
            entry = self._journal.find(request_id)
            assert entry is not None
            free = self._journal.may_restart(request_id)
            avoid = self._rerouting[request_id]
            route = self._route(entry.request, avoid) if free else None
            if route is not None and request_id in self._rerouting:
                del self._rerouting[request_id]
                self._carry_out(self._journal.restart(request_id, route, self._world.now))

    def _route(self, request: Request, avoid: tuple[str, ...] = ()) -> Route | None:
        nodes = self._world.nodes
        ready = [
            name
            for name in self._loads
            if name in nodes and nodes[name].instance.state is InstanceState.READY
        ]
        ready = ready or [name for name in self._loads if name in nodes]
        ready = [name for name in ready if name not in avoid] or ready
        return self._world.choose_route(request, ready) if ready else None
