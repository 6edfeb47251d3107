"""What the comparison of predictions with measurements counts as off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.profiling.speed import CODE
from scripts.bench import prediction_report
from scripts.bench.prediction_report import MEASURED, Row, compare, preferred, profile_of


def row(predictions: tuple[float, ...], measurements: tuple[float, ...], figure: str) -> Row:
    return Row("split", 4.0, figure, predictions, measurements)


def test_a_round_is_compared_with_its_own_prediction() -> None:
    # The machine was slower from round to round, and each prediction knew.
    slower = row((1.1, 2.2, 4.0), (1.0, 2.0, 4.0), "ttft_s p50")
    assert slower.off == pytest.approx(0.1)
    # Each round is off, though the medians are the same.
    crossed = row((1.0, 2.0, 4.0), (2.0, 1.0, 3.2), "ttft_s p50")
    assert crossed.predicted == 2.0
    assert crossed.measured == 2.0
    assert crossed.off == pytest.approx(0.25)


def test_attainment_is_off_in_points() -> None:
    assert row((0.9, 0.8), (0.8, 0.8), "attainment").off == pytest.approx(0.05)


def test_rounds_apart_and_the_first_as_a_prediction_of_the_others() -> None:
    rounds = row((1.0, 1.0, 1.0), (1.0, 2.0, 4.0), "tpot_s p90")
    assert rounds.apart == pytest.approx(1.5)
    assert rounds.first_round_predicts.off == pytest.approx((-0.5 - 0.75) / 2)


def attained(deployment: str, *measurements: float) -> Row:
    return Row(deployment, 4.0, "attainment", (1.0,) * len(measurements), measurements)


def test_deployments_are_compared_within_a_round() -> None:
    # The machine was slow while one was driven in the first round: its sum over rounds is less.
    rows = [attained("split", 0.5, 0.99, 0.94), attained("aggregated", 1.0, 0.9, 0.85)]
    better, by = preferred(rows, "measured")
    assert better == "split"
    assert by == pytest.approx(0.09, abs=0.005)
    assert preferred(rows, "predicted") == ("neither", 0.0)


def test_where_nothing_is_served_in_time_neither_is_better() -> None:
    rows = [attained("split", 0.0), attained("aggregated", 0.0)]
    assert preferred(rows, "measured") == ("neither", 0.0)
    assert preferred([attained("split", 0.0), attained("aggregated", 0.1)], "measured") == (
        "aggregated",
        1.0,
    )


def speed(seconds: float) -> dict[str, object]:
    readings = [{"company": 0, "count": 50, "means_s": [seconds] * len(CODE)}]
    return {"readings": readings, "paces": [1.0]}


def figures(seconds: float) -> dict[str, object]:
    points = {"p50": seconds, "p90": seconds}
    return {"ttft_s": points, "tpot_s": points, "attainment": 1.0, "ttft_parts_s": {}}


def simulated(*arguments: object) -> str:
    """As if the way of requests were all there is."""
    given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    profile = json.loads(Path(str(given["--profile"])).read_text())
    return json.dumps(figures(profile["way_s"]))


def test_predictions_are_by_the_profile_of_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_report, "tandem", simulated)
    rounds = ((1.0, 2.0), (3.0, 1.0))
    lines = []
    for turn, (way_s, times) in enumerate(rounds):
        profile = {"way_s": way_s, "speed": speed(0.001)}
        profile_of(tmp_path, turn).write_text(json.dumps(profile))
        line = {"deployment": "split", "rate_rps": 4.0, "turn": turn, "figures": figures(2.0)}
        lines.append(json.dumps({**line, "speed": speed(0.001 * times)}))
    (tmp_path / MEASURED).write_text("\n".join(lines))

    (as_profiled,) = compare(tmp_path, at_speed=False)
    (at_speed,) = compare(tmp_path, at_speed=True)

    assert next(as_profiled.rows()).predictions == (1.0, 3.0)
    assert next(at_speed.rows()).predictions == pytest.approx((2.0, 3.0))
    assert next(at_speed.rows()).measurements == (2.0, 2.0)
