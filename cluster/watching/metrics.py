"""Prometheus metrics of the cluster, from what a gateway observes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from cluster.watching.others import OtherGateways, new_life
from cluster.watching.tally import Spec, Tallies, gauge
from engine.messages import InstanceState, Role, TransferKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prometheus_client.core import Metric

    from cluster.watching.observer import Ended, Opened, Rerouted
    from cluster.watching.slo_window import SloWindow
    from cluster.watching.tally import Labels
    from engine.messages import Load, Migrated

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TRANSFER_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip

TTFT = Spec(
    "tandem_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    buckets=TTFT_BUCKETS,
)
TTFT_PART = Spec(
    "tandem_ttft_part_seconds",
    "Where the time to a flowing stream went: queue, prefill, transfer, decode_queue, first_step.",
    ("part",),
    TTFT_BUCKETS,
)
ITL = Spec(
    "tandem_inter_token_latency_seconds",
    "From one token of a stream to the next.",
    buckets=ITL_BUCKETS,
)
E2E = Spec(
    "tandem_request_e2e_seconds", "From a request's arrival to its end.", buckets=E2E_BUCKETS
)
REQUESTS = Spec("tandem_requests_total", "Requests that ended.", ("outcome",))
TOKENS = Spec("tandem_tokens_total", "Tokens of requests that ended.", ("kind",))
TRANSFER = Spec(
    "tandem_kv_transfer_seconds",
    "Duration of committed KV transfers; a hand-off's counts from the first token.",
    ("kind",),
    TRANSFER_BUCKETS,
)
TRANSFER_BYTES = Spec("tandem_kv_transfer_bytes_total", "KV moved by them.", ("kind",))
TRANSFER_FAILURES = Spec(
    "tandem_kv_transfer_failures_total", "KV transfers that did not commit.", ("kind", "reason")
)
MIGRATIONS = Spec("tandem_migrations_total", "Migrations that ended.", ("reason", "outcome"))
PAUSE = Spec(
    "tandem_migration_pause_seconds",
    "How long committed migrations held their streams up.",
    buckets=TRANSFER_BUCKETS,
)
KV_BLOCKS = Spec(
    "tandem_kv_blocks",
    "KV blocks by state: free, cached (free, but holding a prefix), pinned for a transfer, used.",
    ("instance", "state"),
)
QUEUE = Spec("tandem_queue_requests", "Requests that wait on an instance.", ("instance",))
RUNNING = Spec("tandem_running_sequences", "Sequences in an instance's batch.", ("instance",))
INSTANCES = Spec("tandem_instances", "Instances by role and state.", ("role", "state"))
ATTAINMENT = Spec(
    "tandem_slo_attainment_ratio",
    "Share of the requests ended lately that met both targets; NaN when there were none.",
)
FAILOVERS = Spec("tandem_failovers_total", "Requests that lost their instance.", ("outcome",))

OBSERVED = (
    TTFT, TTFT_PART, ITL, E2E, REQUESTS, TOKENS, TRANSFER, TRANSFER_BYTES, TRANSFER_FAILURES,
    MIGRATIONS, PAUSE, FAILOVERS,
)  # fmt: skip
"""Counted by each gateway for its own requests; the others are read off the instances."""
SPECS = (*OBSERVED, KV_BLOCKS, QUEUE, RUNNING, INSTANCES, ATTAINMENT)

COMMITTED = "committed"
REFUSED = "refused"
FAILED = "failed"


class Metrics(Collector):
    """An observer, and what `/metrics` shows of it and of the other gateways; instances are known
    by their heartbeats, which every gateway hears."""

    def __init__(self, slo: SloWindow, now: Callable[[], float]) -> None:
        self._slo, self._now = slo, now
        self._life = new_life()
        self.others = OtherGateways()
        self._loads: dict[str, Load] = {}
        self._rerouted: set[str] = set()
        self._tallies = Tallies(OBSERVED)
        histograms, counters = self._tallies.histograms, self._tallies.counters
        self._ttft, self._itl = histograms[TTFT.name], histograms[ITL.name]
        self._e2e, self._parts = histograms[E2E.name], histograms[TTFT_PART.name]
        self._transfer, self._pause = histograms[TRANSFER.name], histograms[PAUSE.name]
        self._requests, self._tokens = counters[REQUESTS.name], counters[TOKENS.name]
        self._bytes = counters[TRANSFER_BYTES.name]
        self._failures = counters[TRANSFER_FAILURES.name]
        self._migrations, self._failovers = counters[MIGRATIONS.name], counters[FAILOVERS.name]
        self._gaps = self._itl.of()
        self._start_at_zero()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def _start_at_zero(self) -> None:
        """Series whose labels are known from the start, so that their first step is a rate."""
        for alone in (self._ttft, self._e2e, self._pause):
            alone.of()
        for outcome in ("stop", "length", "abort", "error", REFUSED):
            self._requests.add(outcome, amount=0)
        for kind in ("prompt", "output"):
            self._tokens.add(kind, amount=0)
        for transfer in TransferKind:
            self._bytes.add(transfer.value, amount=0)
        for outcome in ("replayed", "resumed", FAILED):
            self._failovers.add(outcome, amount=0)

    def page(self) -> tuple[bytes, str]:
        """The body of `/metrics` and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # What is observed.

    def opened(self, event: Opened) -> None: ...

    def streamed(self, gaps_s: Sequence[float]) -> None:
        self._gaps.observe_all(gaps_s)

    def rerouted(self, event: Rerouted) -> None:
        self._failovers.add(event.outcome)
        self._rerouted.add(event.request_id)

    def ended(self, event: Ended) -> None:
        self._requests.add(event.outcome)
        if event.request_id in self._rerouted:
            self._rerouted.remove(event.request_id)
            if event.outcome == "error":
                self._failovers.add(FAILED)
        if event.outcome == REFUSED:
            return
        self._tokens.add("prompt", amount=event.prompt_tokens)
        self._tokens.add("output", amount=event.output_tokens)
        self._time(event)

    def _time(self, event: Ended) -> None:
        timeline = event.timeline
        if timeline.ttft_s is not None:
            self._ttft.of().observe(timeline.ttft_s)
        if timeline.finished_s is not None:
            self._e2e.of().observe(timeline.finished_s - timeline.arrived_s)
        parts_s = timeline.parts_s()
        for part, took_s in parts_s.items():
            if took_s is not None:
                self._parts.of(part).observe(took_s)
        transfer_s = parts_s["transfer"]
        if transfer_s is not None:
            self._moved(TransferKind.HANDOFF, transfer_s, event.kv_bytes)

    def _moved(self, kind: TransferKind, took_s: float, kv_bytes: int) -> None:
        self._transfer.of(kind.value).observe(took_s)
        self._bytes.add(kind.value, amount=kv_bytes)

    def migrated(self, event: Migrated, at_s: float) -> None:  # noqa: ARG002 - an Observer's
        self._migrations.add(event.reason, event.outcome)
        if event.outcome != COMMITTED:
            self._failures.add(TransferKind.MIGRATION.value, event.outcome)
            return
        self._pause.of().observe(event.pause_s)
        self._moved(TransferKind.MIGRATION, event.total_s, event.kv_bytes)

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None:  # noqa: ARG002
        self._failures.add(TransferKind.HANDOFF.value, reason)

    def loaded(self, load: Load, at_s: float) -> None:  # noqa: ARG002
        self._loads[load.instance] = load

    def lost(self, instance: str, at_s: float) -> None:  # noqa: ARG002
        self._loads.pop(instance, None)

    # What a scrape reads.

    def collect(self) -> Iterable[Metric]:
        loads = [self._loads[name] for name in sorted(self._loads)]
        yield from self._tallies.plus(self.others.tallies).families()
        yield gauge(KV_BLOCKS, (cell for load in loads for cell in _blocks(load)))
        yield gauge(QUEUE, (((load.instance,), load.queue_requests) for load in loads))
        yield gauge(RUNNING, (((load.instance,), load.running_sequences) for load in loads))
        yield gauge(INSTANCES, _instances(loads))
        attainment = self.attainment()
        yield gauge(ATTAINMENT, [((), math.nan if attainment is None else attainment)])

    def attainment(self) -> float | None:
        """Over all gateways; None when nothing has ended lately."""
        met, ended = self._slo.attained(self._now())
        others_met, others_ended = self.others.attained
        ended += others_ended
        return (met + others_met) / ended if ended else None

    def known_lives(self) -> list[str]:
        """Of gateways, this one's too: what to tell another that is asked for its counts."""
        return [self._life, *self.others.lives]

    def document(self, known_lives: Iterable[str]) -> dict[str, Any]:
        """What this gateway has counted, and what it remembers that the one who asks does not."""
        return {
            "life": self._life,
            "tallies": self._tallies.snapshot(),
            "attained": self._slo.attained(self._now()),
            "remembered": self.others.unknown_to(known_lives),
        }


def _blocks(load: Load) -> list[tuple[Labels, float]]:
    """Every block in exactly one state."""
    cached = min(load.cached_blocks, load.free_blocks)
    states = {
        "free": load.free_blocks - cached,
        "cached": cached,
        "pinned": load.pinned_blocks,
        "used": max(load.total_blocks - load.free_blocks - load.pinned_blocks, 0),
    }
    return [((load.instance, state), float(count)) for state, count in states.items()]


def _instances(loads: Sequence[Load]) -> list[tuple[Labels, float]]:
    """Combinations without an instance are 0, so that an alert can tell none from unknown."""
    counts = {(role.value, state.value): 0.0 for role in Role for state in InstanceState}
    for load in loads:
        counts[load.role.value, load.state.value] += 1
    return list(counts.items())
