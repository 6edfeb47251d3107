"""The bench for GPUs runs without one, in small sizes, so that its first hour there is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import engine
import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine.batch import UNREAD
from engine.runner import Runner
from scripts.bench import gpu
from tests.engine.test_whole_steps import BLOCK_TOKENS, Staying, runner_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

BENCHES = Path(engine.__file__).parent.parent / "scripts" / "bench"
SMALL = ("--small", "--shapes", "tiny")


def run(
    output: Path, script: str = "gpu.py", options: tuple[str, ...] = SMALL
) -> list[dict[str, float | str]]:
    command = [sys.executable, str(BENCHES / script), "--device", "cpu", "--output", str(output)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_it_checks_and_times_every_case_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
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


def test_transformers_own_steps_and_prompts_stand_beside(tmp_path: Path) -> None:
    machine, *figures = run(tmp_path / "figures.jsonl", "gpu_peer.py")
    assert float(machine["bytes_s"]) > 0
    cases = [str(line["case"]).split()[:3] for line in figures]
    assert cases == [["transformers", "tiny", kind] for kind in ["decode"] * 2 + ["prefill"] * 2]
    assert all(float(line["time_s"]) != 0 for line in figures)


def test_a_prompts_hand_off_is_timed_alone_and_during_its_prefill(tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--tokens", "256", "--rounds", "2")
    alone, overlapped = run(tmp_path / "figures.jsonl", "gpu_handoff.py", options)
    assert alone["case"] == "handoff tiny tokens=256 over=shared_memory"
    assert float(alone["of_copy"]) > 0
    assert float(overlapped["with_handoff_s"]) > float(overlapped["wait_s"]) >= 0


def test_two_instances_of_a_device_serve_requests_beside_what_was_predicted(tmp_path: Path) -> None:
    sizes = ("--shape", "tiny", "--small", "--rates", "8", "--seconds", "0.5")
    _, *figures = run(tmp_path / "figures.jsonl", "gpu_goodput.py", (*sizes, "--only", "turns"))
    cases = [str(line["case"]) for line in figures]
    assert cases == [f"tiny turns {what}" for what in ("passes", "rate=8", "rate=8 predicted")]
    passes, served, predicted = figures
    prefill, decode = json.loads(str(passes["runs"]))
    assert len(prefill["beside"]["decode"]) == len(decode["decode"]) > 0
    assert served["failed"] == 0
    assert 0 <= float(predicted["attainment"]) <= 1


def test_a_decode_step_is_launched_before_the_one_before_it_is_read(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BLOCK_TOKENS", BLOCK_TOKENS)

    def decoded() -> tuple[list[int], list[int]]:
        """Each sequence's last token, while a step may be under way and after it."""
        runner = runner_of(tiny_checkpoint("llama3"), Staying())
        runner.kv.memory.zero_()
        sequences = gpu.Decoding(runner, count=2, context=gpu.STEPS_AHEAD + 3)
        with sequences as step:
            for _ in range(2 * BLOCK_TOKENS):
                step()
            known = sequences.tokens
        return known, sequences.tokens

    unread, drawn = decoded()
    assert unread == [UNREAD] * 2
    monkeypatch.setattr(Runner, "launch", None)
    assert decoded() == (drawn, drawn)
