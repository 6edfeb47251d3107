"""The command line without a cluster: statuses, one-line errors, documents."""

import json
import signal
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from cluster.cli import doctor
from cluster.cli.app import run
from cluster.cli.chat import as_document
from cluster.cli.serve import pool_flags
from cluster.cli.status import as_document as status_document
from cluster.cli.status import draw, summarize
from cluster.config_docs import config_page, config_schema
from cluster.rpc import tandem_pb2 as pb

UNREACHABLE = ("--server", "127.0.0.1:1")


@pytest.fixture
def tandem(capsys):
    def command(*arguments):
        status = run(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("scale", "both=2"), "role"),
        (("scale", "decode=many"), "instances"),
        (("scale", f"decode={10**10}"), "instances"),
        (("generate", "x", "--seed", str(2**63)), "seed"),
        (("generate", "x", "--max-tokens", str(2**32)), "max-tokens"),
        (("generate", "\udcff", *UNREACHABLE), "UTF-8"),
        (("drain", "\udcff", *UNREACHABLE), "UTF-8"),
        (("bench", "--url", "http://127.0.0.1:99999"), "url"),
        (("bench", "--url", "http://[::1"), "url"),
        (("bench", "--ttft", "nan"), "ttft"),
        (("role", "decode-0", "cook"), "role"),
        (("serve", "absent.yaml"), "file"),
        (("serve", "--device", "tpu"), "device"),
        (("serve", "--host", "0.0.0.0"), "gateway.host"),
        (("serve", "--http-port", "70000"), "gateway.http_port"),
        (("status", "--bogus"), "No such option"),
        (("status", "--server", "http://127.0.0.1:8000"), "server"),
        (("policy", "validate", "absent.yaml"), "file"),
        (("report", "-o", "no/such/report.zip"), "output"),
        (("keys", "new", "--tenant", "a", "--file", "no/such/keys.yaml"), "file"),
        (("bogus",), "No such command"),
        (("generate",), "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tandem, arguments, field):
    status, out, err = tandem(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert field in err


def test_help_names_every_command(tandem):
    status, out, _ = tandem("--help")
    assert status == 0
    for command in ("serve", "generate", "chat", "status", "top", "scale", "migrate", "doctor"):
        assert command in out


def test_the_schema_is_one_json_document(tandem):
    status, out, _ = tandem("serve", "--schema")
    assert status == 0
    assert json.loads(out) == config_schema()


def test_the_schema_of_policies_is_one_json_document(tandem):
    status, out, err = tandem("policy", "schema")
    assert (status, err) == (0, "")
    assert "budget_accelerators" in json.loads(out)["properties"]


def test_a_policy_that_is_no_text_is_refused(tandem, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_bytes(b"\xd0\x00\xff")
    status, out, err = tandem("policy", "validate", str(file))
    assert (status, out) == (2, "")
    assert "UTF-8" in err


def test_every_key_of_the_reference_has_its_place():
    page = config_page()
    for key in ("`pools.prefill`", "`http_port`", "`lease_s`", "`queue_messages`"):
        assert key in page


@pytest.mark.parametrize(
    ("given", "alone", "wanted"),
    [
        ((None, None, None), True, (None, None, None)),
        ((None, None, 2), True, (0, 0, 2)),
        ((None, None, 2), False, (None, None, 2)),
        ((1, None, 1), True, (1, None, 1)),
    ],
)
def test_mixed_alone_means_no_others_unless_a_config_says_so(given, alone, wanted):
    assert tuple(pool_flags(*given, alone=alone).values()) == wanted


def test_doctor_tells_what_is_there(tandem):
    status, out, _ = tandem("doctor", "--json")
    findings = {finding["name"]: finding["state"] for finding in json.loads(out)}
    assert findings["ray"] == findings["torch"] == "ok"
    assert (status == 0) == ("missing" not in findings.values())


def test_a_driver_that_hangs_is_told_and_ends_nothing(monkeypatch):
    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, doctor.COMMAND_S)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    (gpu,) = [finding for finding in doctor.examine() if finding.name == "gpu"]
    assert gpu.state == doctor.ABSENT
    assert "nvidia-smi says nothing" in gpu.detail


def test_a_generations_document_has_the_promised_fields():
    from cluster.access import Generation

    generation = Generation()
    generation.add(pb.GenerateChunk(request_id="r", text="a", token_ids=[1]))
    summary = pb.Summary(
        usage=pb.Usage(prompt_tokens=2, completion_tokens=2, total_tokens=4),
        ttft_s=0.1,
        route=pb.Route(prefill="prefill-0", decode="decode-0"),
    )
    generation.add(
        pb.GenerateChunk(
            request_id="r", text="b", token_ids=[2], finish_reason="stop", summary=summary
        )
    )
    document = as_document(generation)
    assert (document["text"], document["token_ids"]) == ("ab", [1, 2])
    assert document["usage"]["total_tokens"] == 4
    assert (document["ttft_s"], document["tpot_s"]) == (0.1, None)
    assert document["route"] == {"prefill": "prefill-0", "decode": "decode-0"}


def test_a_status_document_has_the_promised_fields():
    reply = pb.StatusReply(
        model="demo",
        instances=[pb.Instance(id="decode-0", role="decode", state="ready", total_blocks=4)],
        requests=[pb.RequestStatus(id="r", state="decoding", migrations=2)],
        slo=pb.SloStatus(ttft_s=2.0, tpot_s=0.1, window_s=300.0),
    )
    document = status_document(reply)
    assert document["instances"][0]["workers"] == []
    assert document["requests"][0]["epoch"] == 0
    assert document["slo"]["attainment"] is None
    assert summarize(document)["instances"] == {"decode ready": 1}
    assert summarize(document)["migrations"] == 2


def test_no_name_is_cut_on_a_narrow_terminal():
    reply = pb.StatusReply(
        model="demo",
        instances=[
            pb.Instance(id="prefill-10", role="prefill", state="ready", device="cpu"),
            pb.Instance(id="decode-10", role="decode", state="ready", device="cpu"),
        ],
        requests=[pb.RequestStatus(id="r" * 37, prefill="prefill-10", decode="decode-10")],
    )
    console = Console(width=80, record=True, file=StringIO())
    console.print(draw(status_document(reply)))
    text = console.export_text()
    assert text.count("prefill-10") == text.count("decode-10") == 2
    assert "…" not in text


COMMAND = """
import signal
from cluster.cli import app

def run(arguments):
    try:
        print("began", flush=True)
        signal.pause()
    finally:
        print("undone", flush=True)

app.run = run
app.main()
"""


def test_a_command_that_is_told_to_end_first_undoes_what_it_began():
    command = [sys.executable, "-c", COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        process.terminate()
        assert process.stdout.read() == "undone\n"
    assert process.returncode == 128 + signal.SIGTERM
