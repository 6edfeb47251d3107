"""Balancing by the TPOT that the latency profile predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.messages import InstanceState, Load, Role, Running
from placement.balancing.balancer import Balancer
from placement.balancing.pace_balancer import PaceBalancer, balancer_for, decode_line
from placement.balancing.settings import BalancerPolicy, BalancerSettings
from placement.latency.catalog import find_device, find_link, find_model
from placement.latency.roofline import Roofline
from placement.view import InstanceView, View

SETTINGS = BalancerSettings(
    policy=BalancerPolicy.TPOT,
    tpot_s=0.05,
    step_s=0.01,
    step_sequence_s=1e-3,
    step_kv_token_s=1e-6,
    low_steps=0.0,
    high_steps=1.0,
)


def seen(*batches: int, context: int = 1000, state: InstanceState = InstanceState.READY) -> View:
    """Instances with ample room whose batches are of these sizes."""
    return View(0.0, tuple(_instance(n, size, context, state) for n, size in enumerate(batches)))


def _instance(number: int, batch: int, context: int, state: InstanceState) -> InstanceView:
    sequences = tuple(
        Running(f"{number}-{i}", 0, "running", 0, context - 10, 10, 10) for i in range(batch)
    )
    load = Load(
        instance=f"decode-{number}", role=Role.DECODE, state=state, queue_requests=0,
        queued_tokens=0, running_sequences=batch, running_tokens=batch * context,
        free_blocks=100_000 - 10 * batch, total_blocks=100_000, block_tokens=16, pinned_blocks=0,
        cached_blocks=0, step_s=0.02, sequences=sequences,
    )  # fmt: skip
    return InstanceView(load)


def test_the_settings_name_the_balancer() -> None:
    assert type(balancer_for()) is Balancer
    assert type(balancer_for(SETTINGS)) is PaceBalancer


def test_an_instance_that_will_miss_the_target_is_relieved_though_it_has_room() -> None:
    # 10 ms + 22 * (1 ms + 1 ms) = 54 ms.
    view = seen(22, 2)
    moves = balancer_for(SETTINGS).decide(view)
    assert moves
    assert {(move.source, move.target) for move in moves} == {("decode-0", "decode-1")}
    assert balancer_for(replace(SETTINGS, policy=BalancerPolicy.FREENESS)).decide(view) == ()


def test_within_the_target_nothing_moves() -> None:
    assert balancer_for(SETTINGS).decide(seen(18, 2)) == ()


def test_nothing_moves_to_where_it_would_be_as_slow() -> None:
    assert balancer_for(SETTINGS).decide(seen(22, 21)) == ()


def test_the_fastest_target_is_chosen() -> None:
    (move, *_) = balancer_for(SETTINGS).decide(seen(22, 8, 3))
    assert move.target == "decode-2"


def test_long_contexts_weigh_more_than_short_ones() -> None:
    assert balancer_for(SETTINGS).decide(seen(12, 2, context=1000)) == ()
    assert balancer_for(SETTINGS).decide(seen(12, 2, context=4000))


def test_what_drains_moves_as_ever() -> None:
    (source, *_), (target, *_) = (
        seen(2, state=InstanceState.DRAINING).instances,
        seen(1, 1).instances[1:],
    )
    moves = balancer_for(SETTINGS).decide(View(0.0, (source, target)), drain_only=True)
    assert [move.reason for move in moves] == ["drain", "drain"]


def test_the_line_of_a_roofline_predicts_its_decode_steps() -> None:
    latency = Roofline(find_model("llama-3.1-8b"), find_device("a10g"), find_link("pcie4"))
    least_s, sequence_s, token_s = decode_line(latency)
    for batch in (8, 32, 64):
        predicted_s = least_s + sequence_s * batch + token_s * batch * 500
        assert predicted_s == pytest.approx(latency.decode_s([500] * batch), rel=0.1)
