"""Log lines, and the archive for bug reports."""

from __future__ import annotations

import json
import logging
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from cluster.cli.bundle import collect, write_bundle
from cluster.rpc import tandem_pb2 as pb
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
    write_bundle(archive, collect(out_of_reach, None, str(config)))
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        assert "nobody answers" in opened.read("missing.txt").decode()
        assert json.loads(opened.read("given.json"))["slo"]["ttft_s"] == 1.5
        assert json.loads(opened.read("versions.json"))["tandem-serve"]
    assert "status.json" not in names


def test_the_archive_has_the_plan_that_was_served(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "model: demo\npools: [{role: mixed, instances: 1}]\n"
        "predicted: {attainment: 0.97}\nreason: it is small\n"
    )
    files = collect(out_of_reach, None, str(plan))
    assert json.loads(files["given.json"])["predicted"] == {"attainment": 0.97}
    assert json.loads(files["given_plan.json"])["reason"] == "it is small"


WORDS = "a client's own words"


class Reached:
    """A cluster's client; a request of it bears a client's own words."""

    def __init__(self, http: str) -> None:
        self._http = http

    def __enter__(self) -> Reached:
        return self

    def __exit__(self, *_: object) -> None: ...

    def status(self) -> pb.StatusReply:
        return pb.StatusReply(
            model="demo",
            endpoints=pb.Endpoints(http=self._http),
            instances=[pb.Instance(id="mixed-0", role="mixed", state="ready")],
            requests=[pb.RequestStatus(id=WORDS, state="decoding")],
        )

    def describe(self) -> pb.DescribeReply:
        about = {"slo": {"ttft_s": 2.0}, "predicted": None, "observed": {"attainment": 0.9}}
        lists = {"requests": [{"id": WORDS}], "ended": [{"id": WORDS}], "moves": [{"id": WORDS}]}
        seen = {**about, **lists, "gateways": [], "totals": {}, "history": []}
        return pb.DescribeReply(seen=json.dumps(seen), config=json.dumps({"model": "demo"}))


class MetricsPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert self.headers["authorization"] == "Bearer secret-key"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"tandem_instances 1\n")

    def log_message(self, *_: object) -> None: ...


def test_the_archive_has_config_plan_and_metrics_but_of_requests_only_counts() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), MetricsPage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        files = collect(lambda: Reached(url), "secret-key", None)
        server.shutdown()
        thread.join()
    assert "missing.txt" not in files
    assert json.loads(files["status.json"])["requests"] == {"decoding": 1}
    assert json.loads(files["config.json"]) == {"model": "demo"}
    assert json.loads(files["plan.json"])["observed"] == {"attainment": 0.9}
    assert files["metrics.txt"] == "tandem_instances 1\n"
    everything = "".join(files.values())
    assert WORDS not in everything
    assert "secret-key" not in everything
