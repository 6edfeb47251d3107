"""`ray job submit` on a running Ray cluster, from a working directory without compiled parts."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from cluster.access import Access
from cluster.client import Client
from tests.ray.serving import PATIENCE_S, RAY_SETTINGS, SMALL, descendants, until_gone, wait_for

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
JOBS = re.compile(r"RAY_API_SERVER_ADDRESS='(\S+)'")
CONFIG = f"""
model: demo
device: cpu
gateway: {{http_port: 0, grpc_port: 0}}
pools:
  prefill: {{instances: 1, resources: {{CPU: 0.5}}}}
  decode: {{instances: 1, resources: {{CPU: 0.5}}}}
{SMALL}
"""
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    # As docs/operations.md says of a Ray for CPUs.
    "RAY_worker_niceness": "0",
    # Ray's own limit for the end of a stopped job.
    "RAY_JOB_STOP_WAIT_TIME_S": f"{PATIENCE_S:.0f}",
}
FIXED_PORTS = range(20_000, 32_000)
"""The system gives none of these out by itself, so one that is free stays free."""
ANY_PORT = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "min-worker-port",
    "max-worker-port",
)
"""Whose default is one number for the whole machine, where somebody else may listen."""


def free_port():
    """For the one of Ray's servers that does not choose its own."""
    first = os.getpid() % len(FIXED_PORTS)
    return next(port for port in (*FIXED_PORTS[first:], *FIXED_PORTS[:first]) if is_free(port))


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def temporary():
    """Short, as socket paths must be."""
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def head(tmp_path, temporary):
    """A Ray head with its job server, under a token of its own."""
    environment = {**os.environ, **RAY_SETTINGS, **ENVIRONMENT}
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    command += [f"--{name}=0" for name in ANY_PORT]
    command += [f"--ray-client-server-port={free_port()}"]
    command += ["--disable-usage-stats", "--object-store-memory=80000000"]
    command += [f"--temp-dir={temporary}"]
    path = tmp_path / "head.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    assert wait_for(lambda: process.poll() is not None or JOBS.search(path.read_text()))
    assert process.poll() is None, path.read_text()
    yield environment | {"RAY_API_SERVER_ADDRESS": JOBS.findall(path.read_text())[0]}
    processes = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE_S)
    for pid in until_gone(processes, 20.0):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
    deadline = time.monotonic() + PATIENCE_S
    while True:
        submitted = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        # It is there already if the answer to an earlier attempt was lost.
        if submitted.returncode == 0 or "already exists" in submitted.stderr + submitted.stdout:
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


def read_until(process, seen, wanted):
    """Adds what the job prints to `seen`, until that has a line with `wanted` in it."""
    assert process.stdout is not None
    alarm = threading.Timer(PATIENCE_S, process.kill)
    alarm.start()
    try:
        while not any(wanted in line for line in seen):
            line = process.stdout.readline()
            assert line, f"no {wanted!r} in:\n{''.join(seen)[-4000:]}"
            seen.append(line)
    finally:
        alarm.cancel()
    return next(line for line in seen if wanted in line)


def test_a_job_serves_and_ends_when_it_is_stopped(head, tmp_path):
    job, seen = submit(head, working_directory(tmp_path / "work")), []
    ready = read_until(job, seen, "ready http=")
    fields = dict(part.split("=", 1) for part in ready.split() if "=" in part)
    with Client(Access(fields["grpc"])) as client:
        generation = client.generate("Once upon a time", max_tokens=8, temperature=0.0)
        assert len(generation.token_ids) == 8
        assert [i.state for i in client.status().instances] == ["ready", "ready"]
    # Ray brings the workers' lines, and may bring them after the job's own.
    read_until(job, seen, "without native kernels")
    stop = [RAY, "job", "stop", "tandem-test"]
    subprocess.run(stop, env=head, check=True, capture_output=True, timeout=PATIENCE_S)
    read_until(job, seen, "ending signal=")
    job.communicate(timeout=PATIENCE_S)
