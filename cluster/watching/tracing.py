"""OpenTelemetry traces, one per request: an optional extra that costs nothing when off.

Spans are made when a request ends, from the moments of its timeline, so that tracing adds
nothing to the path of a token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

    from cluster.watching.observer import Ended, Opened, Rerouted
    from engine.events import Timeline
    from engine.messages import Load, Migrated

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
INSTALL = "pip install 'tandem-serve[tracing]'"
OPEN_REQUESTS = 100_000


@dataclass(slots=True)
class _Trail:
    """What is known of a request under way that its timeline will not tell."""

    opened: Opened
    migrations: list[tuple[Migrated, float]] = field(default_factory=list)
    failovers: list[Rerouted] = field(default_factory=list)
    failed_handoffs: list[tuple[str, float]] = field(default_factory=list)


class Tracing:
    """An observer that makes spans."""

    def __init__(self, tracer: Tracer, close: Callable[[], object] = lambda: None) -> None:
        self._tracer, self._close = tracer, close
        self._trails: dict[str, _Trail] = {}

    def close(self) -> None:
        """Sends what has not been sent."""
        self._close()

    def opened(self, event: Opened) -> None:
        if len(self._trails) < OPEN_REQUESTS:
            self._trails[event.request_id] = _Trail(event)

    def streamed(self, gaps_s: Sequence[float]) -> None: ...

    def rerouted(self, event: Rerouted) -> None:
        trail = self._trails.get(event.request_id)
        if trail is not None:
            trail.failovers.append(event)

    def migrated(self, event: Migrated, at_s: float) -> None:
        trail = self._trails.get(event.request_id)
        if trail is not None:
            trail.migrations.append((event, at_s))

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None:
        trail = self._trails.get(request_id)
        if trail is not None:
            trail.failed_handoffs.append((reason, at_s))

    def loaded(self, load: Load, at_s: float) -> None: ...

    def lost(self, instance: str, at_s: float) -> None: ...

    def ended(self, event: Ended) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        trail = self._trails.pop(event.request_id, None)
        timeline = event.timeline
        span = self._tracer.start_span(
            "request",
            context=_context(None if trail is None else trail.opened.trace),
            kind=SpanKind.SERVER,
            start_time=_ns(timeline.arrived_s),
            attributes=_attributes(event, trail),
        )
        if not span.is_recording():
            return
        if event.error is not None:
            span.set_status(Status(StatusCode.ERROR, event.error))
        inside = set_span_in_context(span)
        for name, start_s, end_s in phases(timeline):
            self._child(name, start_s, end_s, inside, {})
        if trail is not None:
            self._moves(trail, inside, span)
        span.end(_ns(timeline.finished_s or timeline.arrived_s))

    def _moves(self, trail: _Trail, inside: Context, span: Span) -> None:
        """Migrations take time; failovers and failed hand-offs are moments."""
        for move, at_s in trail.migrations:
            about = {
                "tandem.source": move.source,
                "tandem.target": move.target,
                "tandem.reason": move.reason,
                "tandem.outcome": move.outcome,
                "tandem.pause_s": move.pause_s,
                "tandem.kv_bytes": move.kv_bytes,
            }
            self._child("migration", at_s - move.total_s, at_s, inside, about)
        for event in trail.failovers:
            what = {"tandem.outcome": event.outcome, "tandem.why": event.why}
            span.add_event("failover", what, _ns(event.at_s))
        for reason, at_s in trail.failed_handoffs:
            span.add_event("handoff failed", {"tandem.reason": reason}, _ns(at_s))

    def _child(
        self, name: str, start_s: float, end_s: float, inside: Context, about: dict[str, Any]
    ) -> None:
        child = self._tracer.start_span(name, inside, start_time=_ns(start_s), attributes=about)
        child.end(_ns(end_s))


Phase = tuple[str, float, float]
"""Its name, start and end."""


def phases(timeline: Timeline) -> list[Phase]:
    """Each phase that took place."""
    transferred_s = timeline.transferred_s or timeline.first_token_s
    moments = (
        ("queue", timeline.arrived_s, timeline.prefill_started_s),
        ("prefill", timeline.prefill_started_s, timeline.first_token_s),
        ("transfer", timeline.first_token_s, timeline.transferred_s),
        ("decode_queue", transferred_s, timeline.decode_started_s),
        ("first_step", timeline.decode_started_s, timeline.second_token_s),
        ("decode", timeline.second_token_s, timeline.finished_s),
    )
    return [
        (name, start_s, max(start_s, end_s))
        for name, start_s, end_s in moments
        if start_s is not None and end_s is not None
    ]


def phases_so_far(timeline: Timeline, now: float) -> list[Phase]:
    """Of a request under way: instances tell their moments with its first two tokens."""
    if timeline.first_token_s is None:
        return [("to_first_token", timeline.arrived_s, now)]
    if timeline.second_token_s is None:
        return [*phases(timeline), ("to_second_token", timeline.first_token_s, now)]
    return [*phases(timeline), ("decode", timeline.second_token_s, now)]


def _attributes(event: Ended, trail: _Trail | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "tandem.request": event.request_id,
        "tandem.outcome": event.outcome,
        "gen_ai.usage.input_tokens": event.prompt_tokens,
        "gen_ai.usage.output_tokens": event.output_tokens,
        "tandem.kv_bytes": event.kv_bytes,
    }
    if trail is not None:
        about["tandem.prefill"] = trail.opened.prefill
        about["tandem.decode"] = trail.opened.decode or trail.opened.prefill
    return about


def _context(traceparent: str | None) -> Context | None:
    """The caller's trace; one that is malformed starts a new one, as W3C wants."""
    if traceparent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _ns(moment_s: float) -> int:
    return int(moment_s * 1e9)


def open_tracing(environment: Mapping[str, str] | None = None) -> Tracing | None:
    """Tracing as OpenTelemetry's own variables ask for it; None where they do not."""
    asked = os.environ if environment is None else environment
    variable = next((name for name in VARIABLES if asked.get(name)), None)
    if variable is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise Unsupported(f"{variable} asks for traces, which need: {INSTALL}") from error
    resource = Resource.create({"service.name": asked.get("OTEL_SERVICE_NAME", "tandem")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer("tandem"), provider.shutdown)
