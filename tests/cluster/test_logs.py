"""Log lines, and the archive for bug reports."""

from __future__ import annotations

import json
import logging
import zipfile
from typing import TYPE_CHECKING

import pytest

from cluster.cli.bundle import collect, write_bundle
from cluster.watching.logs import JsonLines, set_up_logging
from engine.errors import BadConfig, DeadlineExceeded

if TYPE_CHECKING:
    from pathlib import Path


def line(phrase: str, *arguments: object) -> dict[str, object]:
    record = logging.LogRecord("cluster.x", logging.INFO, "x.py", 1, phrase, arguments, None)
    return json.loads(JsonLines().format(record))


def test_pairs_of_a_phrase_become_fields() -> None:
    found = line("request replayed request=%s pause_s=%.3f why=%s", "r-1", 0.25, "it is lost")
    assert (found["request"], found["pause_s"], found["why"]) == ("r-1", 0.25, "it is lost")
    assert found["message"] == "request replayed request=r-1 pause_s=0.250 why=it is lost"
    assert found["level"] == "INFO"


def test_a_phrase_with_other_arguments_is_still_a_line() -> None:
    assert line("%s instance=%s", "up", "decode-0")["message"] == "up instance=decode-0"
    assert line("nothing to fill in")["message"] == "nothing to fill in"


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(BadConfig, match="json"):
        set_up_logging({"TANDEM_LOG": "jsn"})


def out_of_reach() -> None:
    raise DeadlineExceeded("nobody answers")


def test_the_archive_tells_what_could_not_be_had(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: demo\nslo: {ttft_s: 1.5}\n")
    archive = tmp_path / "report.zip"
    write_bundle(archive, collect(out_of_reach, None, str(config)))  # type: ignore[arg-type]
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        assert "nobody answers" in opened.read("missing.txt").decode()
        assert json.loads(opened.read("config.json"))["slo"]["ttft_s"] == 1.5
        assert json.loads(opened.read("versions.json"))["tandem-serve"]
    assert "status.json" not in names


def test_the_archive_has_no_requests_but_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.cli import bundle

    status = {
        "model": "demo",
        "endpoints": {"http": "http://127.0.0.1:1", "grpc": ""},
        "instances": [{"id": "mixed-0", "role": "mixed", "state": "ready"}],
        "requests": [{"id": "a client's own words", "state": "decoding", "migrations": 0}],
        "slo": {},
        "policy": None,
    }
    monkeypatch.setattr(bundle, "_status", lambda _: status)
    monkeypatch.setattr(bundle, "_metrics", lambda *_: "tandem_instances 1\n")
    files = collect(out_of_reach, "secret-key", None)  # type: ignore[arg-type]
    assert json.loads(files["status.json"])["requests"] == {"decoding": 1}
    everything = "".join(files.values())
    assert "a client's own words" not in everything
    assert "secret-key" not in everything
