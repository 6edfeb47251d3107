"""Figures, files and the command itself."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from cluster.bench.figures import figures
from cluster.bench.run import Measured
from cluster.bench.sample import Sample, write_samples
from cluster.bench.svg import Axis
from cluster.cli.bench import register
from engine.errors import BadInput
from engine.slo import Slo
from tests.cluster.bench.simulated import Behaviour, Latency, SimulatedServer, precise_loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

import typer

SHAPE = {"mean", "p50", "p90", "p99"}
QUICK = Latency(ttft_median_s=0.005, ttft_sigma=0.1, gap_s=(0.001, 0.002))


def sample(index: int, ttft_s: float, gap_s: float = 0.01, tokens: int = 3) -> Sample:
    due_s = float(index)
    moments = [due_s + ttft_s + gap_s * place for place in range(tokens)]
    return Sample(
        index, due_s, Slo(0.5, 0.02), 8, tokens,
        sent_s=due_s, ended_s=moments[-1], token_s=moments, output_tokens=tokens,
    )  # fmt: skip


def failed(index: int) -> Sample:
    return Sample(index, float(index), Slo(), 8, 3, ended_s=index + 1.0, error="HTTP 503: busy")


def test_the_fields_of_the_contract_are_all_there() -> None:
    found = figures([sample(0, 0.1), sample(1, 0.9), failed(2)])
    assert (found["requests"], found["finished"], found["failed"]) == (3, 2, 1)
    assert found["attainment"] == pytest.approx(1 / 3)
    assert found["rate_rps"] == 1.0
    assert found["duration_s"] == pytest.approx(3.0)
    assert found["goodput_rps"] == pytest.approx(1 / 3)
    assert found["throughput_tokens_s"] == pytest.approx(2.0)
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        assert set(found[name]) == SHAPE
    assert found["ttft_s"]["p50"] == pytest.approx(0.5)
    assert found["ttft_parts_s"]["queue"] is None


def test_a_report_is_drawn_where_tandem_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.bench.report import report

    monkeypatch.setattr("cluster.bench.report.TANDEM", "no-such-package")
    found = Measured("http://a", "m", [], [sample(0, 0.1)])
    assert "Measured by Tandem from its source" in report([found], [found.document()])


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    found = figures([failed(0), failed(1)])
    assert (found["attainment"], found["ttft_s"]["p50"]) == (0.0, None)


def test_intervals_hold_the_figure() -> None:
    found = figures([sample(index, 0.1 + index % 10 / 10) for index in range(100)])
    low, high = found["confidence"]["ttft_s"]["p50"]
    assert low <= found["ttft_s"]["p50"] <= high
    low, high = found["confidence"]["attainment"]
    assert low < found["attainment"] < high


def test_rounds_do_not_count_the_time_between_them() -> None:
    first, second = sample(0, 0.1), sample(1, 0.1)
    second.round = 1
    assert figures([first, second])["duration_s"] == pytest.approx(2 * 0.12)


def test_every_request_is_a_row() -> None:
    out = io.StringIO()
    write_samples(out, [("http://a", [sample(0, 0.25), failed(1)])])
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert rows[0]["ttft_s"] == "0.250000"
    assert (rows[0]["met"], rows[0]["error"]) == ("1", "")
    assert (rows[1]["ttft_s"], rows[1]["error"]) == ("", "HTTP 503: busy")


def test_axes_have_round_ticks() -> None:
    assert Axis("", 0.0, 97.0).ticks() == [0, 20, 40, 60, 80]
    assert Axis("", 9.0, 210.0, log=True).ticks() == [10, 20, 50, 100, 200]


@contextmanager
def simulated() -> Iterator[str]:
    """A server on a thread: the command runs its own loop."""
    loop, server = precise_loop(), SimulatedServer(Behaviour(QUICK, parts=True))
    url = loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def run(*arguments: str) -> None:
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    app(["bench", *arguments], standalone_mode=False)


def test_the_command_prints_json_and_writes_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, page = tmp_path / "rows.csv", tmp_path / "report.html"
    with simulated() as url:
        run(
            "--url", url, "--vs", url, "--rate", "100", "--requests", "12", "--output-tokens", "3",
            "--json", "--csv", str(rows), "--report", str(page), "--rounds", "2",
        )  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert (document["finished"], document["vs"][0]["finished"]) == (12, 12)
    assert len(rows.read_text().splitlines()) == 25
    html = page.read_text()
    assert html.count("<svg") == 6
    assert not re.search(r"""(src|href)=|@import|url\(""", html), "nothing is fetched"


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with simulated() as url:
        run("--url", url, "--rate", "100", "--requests", "4", "--output-tokens", "3")
    assert "Time to first token, p99" in capsys.readouterr().out


def test_a_workload_of_ones_own_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = tmp_path / "load.csv"
    load.write_text("arrival_s,prompt_tokens,output_tokens,slo_ttft_s\n5,9,3,0.0001\n5.02,8,3,\n")
    with simulated() as url:
        run("--url", url, "--workload", str(load), "--ttft", "900", "--tpot", "900", "--json")
    assert json.loads(capsys.readouterr().out)["attainment"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--workload", "w.csv", "--prompt-tokens", "9"), "prompt-tokens"),
        (("--workload", "w.csv", "--ramp-to", "9"), "ramp-to"),
        (("--rate", "0"), "rate"),
        (("--ttft", "-1"), "ttft"),
        (("--prefix-tokens", "9"), "prefix-tokens"),
        (("--goodput", "--concurrency", "2"), "goodput"),
        (("--concurrency", "2", "--rate", "3"), "rate"),
        (("--concurrency", "2", "--burstiness", "3"), "burstiness"),
        (("--concurrency", "2", "--duration-s", "3"), "duration-s"),
        (("--attainment", "0.5"), "attainment"),
        (("--rounds", "2"), "rounds"),
        (("--goodput", "--vs", "http://127.0.0.1:1", "--rounds", "2"), "rounds"),
        (("--think-s", "2"), "think-s"),
        (("--workload", "none.csv"), "workload"),
        (("--csv", "no/such/rows.csv"), "csv"),
        (("--report", "no/such/page.html"), "report"),
    ],
)
def test_options_that_contradict_are_named(arguments: tuple[str, ...], field: str) -> None:
    with pytest.raises(BadInput) as raised:
        run(*arguments)
    assert raised.value.field == field


def test_a_measured_server_without_answers_still_reports() -> None:
    from cluster.bench.report import report

    found = Measured("http://a", "m", ["a note"], [failed(0), failed(1)])
    assert "a note" in report([found], [found.document()])


def test_a_search_shows_attainment_over_rate_and_the_goodput_it_found() -> None:
    from cluster.bench.report import report

    probes = [{"rate_rps": rate, "attainment": share} for rate, share in ((1, 1.0), (2, 0.4))]
    found = Measured("http://a", "m", [], [sample(0, 0.1)], probes, goodput_rps=1.25)
    page = report([found], [found.document()])
    assert "Attainment over rate" in page
    assert "goodput 1.25" in page
    assert "targets 0.5 s to the first token and 0.02 s per token" in page
