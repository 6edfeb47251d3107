"""What was predicted beside what was measured, from the folder in which a comparison is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.profiling.speed import Speed, lengthened

ROOT = Path(__file__).resolve().parents[2]
TANDEM = (sys.executable, "-m", "cluster")
FIGURES = (("ttft_s", "p50"), ("ttft_s", "p90"), ("tpot_s", "p50"), ("tpot_s", "p90"))
SAME = 0.02
"""What two deployments serve is told apart from here on."""
LATENCY_WITHIN, ATTAINMENT_WITHIN = 0.15, 0.05
AT_SPEED = "at-speed.json"
WORKLOAD, PLAN, MEASURED = "load.csv", "plan.yaml", "measured.jsonl"


@dataclass(frozen=True)
class Row:
    deployment: str
    rate_rps: float
    figure: str
    predictions: tuple[float, ...]
    """Of each round."""
    measurements: tuple[float, ...]

    @property
    def predicted(self) -> float:
        return median(self.predictions)

    @property
    def measured(self) -> float:
        return median(self.measurements)

    @property
    def off(self) -> float:
        """In the median of the rounds: of a latency, relative to what was measured; of attainment,
        in points."""
        pairs = zip(self.predictions, self.measurements, strict=True)
        return median(self._apart(value, other, other) for value, other in pairs)

    @property
    def apart(self) -> float:
        """How far rounds are, alike."""
        return self._apart(max(self.measurements), min(self.measurements), self.measured)

    @property
    def first_round_predicts(self) -> Row:
        """What comes of it if the same requests were sent before, instead of a simulation."""
        first, *others = self.measurements
        predictions = (first,) * len(others)
        return Row(self.deployment, self.rate_rps, self.figure, predictions, tuple(others))

    def _apart(self, value: float, other: float, whole: float) -> float:
        return value - other if self.figure == "attainment" else (value - other) / whole


@dataclass(frozen=True)
class Compared:
    """One deployment at one rate, round by round."""

    deployment: str
    rate_rps: float
    measured: list[dict[str, Any]]
    predicted: list[dict[str, Any]]

    def rows(self) -> Iterator[Row]:
        ways = {f"{name} {point}": (name, point) for name, point in FIGURES}
        for figure, way in {**ways, "attainment": ("attainment",)}.items():
            predicted, measured = (
                tuple(_at(one, way) for one in side) for side in (self.predicted, self.measured)
            )
            yield Row(self.deployment, self.rate_rps, figure, predicted, measured)

    @property
    def parts(self) -> str:
        """Where the mean request's time went."""
        sides = (self.predicted, self.measured)
        told = [
            f"{name}={' / '.join(f'{1e3 * _part(side, name):.1f}' for side in sides)}"
            for name in self.predicted[0]["ttft_parts_s"]
        ]
        where = f"{self.deployment:<11} rate_rps={self.rate_rps:<7.2f}"
        return f"{where} parts_ms predicted / measured: {', '.join(told)}"


def _at(figures: dict[str, Any], way: Sequence[str]) -> float:
    return float(reduce(getitem, way, figures))


def _part(side: list[dict[str, Any]], name: str) -> float:
    return fmean(one["ttft_parts_s"][name] or 0.0 for one in side)


def read_measured(folder: Path) -> list[dict[str, Any]]:
    path = folder / MEASURED
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def profile_of(folder: Path, turn: int) -> Path:
    return folder / f"profile-{turn}.json"


def compare(folder: Path, *, at_speed: bool) -> Iterator[Compared]:
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for one in read_measured(folder):
        found.setdefault((one["deployment"], one["rate_rps"]), []).append(one)
    for (deployment, rate), rounds in found.items():
        measured = [one["figures"] for one in rounds]
        predicted = [predict(folder, one, at_speed=at_speed) for one in rounds]
        yield Compared(deployment, rate, measured, predicted)


def predict(folder: Path, one: dict[str, Any], *, at_speed: bool) -> dict[str, Any]:
    """What was measured, by its round's profile as it is, or at the speed of the machine
    meanwhile."""
    profile, plan = profile_of(folder, one["turn"]), folder / f"{one['deployment']}.yaml"
    if at_speed:
        longer = lengthened(json.loads(profile.read_text()), slower(folder, one))
        profile = folder / AT_SPEED
        profile.write_text(json.dumps(longer))
    given = ("--workload", folder / WORKLOAD, "--rate", one["rate_rps"], "--json")
    told = tandem("simulate", "--plan", plan, "--profile", profile, *given)
    predicted: dict[str, Any] = json.loads(told)
    return predicted


def slower(folder: Path, one: dict[str, Any]) -> dict[str, float]:
    """How many times as long things took as in the round's profile, by the kind of code."""
    profile = json.loads(profile_of(folder, one["turn"]).read_text())
    return Speed.of(one["speed"]).slower_than(Speed.of(profile["speed"]))


def tandem(*arguments: object) -> str:
    command = [*TANDEM, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}: {done.stderr.strip()}")
    return done.stdout


def report(folder: Path, *, as_json: bool) -> None:
    plan, measured = yaml.safe_load((folder / PLAN).read_text()), read_measured(folder)
    planned = {pool["role"]: pool["instances"] for pool in plan["pools"]}
    compared, compared_at_speed = (list(compare(folder, at_speed=way)) for way in (False, True))
    rows, at_speed = (
        [row for one in way for row in one.rows()] for way in (compared, compared_at_speed)
    )
    (better, by), (expected, by_far) = (preferred(rows, side) for side in ("measured", "predicted"))
    again = [row.first_round_predicts for row in rows if len(row.measurements) > 1]
    others = max(one["others"] for one in measured)
    slowness = [geometric_mean(slower(folder, one).values()) for one in measured]
    if as_json:
        document = {"planned": planned, "expected": expected, "better": better, "others": others}
        lists = {"rows": rows, "rows_at_speed": at_speed, "first_round_predicts": again}
        entries = {key: [described(row) for row in one] for key, one in lists.items()}
        print(json.dumps({**document, "slower": slowness, **entries}))
        return
    print(plan["reason"])
    for row, then in zip(rows, at_speed, strict=True):
        print(line(row, then))
    for one in compared_at_speed:
        print(one.parts)
    print(summary("as profiled", rows))
    print(summary("at the speed that the machine had meanwhile", at_speed))
    if again:
        print(summary("the first round, as if it predicted the others", again))
    print(
        f"planned={planned} expected_better={expected} by {by_far:.1%} "
        f"measured_better={better} by {by:.1%}"
    )
    print(
        f"others took up to {others:.2f} of {os.cpu_count()} cores; "
        f"the machine was {min(slowness):.2f} to {max(slowness):.2f} times as slow as when profiled"
    )


def described(row: Row) -> dict[str, Any]:
    told = {name: getattr(row, name) for name in ("predicted", "measured", "off", "apart")}
    return {**asdict(row), **told}


def line(row: Row, at_speed: Row) -> str:
    return (
        f"{row.deployment:<11} rate_rps={row.rate_rps:<7.2f} {row.figure:<11} "
        f"predicted={row.predicted:<8.4f} measured={row.measured:<8.4f} "
        f"off={row.off:+.1%} off_at_speed={at_speed.off:+.1%} rounds_apart={row.apart:.1%}"
    )


def summary(which: str, rows: list[Row]) -> str:
    latencies = [abs(row.off) for row in rows if row.figure != "attainment"]
    shares = [abs(row.off) for row in rows if row.figure == "attainment"]
    within = sum(off <= LATENCY_WITHIN for off in latencies)
    held = sum(off <= ATTAINMENT_WITHIN for off in shares)
    return (
        f"{which}: latencies off: median {np.median(latencies):.1%}, most {max(latencies):.1%}; "
        f"{within} of {len(latencies)} within {LATENCY_WITHIN:.0%}; "
        f"attainment off by at most {max(shares) * 100:.1f} points; "
        f"{held} of {len(shares)} within {ATTAINMENT_WITHIN * 100:.0f}"
    )


def preferred(rows: list[Row], side: str) -> tuple[str, float]:
    """What serves most within the targets, and by how much what serves least serves less; `neither`
    where rates tell no difference."""
    shares = shares_served(rows, side)
    best = max(shares, key=lambda name: shares[name])
    least, most = min(shares.values()), shares[best]
    if least >= most * (1 - SAME):
        return "neither", 0.0
    return best, 1.0 - least / most


def shares_served(rows: list[Row], side: str) -> dict[str, float]:
    """Of the requests a second within their targets, over all rates and deployments, in the median
    of the rounds."""
    attainments = [row for row in rows if row.figure == "attainment"]
    rounds = min(len(row.measurements) for row in attainments)
    served = {row.deployment: np.zeros(rounds) for row in attainments}
    for row in attainments:
        told = row.measurements if side == "measured" else row.predictions
        served[row.deployment] += row.rate_rps * np.array(told[:rounds])
    whole = np.maximum(sum(served.values()), np.finfo(float).tiny)
    return {name: float(np.median(one / whole)) for name, one in served.items()}
