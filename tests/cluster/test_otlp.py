"""Spans leave by OTLP over gRPC, to a collector that listens here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TYPE_CHECKING

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

from cluster.watching.tracing import open_tracing
from tests.cluster.serving import PATIENCE_S
from tests.cluster.watching import ended, migrated, opened

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PHASES = {"queue", "prefill", "transfer", "decode_queue", "first_step", "decode"}


class Collector(rpc.TraceServiceServicer):
    """Keeps every export it is sent."""

    def __init__(self) -> None:
        self.exports: Queue[pb.ExportTraceServiceRequest] = Queue()

    def Export(self, request, context):  # noqa: N802  gRPC's name
        self.exports.put(request)
        return pb.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    one = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_TraceServiceServicer_to_server(one, server)
    port = server.add_insecure_port("127.0.0.1:0")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tandem-test")
    server.start()
    yield one
    server.stop(None).wait()


def test_a_requests_spans_reach_the_collector_with_their_parents_and_times(collector) -> None:
    tracing = open_tracing()
    assert tracing is not None
    tracing.opened(opened(trace=CALLER))
    tracing.migrated(migrated(), 100.9)
    tracing.ended(ended())
    tracing.close()
    (export,) = collector.exports.get(timeout=PATIENCE_S).resource_spans
    service = {one.key: one.value.string_value for one in export.resource.attributes}
    assert service["service.name"] == "tandem-test"
    spans = {span.name: span for scope in export.scope_spans for span in scope.spans}
    assert set(spans) == {"request", "migration", *PHASES}
    root = spans["request"]
    assert root.trace_id.hex() == CALLER.split("-")[1]
    assert root.parent_span_id.hex() == CALLER.split("-")[2]
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (100 * 10**9, 101 * 10**9)
    assert all(spans[name].parent_span_id == root.span_id for name in PHASES)
    sent = {one.key: one.value.string_value for one in root.attributes}
    assert sent["tandem.decode"] == "decode-0"
    assert not any("prompt" in key for key in sent), "what was asked stays here"
    assert collector.exports.empty()
