"""An instance's log of its batches, and what a profile makes of the logs of a server."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import pytest

from cluster.instance.step_log import COLUMNS, LINES_KEPT, StepLog
from cluster.profiling.steps import prompt_passes, steps_at_work
from engine.batch import Batch, Chunk, Draw, StepResult
from engine.request import Sampling

if TYPE_CHECKING:
    from pathlib import Path


class Executor:
    def __init__(self):
        self.ran = []

    def execute(self, batch, on_layer_group=None):
        self.ran.append((batch, on_layer_group))
        return StepResult(())

    def launch(self, batch):
        return lambda: self.execute(batch)


def chunk(name, count, start, *, draws=True):
    draw = Draw(Sampling(), 0, start + count, ()) if draws else None
    return Chunk(name, tuple(range(count)), start, (0,), draw)


def read(path: Path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_line_tells_what_a_batch_held(tmp_path):
    inner, path = Executor(), tmp_path / "logs" / "mixed-0.csv"
    log = StepLog(inner, path)
    batch = Batch((chunk("a", 5, 10), chunk("b", 1, 20), chunk("c", 3, 0, draws=False)))
    assert log.execute(batch, print) == StepResult(())
    assert inner.ran == [(batch, print)]
    log.close()
    (line,) = read(path)
    assert tuple(line) == COLUMNS
    counts = {name: int(line[name]) for name in COLUMNS[3:9]}
    pairs = 5 * 10 + 15 + 6
    work = {"tokens": 9, "draws": 2, "prompts": 2, "decodes": 1}
    assert counts == {**work, "pairs": pairs, "kv_read_tokens": 30}
    assert float(line["pass_s"]) >= 0.0
    assert line["then_s"] == ""


def test_how_long_it_was_until_the_next_pass_is_told_where_a_request_went_on(tmp_path):
    log = StepLog(Executor(), tmp_path / "mixed-0.csv")
    for names in (["a"], ["a", "b"], ["c"], ["c"]):
        log.execute(Batch(tuple(chunk(name, 1, 4) for name in names)))
    log.close()
    assert [bool(line["then_s"]) for line in read(tmp_path / "mixed-0.csv")] == [
        True,
        False,
        True,
        False,
    ]


def test_lines_are_written_many_at_a_time_and_all_when_asked_for(tmp_path):
    path = tmp_path / "mixed-0.csv"
    log = StepLog(Executor(), path)
    for _ in range(LINES_KEPT + 3):
        log.execute(Batch((chunk("a", 1, 4),)))
    assert len(read(path)) == LINES_KEPT
    log.write()
    assert len(read(path)) == LINES_KEPT + 3
    log.execute(Batch((chunk("a", 1, 4),)))
    log.close()
    assert len(read(path)) == LINES_KEPT + 4


def test_a_pass_launched_behind_another_begins_when_that_one_ends(tmp_path):
    inner, path = Executor(), tmp_path / "mixed-0.csv"
    log = StepLog(inner, path)
    batches = [Batch((chunk("a", 1, at),)) for at in (4, 5, 6)]
    log.execute(batches[0])
    first, behind = (log.launch(batch) for batch in batches[1:])
    assert first() == behind() == StepResult(())
    assert [batch for batch, _ in inner.ran] == batches
    log.close()
    _, one, after = read(path)
    assert [int(line["kv_read_tokens"]) for line in (one, after)] == [5, 6]
    assert float(after["began_s"]) == pytest.approx(float(one["began_s"]) + float(one["pass_s"]))
    assert one["then_s"] == "0.0"


def test_an_executor_that_launches_nothing_does_not_through_a_log_either(tmp_path):
    inner = Executor()
    inner.launch = None
    log = StepLog(inner, tmp_path / "mixed-0.csv")
    assert log.launch is None
    inner.launch = lambda batch: None
    assert log.launch(Batch((chunk("a", 1, 4),))) is None
    log.close()


def write(path: Path, *lines):
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rows.writerows(lines)


DECODE = (1, 1, 0, 1, 0, 100)
PROMPT = (64, 1, 1, 0, 2080, 0)
PROMPTS = (128, 2, 2, 0, 4160, 0)


def test_steps_that_are_alike_are_told_by_their_mean(tmp_path):
    write(
        tmp_path / "mixed-0.csv",
        (1.0, 0.002, 0.001, *DECODE, 0.0005),
        (1.0025, 0.002, 0.002, *DECODE, 0.0015),
        (1.006, 0.002, 0.003, *DECODE, ""),
        (1.05, 0.010, 0.009, *PROMPT, 0.001),
    )
    cold, in_a_row, prompt = _by_kind(steps_at_work(tmp_path, 0.0))
    assert cold["count"] == 1
    assert in_a_row == {
        "count": 2,
        "others": 0.0,
        "cold": False,
        "mixed": False,
        "tokens": 1,
        "draws": 1,
        "prompts": 0,
        "pairs": 0,
        "kv_read_tokens": 100,
        "processor_s": pytest.approx(0.0025),
        "waited_s": 0.0,
        "followed": 1,
        "then_s": pytest.approx(0.0015),
    }
    assert prompt["cold"]
    assert prompt["pairs"] == 2080


def _by_kind(steps):
    """A decode after a rest, decodes in a row, and a prompt."""
    decodes = sorted((one for one in steps if not one["prompts"]), key=lambda one: -one["cold"])
    return (*decodes, *(one for one in steps if one["prompts"]))


def test_what_was_before_does_not_count(tmp_path):
    write(
        tmp_path / "mixed-0.csv",
        (1.0, 0.002, 0.001, *DECODE, ""),
        (2.0, 0.002, 0.002, *DECODE, ""),
    )
    (later,) = steps_at_work(tmp_path, 1.5)
    assert later["processor_s"] == pytest.approx(0.002)


def test_passes_that_hold_prompts_are_counted_within_a_time(tmp_path):
    write(
        tmp_path / "mixed-0.csv",
        (1.0, 0.010, 0.001, *PROMPT, ""),
        (2.0, 0.010, 0.002, *PROMPT, ""),
        (2.5, 0.002, 0.002, *DECODE, ""),
        (3.0, 0.030, 0.002, *PROMPTS, ""),
        (4.0, 0.010, 0.002, *PROMPT, ""),
    )
    assert prompt_passes(tmp_path, 1.5, 3.5) == (3, pytest.approx(0.070))


def test_passes_are_told_apart_by_how_long_others_computed_meanwhile(tmp_path):
    write(
        tmp_path / "prefill-0.csv",
        (1.0, 0.1, 0.05, *PROMPT, ""),
        (2.0, 0.1, 0.10, *PROMPT, ""),
        (3.0, 0.1, 0.07, *PROMPT, ""),
    )
    write(
        tmp_path / "decode-0.csv",
        (0.9, 0.15, 0.1, *DECODE, ""),
        (1.05, 0.1, 0.1, *DECODE, ""),
        (3.05, 0.06, 0.05, *DECODE, ""),
    )
    prompts = [one for one in steps_at_work(tmp_path, 0.0) if one["prompts"]]
    told = {round(one["others"], 6): (one["processor_s"], one["waited_s"]) for one in prompts}
    alone, partly, beside = (0.10, 0.0), (0.07, 0.03), (0.05, 0.05)
    expected = {0.0: alone, 0.5: partly, 1.0: beside}
    assert told == {others: pytest.approx(times) for others, times in expected.items()}


def test_passes_of_prompts_beside_decodes_are_mixed_whether_or_not_the_prompts_end(tmp_path):
    write(
        tmp_path / "mixed-0.csv",
        (1.0, 0.01, 0.01, 65, 2, 1, 1, 2080, 100, ""),
        (2.0, 0.01, 0.01, 65, 1, 1, 1, 2080, 100, ""),
        (3.0, 0.01, 0.01, *PROMPT, ""),
        (4.0, 0.01, 0.01, *PROMPTS, ""),
    )
    told = {(one["tokens"], one["draws"]): one["mixed"] for one in steps_at_work(tmp_path, 0.0)}
    assert told == {(65, 2): True, (65, 1): True, (64, 1): False, (128, 2): False}


def test_others_are_busy_between_passes_that_follow_one_another(tmp_path):
    write(tmp_path / "prefill-0.csv", (1.0, 0.1, 0.05, *PROMPT, ""))
    write(
        tmp_path / "decode-0.csv",
        *((0.95 + 0.02 * number, 0.01, 0.01, *DECODE, 0.01) for number in range(10)),
    )
    (prompt,) = (one for one in steps_at_work(tmp_path, 0.0) if one["prompts"])
    assert prompt["others"] == pytest.approx(1.0)
