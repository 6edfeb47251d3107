"""All that watches a gateway, put together: metrics, traces, the live page, attainment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.watching.dashboard import Dashboard
from cluster.watching.live import Live
from cluster.watching.metrics import Metrics
from cluster.watching.slo_window import SloWindow
from cluster.watching.tracing import open_tracing
from cluster.watching.whole import WholeCluster

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from cluster.config import Config
    from cluster.doors.keys import Keyring
    from cluster.gateway.gateway import Gateway
    from cluster.watching.observer import Observer
    from engine.clock import Clock


class Watching:
    """Unsupported where traces are asked for and cannot be had."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._clock = clock
        self.slo = SloWindow()
        self.metrics = Metrics(self.slo, clock.now)
        self._live = Live()
        self._about = {
            "model": config.served_name,
            "slo": config.slo.model_dump(),
            "predicted": config.predicted,
        }
        self._tracing = open_tracing()

    def observers(self) -> list[Observer]:
        watchers: list[Observer] = [self.slo, self.metrics, self._live]
        return watchers if self._tracing is None else [*watchers, self._tracing]

    def whole(self, gateway: Gateway) -> WholeCluster:
        """What all gateways see together, as this one shows it."""
        return WholeCluster(self._live, gateway, self._about)

    def routes(self, whole: WholeCluster, keys: Keyring | None) -> list[BaseRoute]:
        """The live page's. It shows every tenant's requests, and so wants an operator's key."""

        def admit(request: Request) -> None:
            if keys is None:
                return
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else None
            keys.caller(given, self._clock.now()).must_operate()

        return Dashboard(whole, admit).routes()

    def close(self) -> None:
        """Sends the last spans."""
        if self._tracing is not None:
            self._tracing.close()
