"""The bench for GPUs runs without one, in small sizes, so that its first hour there is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import engine

SCRIPT = Path(engine.__file__).parent.parent / "scripts" / "bench" / "gpu.py"


def run(output: Path) -> list[dict[str, float | str]]:
    options = ["--device", "cpu", "--small", "--shapes", "tiny", "--output", str(output)]
    subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_it_checks_and_times_every_case_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.9", reason="older interpreters do not run on numpy 2.4")
    output = tmp_path / "figures.jsonl"
    figures = run(output)
    cases = [str(line["case"]).split()[0] for line in figures]
    assert cases == ["machine", *["decode"] * 2, *["prefill"] * 2, *["step"] * 4]
    assert all(float(line["largest_error"]) < 1e-5 for line in figures[1:5])
    assert all(float(line["time_s"]) > 0 for line in figures[1:])
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:-2]))
    again = run(output)
    assert again[:-2] == figures[:-2]
    assert [line["case"] for line in again] == [line["case"] for line in figures]
