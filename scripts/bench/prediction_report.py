"""What was predicted beside what was measured, from the folder in which a comparison is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
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
ALL_PROFILES = "profiles.json"
WORKLOAD, PLAN, MEASURED = "load.csv", "plan.yaml", "measured.jsonl"


@dataclass(frozen=True)
class Row:
    deployment: str
    rate_rps: float
    figure: str
    predicted: float
    rounds: tuple[float, ...]
    """As measured in each."""

    @property
    def measured(self) -> float:
        return median(self.rounds)

    @property
    def off(self) -> float:
        """Of a latency, relative to what was measured; of attainment, in points."""
        return self._apart(self.predicted, self.measured)

    @property
    def apart(self) -> float:
        """How far rounds are, alike."""
        return self._apart(max(self.rounds), min(self.rounds))

    @property
    def first_round_predicts(self) -> Row:
        """What comes of it if the same requests were sent before, instead of a simulation."""
        first, *others = self.rounds
        return replace(self, predicted=first, rounds=tuple(others))

    def _apart(self, value: float, other: float) -> float:
        return value - other if self.figure == "attainment" else (value - other) / self.measured


@dataclass(frozen=True)
class Compared:
    """One deployment at one rate, in all rounds."""

    deployment: str
    rate_rps: float
    measured: list[dict[str, Any]]
    predicted: list[dict[str, Any]]
    """Of each round, or one for all."""

    def rows(self) -> Iterator[Row]:
        ways = {f"{name} {point}": (name, point) for name, point in FIGURES}
        for figure, way in {**ways, "attainment": ("attainment",)}.items():
            predicted, measured = (
                tuple(_at(one, way) for one in side) for side in (self.predicted, self.measured)
            )
            yield Row(self.deployment, self.rate_rps, figure, median(predicted), measured)

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


def read_profiles(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("profile-*.json"))]


def together(profiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that was measured in any of them."""
    return {name: _together([one[name] for one in profiles], name) for name in profiles[0]}


def _together(values: Sequence[Any], name: str) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return together(values)
    if name == "runs":
        return [together(one) for one in zip(*values, strict=True)]
    return [entry for one in values for entry in one] if isinstance(first, list) else first


def at_the_speed(profile: dict[str, Any], speed: Speed) -> dict[str, Any]:
    """As it would be of a machine that is this fast."""
    longer: dict[str, Any] = lengthened(profile, slower(profile, speed))
    return longer


def slower(profile: dict[str, Any], speed: Speed) -> dict[str, float]:
    """How many times as long things take at this speed, by the kind of code."""
    return speed.slower_than(Speed.of(profile["speed"]))


def compare(folder: Path, *, at_speed: bool) -> Iterator[Compared]:
    """By the profiles as they are, or at the speed that the machine had meanwhile."""
    profiles, measured = read_profiles(folder), {}
    for one in read_measured(folder):
        measured.setdefault((one["deployment"], one["rate_rps"]), []).append(one)
    for (deployment, rate), rounds in measured.items():
        sets = [profiles]
        if at_speed:
            speeds = [Speed.of(one["speed"]) for one in rounds]
            sets = [[at_the_speed(one, speed) for one in profiles] for speed in speeds]
        predicted = [predict(folder, deployment, rate, together(one)) for one in sets]
        yield Compared(deployment, rate, [one["figures"] for one in rounds], predicted)


def predict(folder: Path, deployment: str, rate: float, profile: dict[str, Any]) -> dict[str, Any]:
    given = ("--workload", folder / WORKLOAD, "--rate", rate, "--json")
    plan, path = folder / f"{deployment}.yaml", folder / ALL_PROFILES
    path.write_text(json.dumps(profile))
    told = tandem("simulate", "--plan", plan, "--profile", path, *given)
    predicted: dict[str, Any] = json.loads(told)
    return predicted


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
    better, expected = (preferred(rows, side) for side in ("measured", "predicted"))
    again = [row.first_round_predicts for row in rows if len(row.rounds) > 1]
    others = max(one["others"] for one in measured)
    slowness = [overall(folder, Speed.of(one["speed"])) for one in measured]
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
    print(f"planned={planned} expected_better={expected} measured_better={better}")
    print(
        f"other processes took up to {others:.2f} of {os.cpu_count()} cores; "
        f"the machine was {min(slowness):.2f} to {max(slowness):.2f} times as slow as when profiled"
    )


def overall(folder: Path, speed: Speed) -> float:
    """How many times as slow as in the profiles."""
    each = [slower(one, speed).values() for one in read_profiles(folder)]
    return geometric_mean(value for one in each for value in one)


def described(row: Row) -> dict[str, Any]:
    return {**asdict(row), "measured": row.measured, "off": row.off, "apart": row.apart}


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


def preferred(rows: list[Row], side: str) -> str:
    """What serves more within the targets; `neither` where rates tell no difference."""
    rates = {name: served(rows, name, side) for name in dict.fromkeys(r.deployment for r in rows)}
    best = max(rates, key=lambda name: rates[name])
    return "neither" if min(rates.values()) > rates[best] * (1 - SAME) else best


def served(rows: list[Row], deployment: str, side: str) -> float:
    """Requests a second within their targets, over all rates."""
    mine = [row for row in rows if (row.deployment, row.figure) == (deployment, "attainment")]
    shares = [row.measured if side == "measured" else row.predicted for row in mine]
    return sum(row.rate_rps * share for row, share in zip(mine, shares, strict=True))
