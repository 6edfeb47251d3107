"""A gateway's admission in virtual time: who is refused at once, and who goes next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import Overloaded
from placement.routing.admission import Admission, Forecast

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.request import Request, Sequence
    from placement.routing.admission import AdmissionSettings
    from placement.routing.router import Router
    from placement.view import View


class World(Protocol):
    def at(self, time_s: float, action: Callable[[Any, float], None], subject: Any) -> None: ...
    def view(self, now: float) -> View: ...
    def send(self, sequence: Sequence, now: float) -> None: ...
    def failed(self, request_id: str) -> None: ...


class Gate:
    def __init__(self, world: World, router: Router, settings: AdmissionSettings) -> None:
        self._world, self._router = world, router
        self._admission = Admission(settings)
        self._held: dict[str, Sequence] = {}
        self.refused = 0

    def arrive(self, sequence: Sequence, now: float, *, strict: bool) -> None:
        """`strict`: the request stated its own TTFT target."""
        request = sequence.request
        try:
            self._admission.submit(request, self._forecast(request, now), strict=strict)
        except Overloaded:
            self.refused += 1
            self._world.failed(request.id)
            return
        self._held[request.id] = sequence
        self._let_in(None, now)

    def prefilled(self, request_id: str, now: float) -> None:
        self._admission.prefilled(request_id)
        self._ask_soon(now)

    def ended(self, request_id: str, now: float) -> None:
        self._admission.ended(request_id)
        self._held.pop(request_id, None)
        self._ask_soon(now)

    def _ask_soon(self, now: float) -> None:
        """Once the instance that told of it has ended its step."""
        if self._held:
            self._world.at(now, self._let_in, None)

    def _let_in(self, _: None, now: float) -> None:
        takers = [one for one in self._world.view(now).instances if one.takes_requests]
        prefilling = sum(one.role.prefills for one in takers) or min(len(takers), 1)
        while (request := self._admission.next(prefilling)) is not None:
            self._world.send(self._held.pop(request.id), now)

    def _forecast(self, request: Request, now: float) -> Forecast | None:
        """None while too little has been seen to predict anything."""
        if not self._router.measured:
            return None
        route = self._router.choose(request, self._world.view(now))
        if route is None:
            return None
        alone_s = self._router.alone_s(route, len(request.prompt))
        queue_s = self._router.queue_s(self._admission.waiting_tokens)
        return Forecast(route.ttft_s + queue_s, alone_s)
