"""What a gateway tells its observers about a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.watching.observer import Ended, Opened

if TYPE_CHECKING:
    from cluster.gateway.answer import Choice
    from engine.errors import TandemError
    from placement.routing.router import Route


def opened(choice: Choice, route: Route, trace: str | None, now: float) -> Opened:
    request = choice.request
    return Opened(
        request.id,
        now,
        len(request.prompt),
        request.slo,
        route.prefill,
        route.decode,
        choice.timeline,
        trace,
    )


def ended(choice: Choice, outcome: str, error: TandemError | None) -> Ended:
    request = choice.request
    return Ended(
        request.id,
        outcome,
        choice.timeline,
        len(request.prompt),
        choice.output_tokens,
        request.slo,
        choice.kv_bytes,
        None if error is None else type(error).__name__,
        choice.cached_tokens,
    )
