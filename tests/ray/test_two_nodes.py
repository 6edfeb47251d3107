"""Two Ray nodes in network namespaces, KV over TCP between them, and one of them is lost."""

import contextlib
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.ray.serving import (
    PATIENCE_S,
    RAY_SETTINGS,
    SMALL,
    command_of,
    descendants,
    metric,
    serve,
    until_gone,
    wait_for,
)
from tests.ray.streams import read_all, until

RAY = str(Path(sys.executable).with_name("ray"))
NODES = {"prefill": "10.213.7.1", "decode": "10.213.7.2"}
LINES = list(ipaddress.ip_network("198.18.0.0/15").subnets(new_prefix=30))
"""Addresses that nobody uses but testers; each run has a line of its own to its first node."""
HERE, DOOR = map(str, LINES[os.getpid() % len(LINES)].hosts())
"""The test's end of that line, and the node's."""
PORT = 6399
CONFIG = f"""
model: demo
device: cpu
pools:
  prefill: {{instances: 1, resources: {{prefill_node: 0.1}}}}
  decode: {{instances: 1, resources: {{decode_node: 0.1}}}}
transfer: {{transport: nixl, copies: {{slice_timeout_s: 60}}}}
limits: {{answer_s: 10}}
gateway: {{journal: {{reroute_s: 600}}}}
{SMALL}
"""
"""Patient with a slow machine: only the lost node does not answer for so long."""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def space(role):
    return f"td-{os.getpid()}-{role}"


def inside(role):
    return ("ip", "netns", "exec", space(role))


def connect(ends):
    """A line between two namespaces, or the test's own where it is None."""
    names = [f"td{os.getpid()}{letter}{len(ends)}{place}" for place, letter in enumerate("ab")]
    names = [f"{name[-13:]}" for name in names]
    ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    for name, (role, address) in zip(names, ends, strict=True):
        within = ()
        if role is not None:
            ip("link", "set", name, "netns", space(role))
            within = ("-n", space(role))
        ip(*within, "addr", "add", f"{address}/30", "dev", name)
        ip(*within, "link", "set", name, "up")


@pytest.fixture
def spaces():
    with contextlib.ExitStack() as undo:
        for role in NODES:
            try:
                ip("netns", "add", space(role))
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces are not permitted here: {error}")
            undo.callback(ip, "netns", "del", space(role))
            ip("-n", space(role), "link", "set", "lo", "up")
        connect(list(NODES.items()))
        connect([(None, HERE), ("prefill", DOOR)])
        yield


@pytest.fixture
def nodes(spaces, tmp_path, monkeypatch):
    """Each role's raylet, with what its workers find on their node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.delenv("UCX_NET_DEVICES")
    for name, value in RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    heads = {
        "prefill": ["--head", f"--port={PORT}", f"--temp-dir={session}"],
        "decode": [f"--address={NODES['prefill']}:{PORT}"],
    }
    started = {}
    for role, arguments in heads.items():
        started[role] = start(role, arguments, tmp_path / f"{role}.log")
    yield started
    processes = {pid for node in started.values() for pid in descendants(node.pid)}
    for node in started.values():
        node.send_signal(signal.SIGTERM)
        node.wait(PATIENCE_S)
    kill(until_gone(processes, 20.0))
    shutil.rmtree(session, ignore_errors=True)


def start(role, arguments, log):
    command = [*inside(role), RAY, "start", "--block", *arguments, "--num-cpus=2"]
    command += [f"--node-ip-address={NODES[role]}", "--object-store-memory=80000000"]
    command += ["--disable-usage-stats", "--include-dashboard=false"][
        : 2 if role == "prefill" else 1
    ]
    command += [f'--resources={{"{role}_node": 1}}']
    with log.open("w") as out:
        node = subprocess.Popen(command, stdout=out, stderr=out)
    started = "Ray runtime started"
    assert wait_for(lambda: node.poll() is not None or started in log.read_text())
    assert node.poll() is None, log.read_text()
    return node


def kill(processes):
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lose(node):
    """Everything on it dies at once."""
    kill({node.pid, *descendants(node.pid)})


@pytest.fixture
def cluster(nodes, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    address = f"{NODES['prefill']}:{PORT}"
    serving = serve(
        tmp_path / "serve.log",
        str(config),
        *("--address", address, "--host", DOOR, "--insecure"),
        inside=inside("prefill"),
    )
    yield serving
    assert serving.end() == 0, serving.log.read_text()[-4000:]


async def test_kv_crosses_nodes_over_tcp_and_a_lost_node_costs_a_pause(cluster, nodes):
    with cluster.client() as client:
        seats = {one.role: one for one in client.status().instances}
        assert seats["prefill"].node != seats["decode"].node
    undisturbed = await read_all(cluster, tokens=100)
    await until(lambda: handed_off(cluster))
    assert await read_all(cluster, tokens=100, disturb=lambda: lose(nodes["decode"])) == undisturbed
    assert not command_of(nodes["decode"].pid)
    await until(lambda: holds_nothing(cluster))


def handed_off(cluster):
    """After one request more: a prefill instance that seems slow is passed over for a moment."""
    with cluster.client() as client:
        client.generate("Once upon a time", max_tokens=4)
    return metric(cluster, 'tandem_kv_transfer_bytes_total{kind="handoff"}') > 0


def holds_nothing(cluster):
    with cluster.client() as client:
        status = client.status()
    ready = [one for one in status.instances if one.state == "ready"]
    free = all(one.free_blocks == one.total_blocks for one in ready)
    return [one.id for one in ready] == ["prefill-0"] and free and not status.requests
