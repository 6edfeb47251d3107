"""Workloads from files, with every bad cell named, and from distributions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from engine.errors import BadConfig
from placement.workload import DAY_S, Arrivals, Workload, day_of, fit_lengths, synthetic
from placement.workload_files import read_workload
from placement.workload_redrawn import Lengths, Redraw, redrawn

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "arrival_s,prompt_tokens,output_tokens"


def written(tmp_path: Path, *lines: str, name: str = "w.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def generator() -> np.random.Generator:
    return np.random.default_rng(7)


def test_our_csv_with_optional_columns(tmp_path: Path) -> None:
    lines = (HEADER + ",prefix_id,prefix_tokens,slo_ttft_s", "0,10,5,a,4,", "1.5,20,6,,,2.5")
    workload = read_workload(written(tmp_path, *lines))
    assert workload.arrival_s.tolist() == [0.0, 1.5]
    assert workload.prefix_id is not None
    assert workload.prefix_tokens is not None
    assert workload.prefix_id.tolist() == [0, -1]
    assert workload.prefix_tokens.tolist() == [4, 0]
    assert workload.slo_ttft_s is not None
    assert np.isnan(workload.slo_ttft_s[0])
    assert workload.priority is None


@pytest.mark.parametrize(
    ("lines", "field", "rule"),
    [
        (("arrival_s,prompt_tokens", "0,1"), "workload columns", "lacks output_tokens"),
        ((HEADER,), "workload", "holds no requests"),
        ((HEADER, "0,1,1", "-1,1,1"), "workload row 3, arrival_s", "negative"),
        ((HEADER, "2,1,1", "1,1,1"), "workload row 3, arrival_s", "before the row above"),
        ((HEADER, "0,0,1"), "workload row 2, prompt_tokens", "from 1"),
        ((HEADER, "0,1.5,1"), "workload row 2, prompt_tokens", "whole"),
        ((HEADER, "0,many,1"), "workload row 2, prompt_tokens", "number"),
        ((HEADER, "nan,1,1"), "workload row 2, arrival_s", "finite"),
        ((HEADER, "0,1,"), "workload row 2, output_tokens", "number"),
        ((HEADER + ",prioritty", "0,1,1,1"), "workload column", "did you mean 'priority'"),
        ((HEADER + ",prefix_id", "0,1,1,a"), "workload columns", "go together"),
        ((HEADER + ",prefix_id,prefix_tokens", "0,1,1,a,2"), "workload row 2, prefix", "exceed"),
        ((HEADER + ",prefix_id,prefix_tokens", "0,9,1,a,-2"), "workload row 2, prefix", "from 0"),
    ],
)
def test_a_bad_file_is_refused_by_row_and_column(
    tmp_path: Path, lines: tuple[str, ...], field: str, rule: str
) -> None:
    with pytest.raises(BadConfig, match=rule) as refusal:
        read_workload(written(tmp_path, *lines))
    assert refusal.value.field.startswith(field)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no such file"):
        read_workload(tmp_path / "none.csv")


def test_azure_timestamps_keep_their_fractions(tmp_path: Path) -> None:
    lines = (
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.0319600,3180,8",
    )
    workload = read_workload(written(tmp_path, *lines))
    np.testing.assert_allclose(workload.arrival_s, [0.0, 0.052], atol=1e-6)


def test_mooncake_blocks_become_shared_prefixes(tmp_path: Path) -> None:
    lines = [
        '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}',
        '{"timestamp": 500, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 3]}',
        '{"timestamp": 900, "input_length": 300, "output_length": 5, "hash_ids": [9]}',
    ]
    workload = read_workload(written(tmp_path, *lines, name="t.jsonl"))
    assert workload.prefix_id is not None
    assert workload.prefix_tokens is not None
    assert workload.prefix_id.tolist() == [1, 1, -1]
    assert workload.prefix_tokens.tolist() == [1024, 1024, 0]
    assert workload.arrival_s.tolist() == [0.0, 0.5, 0.9]


def mooncake(
    timestamp: object = 0, prompt: object = 1000, output: object = 5, **more: object
) -> str:
    line = {"timestamp": timestamp, "input_length": prompt, "output_length": output, **more}
    return json.dumps(line)


def test_mooncake_prefixes_that_continue_others_share_what_those_hold(tmp_path: Path) -> None:
    chains = ([7, 8, 9], [7, 8, 9, 11], [7, 8, 9, 11, 12], [7, 5], [40])
    lines = [mooncake(prompt=512 * len(one) + 100, hash_ids=one) for one in chains]
    workload = read_workload(written(tmp_path, *lines, name="t.jsonl"))
    parts = [workload.prefix_parts(row) for row in range(len(chains))]
    assert [len(one) for one in parts] == [3, 4, 4, 1, 0]
    assert parts[1] == parts[2] == [*parts[0], (3, 512)]
    assert parts[3] == parts[0][:1]
    again = workload.select(np.array([3, 1]))
    assert [again.prefix_parts(row) for row in (0, 1)] == [parts[3], parts[1]]


def test_a_shared_block_ends_with_its_prompt(tmp_path: Path) -> None:
    lines = [mooncake(prompt=600, hash_ids=[1, 2])] * 2
    workload = read_workload(written(tmp_path, *lines, name="t.jsonl"))
    assert workload.prefix_parts(1) == [(0, 512), (1, 88)]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "workload line 3"),
        ("[1]", "workload line 3"),
        ("5", "workload line 3"),
        ('{"timestamp": 5}', "workload line 3, input_length"),
        (mooncake(True), "workload line 3, timestamp"),
        (mooncake(float("nan")), "workload line 3, timestamp"),
        (mooncake(-1), "workload line 3, timestamp"),
        (mooncake(3), "workload line 3, timestamp"),
        (mooncake(10**400), "workload line 3, timestamp"),
        (mooncake(9, "5"), "workload line 3, input_length"),
        (mooncake(9, 0), "workload line 3, input_length"),
        (mooncake(9, 5.5), "workload line 3, input_length"),
        (mooncake(9, output=-5), "workload line 3, output_length"),
        (mooncake(9, hash_ids=5), "workload line 3, hash_ids"),
        (mooncake(9, hash_ids=None), "workload line 3, hash_ids"),
        (mooncake(9, hash_ids=["x"]), "workload line 3, hash_ids"),
        (mooncake(9, hash_ids=[-1]), "workload line 3, hash_ids"),
        (mooncake(9, hash_ids=[1 << 64]), "workload line 3, hash_ids"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: str, field: str) -> None:
    with pytest.raises(BadConfig) as refusal:
        read_workload(written(tmp_path, mooncake(4), "", line, name="t.jsonl"))
    assert refusal.value.field == field


def test_another_rate_keeps_requests_and_their_order() -> None:
    arrivals = Arrivals(generator()).times(200, 2.0)
    ones = np.ones(200, dtype=np.int64)
    faster = Workload(arrivals, ones, ones).at_rate(8.0)
    assert faster.rate_rps == pytest.approx(8.0)
    ratios = np.diff(arrivals) / np.diff(faster.arrival_s)
    np.testing.assert_allclose(ratios, ratios[0])


def test_requests_that_arrive_at_once_have_no_rate_to_be_stretched() -> None:
    at_once = Workload(np.zeros(3), np.arange(1, 4), np.arange(1, 4))
    with pytest.raises(BadConfig, match="all arrive at once"):
        at_once.at_rate(5.0)
    assert at_once.first(1).at_rate(5.0).arrival_s.tolist() == [0.0]


@pytest.mark.parametrize("rate_rps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_positive_and_finite(rate_rps: float) -> None:
    with pytest.raises(BadConfig, match="positive"):
        Workload(np.arange(3.0), np.arange(1, 4), np.arange(1, 4)).at_rate(rate_rps)


def test_a_rate_so_low_that_no_time_can_be_told_is_refused() -> None:
    with pytest.raises(BadConfig, match="too low"):
        Workload(np.arange(3.0), np.arange(1, 4), np.arange(1, 4)).at_rate(1e-310)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 2.0])
def test_gamma_gaps_have_the_rate_and_burstiness(burstiness: float) -> None:
    gaps = np.diff(Arrivals(generator(), burstiness).times(20_000, 5.0))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.05)


def test_without_burstiness_arrivals_are_even() -> None:
    np.testing.assert_allclose(np.diff(Arrivals(generator(), 0.0).times(10, 4.0)), 0.25)


def test_a_day_has_its_peak_where_it_was_put() -> None:
    times = Arrivals(generator()).seasonal(DAY_S, day_of(0.2, swing=0.8, peak_hour=14.0))
    assert len(times) == pytest.approx(0.2 * DAY_S, rel=0.05)
    by_hour = np.bincount((times // 3600).astype(int), minlength=24)
    assert abs(int(by_hour.argmax()) - 14) <= 2
    assert by_hour[2] < by_hour[14] / 3


def test_fitted_lengths_resemble_what_they_were_fitted_to() -> None:
    g = generator()
    prompt = np.rint(g.lognormal(6, 0.8, 5000)).astype(np.int64) + 1
    output = np.rint(g.lognormal(5, 0.5, 5000)).astype(np.int64) + 1
    model = fit_lengths(Workload(np.arange(5000.0), prompt, output))
    drawn = synthetic(model, np.arange(5000.0), g)
    assert np.median(drawn.prompt_tokens) == pytest.approx(np.median(prompt), rel=0.1)
    assert np.median(drawn.output_tokens) == pytest.approx(np.median(output), rel=0.1)
    assert drawn.prompt_tokens.max() <= prompt.max()


def test_resampling_is_decided_by_the_generator() -> None:
    ones = np.arange(1, 51)
    workload = Workload(np.arange(50.0), ones, ones)
    draws = [workload.resampled(30, 2.0, Arrivals(generator())) for _ in range(2)]
    assert draws[0].prompt_tokens.tolist() == draws[1].prompt_tokens.tolist()
    assert draws[0].arrival_s.tolist() == draws[1].arrival_s.tolist()
    assert (draws[0].prompt_tokens == draws[0].output_tokens).all()


def seen(count: int = 400) -> Workload:
    """Pairs of lengths that hardly vary together, arriving evenly, twice a second."""
    g = generator()
    prompts, outputs = g.integers(100, 200, count), g.integers(10, 20, count)
    ids = np.zeros(count, dtype=np.int64)
    return Workload(np.arange(count) / 2, prompts, outputs, prefix_id=ids, prefix_tokens=ids + 50)


def test_a_workload_that_nothing_is_drawn_of_is_as_it_was() -> None:
    again = redrawn(seen(), Redraw(requests=30), 4.0)
    assert again.prompt_tokens.tolist() == seen().prompt_tokens[:30].tolist()
    assert again.rate_rps == pytest.approx(4.0)


def test_fitted_lengths_keep_arrivals_and_share_no_prefixes() -> None:
    fitted = redrawn(seen(), Redraw(Lengths.FITTED, seed=3))
    np.testing.assert_array_equal(fitted.arrival_s, seen().arrival_s)
    assert fitted.prefix_id is fitted.prefix_tokens is None
    assert (fitted.prompt_tokens != seen().prompt_tokens).any()
    assert (fitted.prompt_tokens >= 100).all()
    assert (fitted.output_tokens < 20).all()
    again = redrawn(seen(), Redraw(Lengths.FITTED, seed=3))
    np.testing.assert_array_equal(fitted.prompt_tokens, again.prompt_tokens)


def test_drawn_arrivals_have_the_rate_and_requests_of_what_was_seen() -> None:
    bursty = redrawn(seen(), Redraw(burstiness=3.0, requests=900), 5.0)
    assert (len(bursty), bursty.rate_rps) == (900, pytest.approx(5.0))
    gaps = np.diff(bursty.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.2)
    assert set(bursty.prompt_tokens.tolist()) <= set(seen().prompt_tokens.tolist())
    assert bursty.prefix_tokens is not None
    assert (bursty.prefix_tokens == 50).all()


def test_a_drawn_day_swings_around_the_rate() -> None:
    day = redrawn(seen(), Redraw(day_swing=0.8, peak_hour=6.0), 0.05)
    assert len(day) == pytest.approx(0.05 * DAY_S, rel=0.1)
    by_quarter = np.bincount((day.arrival_s // (DAY_S / 4)).astype(int), minlength=4)
    assert by_quarter[:2].sum() > 2 * by_quarter[2:].sum()


@pytest.mark.parametrize("redraw", [Redraw(burstiness=1.0), Redraw(day_swing=0.5)])
def test_arrivals_are_drawn_at_some_rate(redraw: Redraw) -> None:
    at_once = replace(seen(), arrival_s=np.zeros(400))
    with pytest.raises(BadConfig, match="to draw arrivals"):
        redrawn(at_once, redraw)


def test_burstgpt_without_the_requests_that_failed(tmp_path: Path) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    rows = ("5,ChatGPT,472,18,490,Conversation log", "45,ChatGPT,1087,0,1087,API log")
    workload = read_workload(written(tmp_path, header, *rows, "118,GPT-4,417,276,693,API log"))
    assert workload.arrival_s.tolist() == [5.0, 118.0]
    assert workload.prompt_tokens.tolist() == [472, 417]
    assert workload.output_tokens.tolist() == [18, 276]
