"""`ray job submit` on a running Ray cluster, from a working directory without compiled parts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.access import Access
from cluster.client import Client
from tests.ray.serving import descendants, until_gone

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
WAIT_S = 150.0
CONFIG = """
model: demo
device: cpu
gateway: {http_port: 0, grpc_port: 0}
pools:
  prefill: {instances: 1, resources: {CPU: 0.5}}
  decode: {instances: 1, resources: {CPU: 0.5}}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """A Ray head with its job server, under a token of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    environment = {**os.environ, **token, "PATH": path}
    port, jobs_port = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={jobs_port}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--temp-dir=/tmp/ray-{os.getpid()}", "--object-store-memory=80000000"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{jobs_port}"}, process
    processes = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    left = until_gone(processes, 20.0)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)


def working_directory(target):
    """The sources and the built-in model, but nothing that was compiled here."""
    packages = ("engine", "kvtransfer", "prefill", "decode", "placement", "cluster")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *packages]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    (target / "config.yaml").write_text(CONFIG)
    return target


def submit(environment, directory):
    """Submits as soon as the cluster takes jobs; what the job prints comes out of the process."""
    command = [RAY, "job", "submit", "--no-wait", "--submission-id=tandem-test"]
    command += ["--working-dir", ".", "--", "python", "-m", "cluster", "serve", "config.yaml"]
    deadline = time.monotonic() + WAIT_S
    while True:
        submitted = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if submitted.returncode == 0:
            break
        assert time.monotonic() < deadline, submitted.stderr[-2000:]
    follow = [RAY, "job", "logs", "--follow", "tandem-test"]
    return subprocess.Popen(
        follow,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def lines_until(process, wanted):
    """What the job printed, up to the first line with `wanted` in it."""
    assert process.stdout is not None
    seen, alarm = [], threading.Timer(WAIT_S, process.kill)
    alarm.start()
    try:
        for line in process.stdout:
            seen.append(line)
            if wanted in line:
                return seen
    finally:
        alarm.cancel()
    raise AssertionError(f"no {wanted!r} in:\n{''.join(seen)[-4000:]}")


def test_a_job_serves_and_ends_when_it_is_stopped(head, tmp_path):
    environment, _ = head
    job = submit(environment, working_directory(tmp_path / "work"))
    seen = lines_until(job, "ready http=")
    fields = dict(part.split("=", 1) for part in seen[-1].split() if "=" in part)
    with Client(Access(fields["grpc"])) as client:
        generation = client.generate("Once upon a time", max_tokens=8, temperature=0.0)
        assert len(generation.token_ids) == 8
        assert [i.state for i in client.status().instances] == ["ready", "ready"]
    assert any("without native kernels" in line for line in seen), "".join(seen)
    stop = [RAY, "job", "stop", "tandem-test"]
    subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=60)
    lines_until(job, "ending signal=")
    job.wait(60)
