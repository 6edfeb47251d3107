"""Spans of a request: its phases, its moves, and the caller's trace."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.watching.observer import Rerouted
from cluster.watching.tracing import Tracing, open_tracing
from engine.errors import Unsupported
from tests.cluster.watching import ended, migrated, opened

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider.get_tracer("test"))

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


def test_a_request_is_a_span_with_a_child_per_phase() -> None:
    traced = Traced()
    traced.tracing.opened(opened())
    traced.tracing.ended(ended())
    spans = traced.spans
    phases = ("queue", "prefill", "transfer", "decode_queue", "first_step", "decode")
    assert set(spans) == {"request", *phases}
    root = spans["request"]
    assert (root.start_time, root.end_time) == (100 * 10**9, 101 * 10**9)
    assert all(spans[name].parent == root.context for name in phases)
    assert root.attributes is not None
    assert root.attributes["tandem.decode"] == "decode-0"
    starts = [spans[name].start_time for name in phases]
    ends = [spans[name].end_time for name in phases]
    assert starts[1:] == ends[:-1], "each phase begins where the one before ends"


def test_the_callers_trace_goes_on() -> None:
    traced = Traced()
    traced.tracing.opened(opened(trace=CALLER))
    traced.tracing.ended(ended())
    root = traced.spans["request"]
    assert root.context is not None
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CALLER.split("-")[2]


def test_a_caller_that_is_not_sampled_is_not_traced() -> None:
    traced = Traced()
    traced.tracing.opened(opened(trace=CALLER[:-1] + "0"))
    traced.tracing.ended(ended())
    assert traced.spans == {}


def test_a_malformed_parent_starts_a_new_trace() -> None:
    traced = Traced()
    traced.tracing.opened(opened(trace="00-not-a-trace"))
    traced.tracing.ended(ended())
    assert traced.spans["request"].parent is None


def test_migrations_are_spans_and_failovers_events() -> None:
    traced = Traced()
    traced.tracing.opened(opened())
    traced.tracing.migrated(migrated(), 100.9)
    traced.tracing.rerouted(Rerouted("r", 100.7, "prefill-1", None, "replayed", "lost"))
    traced.tracing.handoff_failed("r", "PeerLost", 100.6)
    traced.tracing.ended(ended())
    move = traced.spans["migration"]
    assert move.attributes is not None
    assert move.attributes["tandem.target"] == "decode-1"
    assert move.end_time == int(100.9 * 1e9)
    assert [event.name for event in traced.spans["request"].events] == [
        "failover",
        "handoff failed",
    ]


def test_a_refused_request_is_an_error_without_phases() -> None:
    from engine.events import Timeline

    traced = Traced()
    refused = ended(
        "x", "refused", timeline=Timeline(5.0, finished_s=5.0), error="Overloaded", output_tokens=0
    )
    traced.tracing.ended(refused)
    assert set(traced.spans) == {"request"}
    assert not traced.spans["request"].status.is_ok


def test_nothing_is_kept_of_requests_that_ended() -> None:
    traced = Traced()
    traced.tracing.opened(opened())
    traced.tracing.ended(ended())
    traced.tracing.migrated(migrated(), 101.0)
    assert traced.tracing._trails == {}


def test_tracing_is_off_unless_asked_for() -> None:
    assert open_tracing({}) is None


def test_asked_for_but_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(Unsupported, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*tracing"):
        open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317"})
