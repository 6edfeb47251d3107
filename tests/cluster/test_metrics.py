"""The metrics that operators script against."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.watching.metrics import ITL_BUCKETS, SPECS, Metrics
from cluster.watching.observer import Rerouted
from cluster.watching.slo_window import SloWindow
from engine.messages import InstanceState, Role
from tests.cluster.watching import ended, load, migrated, opened, timeline

NAMES = {
    "tandem_time_to_first_token_seconds": (),
    "tandem_ttft_part_seconds": ("part",),
    "tandem_inter_token_latency_seconds": (),
    "tandem_request_e2e_seconds": (),
    "tandem_requests_total": ("outcome",),
    "tandem_tokens_total": ("kind",),
    "tandem_kv_transfer_seconds": ("kind",),
    "tandem_kv_transfer_bytes_total": ("kind",),
    "tandem_kv_transfer_failures_total": ("kind", "reason"),
    "tandem_migrations_total": ("reason", "outcome"),
    "tandem_migration_pause_seconds": (),
    "tandem_kv_blocks": ("instance", "state"),
    "tandem_queue_requests": ("instance",),
    "tandem_running_sequences": ("instance",),
    "tandem_instances": ("role", "state"),
    "tandem_slo_attainment_ratio": (),
    "tandem_failovers_total": ("outcome",),
}


def watched() -> Metrics:
    slo = SloWindow()
    metrics = Metrics(slo, lambda: 102.0)
    for event in (ended(), ended("s", "abort"), ended("t", "error", timeline=timeline(101.0))):
        metrics.ended(event)
        slo.ended(event)
    metrics.opened(opened())
    metrics.streamed([0.0015, 0.03, 0.03])
    metrics.migrated(migrated(), 100.0)
    metrics.migrated(migrated(outcome="LeaseExpired"), 100.0)
    metrics.handoff_failed("r", "PeerLost", 100.0)
    metrics.loaded(load(free_blocks=50, cached_blocks=20, pinned_blocks=5, queue_requests=3), 100.0)
    metrics.loaded(load("prefill-0", Role.PREFILL, InstanceState.DRAINING), 100.0)
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.page()[0].decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_names_and_labels_are_those_of_the_contract() -> None:
    assert {spec.name: spec.labels for spec in SPECS} == NAMES


def test_every_metric_is_shown_even_before_anything_happened() -> None:
    page = Metrics(SloWindow(), lambda: 0.0).page()[0].decode()
    assert {name for name in NAMES if f"# TYPE {name} " in page} == set(NAMES)
    assert "tandem_slo_attainment_ratio NaN" in page


def test_inter_token_buckets_begin_at_a_millisecond() -> None:
    assert ITL_BUCKETS[:3] == (0.001, 0.002, 0.005)


def test_a_request_is_counted_in_all_its_parts() -> None:
    found = samples(watched())
    assert found["tandem_requests_total", "length"] == 1
    assert found["tandem_tokens_total", "output"] == 33
    assert found["tandem_time_to_first_token_seconds_sum",] == pytest.approx(0.9)
    assert found["tandem_ttft_part_seconds_sum", "prefill"] == pytest.approx(0.6)
    assert found["tandem_ttft_part_seconds_count", "decode_queue"] == 3
    assert found["tandem_slo_attainment_ratio",] == 0.5, "an abort is nobody's miss"


def test_gaps_fall_into_their_buckets() -> None:
    found = samples(watched())
    assert found["tandem_inter_token_latency_seconds_bucket", "0.001"] == 0
    assert found["tandem_inter_token_latency_seconds_bucket", "0.002"] == 1
    assert found["tandem_inter_token_latency_seconds_bucket", "+Inf"] == 3


def test_transfers_and_migrations() -> None:
    found = samples(watched())
    assert found["tandem_kv_transfer_bytes_total", "handoff"] == 3 * 4096
    assert found["tandem_kv_transfer_seconds_count", "migration"] == 1
    assert found["tandem_migrations_total", "committed", "balance"] == 1
    assert found["tandem_kv_transfer_failures_total", "migration", "LeaseExpired"] == 1
    assert found["tandem_kv_transfer_failures_total", "handoff", "PeerLost"] == 1
    assert found["tandem_migration_pause_seconds_sum",] == pytest.approx(0.004)


def test_blocks_are_in_exactly_one_state() -> None:
    found = samples(watched())
    states = ("free", "cached", "pinned", "used")
    counts = [found["tandem_kv_blocks", "decode-0", state] for state in states]
    assert counts == [30, 20, 5, 45]
    assert found["tandem_queue_requests", "decode-0"] == 3
    assert found["tandem_instances", "prefill", "draining"] == 1
    assert found["tandem_instances", "prefill", "ready"] == 0


def test_a_lost_instance_is_no_longer_shown() -> None:
    metrics = watched()
    metrics.lost("decode-0", 101.0)
    metrics.lost("prefill-0", 101.0)
    assert not [key for key in samples(metrics) if key[0] == "tandem_kv_blocks"]


def test_a_request_replayed_in_vain_is_a_failed_failover() -> None:
    metrics = Metrics(SloWindow(), lambda: 0.0)
    for name in ("a", "b"):
        metrics.rerouted(Rerouted(name, 1.0, "prefill-0", None, "replayed", "lost"))
    metrics.ended(ended("a", "error"))
    metrics.ended(ended("b", "stop"))
    found = samples(metrics)
    assert found["tandem_failovers_total", "replayed"] == 2
    assert found["tandem_failovers_total", "failed"] == 1


def test_buckets_never_fall() -> None:
    page = watched().page()[0].decode()
    counts = [float(n) for n in re.findall(r'seconds_bucket\{le="[^"]+"\} (\S+)', page)]
    assert counts
    for spec in SPECS:
        series = [float(n) for n in re.findall(rf'{spec.name}_bucket{{le="[^"]+"}} (\S+)', page)]
        assert series == sorted(series)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say() -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=watched().page()[0],
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr, checked.stdout) == (0, b"", b"")
